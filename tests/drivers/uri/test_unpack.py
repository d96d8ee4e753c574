"""What an archive becomes, and what none may do."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from drivers.bench import Bench
from imageapi.drivers.uri import archive as reading
from imageapi.errors import Invalid, Problem
from lab.archives import Compression, Member, archive, compressed

pytestmark = pytest.mark.kernel

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
"""vfs_cap_data of <linux/capability.h>: CAP_NET_BIND_SERVICE, effective."""
XATTR = "SCHILY.xattr."


def unpacked(bench: Bench, data: bytes, **options: Any) -> Path:
    file = Path(bench.site.run_dir, "archive")
    file.write_bytes(data)
    record = bench.acquire(bench.uri(f"file://{file}", **options))
    assert record.facts.mountpoint is not None
    return Path(record.facts.mountpoint)


def refused(bench: Bench, data: bytes, kind: type[Problem] = Invalid, **options: Any) -> str:
    with pytest.raises(kind) as refusal:
        unpacked(bench, data, **options)
    assert os.listdir(bench.site.mounts_dir) == []
    return refusal.value.message


@pytest.mark.parametrize("compression", ["", "gz", "xz", "zst"])
def test_it_is_unpacked(bench: Bench, compression: Compression) -> None:
    root = unpacked(bench, archive(Member("./"), Member("./etc/hello", b"hello\n"), compression=compression))
    assert (root / "etc/hello").read_bytes() == b"hello\n"


@pytest.mark.parametrize("compression", ["gz", "xz", "zst"])
def test_several_compressed_parts_are_one(bench: Bench, compression: Compression) -> None:
    """As pigz, pixz and pzstd write them; with zeros behind the last."""
    plain = archive(Member("a", bytes(300_000)), Member("b", b"b"))
    parts = [compressed(plain[at : at + 100_000], compression) for at in range(0, len(plain), 100_000)]
    root = unpacked(bench, b"".join(parts) + bytes(512))
    assert ((root / "a").stat().st_size, (root / "b").read_bytes()) == (300_000, b"b")


def test_owners_modes_and_times_are_those_of_the_archive(bench: Bench) -> None:
    about: dict[str, Any] = {"uid": 1234, "gid": 5678, "mtime": 1_000_000_000.25}
    kept = Member("dir/", mode=0o2751, more=about), Member("dir/set", b"x", mode=0o4755, more=about)
    root = unpacked(bench, archive(*kept, Member("dir/link", symlink="/set", more=about), Member("dir/later", b"")))
    for name in ("dir", "dir/set", "dir/link"):
        found = (root / name).lstat()
        assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (1234, 5678, 1_000_000_000_250_000_000), name
    assert stat.S_IMODE((root / "dir").stat().st_mode) == 0o2751
    assert stat.S_IMODE((root / "dir/set").stat().st_mode) == 0o4755
    assert os.readlink(root / "dir/link") == "/set"


def test_every_nanosecond_is_kept(bench: Bench) -> None:
    root = unpacked(bench, archive(Member("a", pax={"mtime": "1700000000.123456789"})))
    assert (root / "a").stat().st_mtime_ns == 1_700_000_000_123_456_789


def test_the_root_has_what_the_archive_says_of_it(bench: Bench) -> None:
    root = unpacked(bench, archive(Member("./", mode=0o711, more={"uid": 7}), Member("./a")))
    assert (stat.S_IMODE(root.stat().st_mode), root.stat().st_uid) == (0o711, 7)


def test_capabilities_and_the_users_attributes_are_kept(bench: Bench) -> None:
    pax = {f"{XATTR}security.capability": CAPABILITY.decode("utf-8", "surrogateescape"), f"{XATTR}user.note": "hi"}
    others = {f"{XATTR}security.selinux": "x", f"{XATTR}trusted.overlay.opaque": "y"}
    root = unpacked(bench, archive(Member("ping", b"x", pax={**pax, **others}, more={"uid": 5})))
    assert os.getxattr(root / "ping", "security.capability") == CAPABILITY
    assert sorted(os.listxattr(root / "ping")) == ["security.capability", "user.note"]


def test_an_attribute_that_this_kernel_cannot_keep_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, name: str, value: bytes) -> None:
        raise OSError(errno.EOPNOTSUPP, "as before Linux 6.6")

    monkeypatch.setattr(os, "setxattr", refuse)
    message = refused(bench, archive(Member("a", pax={f"{XATTR}user.note": "hi"})))
    assert "'a' has the extended attribute user.note, which a tmpfs of this kernel cannot keep" in message


def test_what_gnu_tar_packs_with_attributes_is_the_same_again(bench: Bench, tmp_path: Path) -> None:
    """Our archives are Python's; these are made by the program that most are made by."""
    tree = tmp_path / "tree"
    (tree / "/".join(["deep"] * 30)).mkdir(parents=True)
    (tree / ("n" * 200)).write_text("a long name")
    (tree / "plain").write_text("x")
    os.link(tree / "plain", tree / "second")
    os.setxattr(tree / "plain", "user.note", b"\xff\0\xfe")
    with open(tree / "holes", "wb") as sparse:
        sparse.write(b"begin")
        sparse.truncate(50 << 20)
        sparse.seek(20 << 20)
        sparse.write(b"middle")
    for more in (["--format=pax", "--xattrs"], ["--format=gnu"], ["--format=pax", "--sparse-version=0.1"]):
        packed = subprocess.run(["tar", "-cSC", tree, *more, "."], check=True, capture_output=True).stdout
        root = unpacked(bench, packed)
        assert subprocess.run(["diff", "-r", "--no-dereference", tree, root], check=False).returncode == 0
        assert (root / "plain").stat().st_ino == (root / "second").stat().st_ino
        assert (root / "holes").stat().st_blocks * 512 < 1 << 20, "holes stay holes"
        if "--xattrs" in more:
            assert os.getxattr(root / "plain", "user.note") == b"\xff\0\xfe"


def test_hard_links_and_pipes(bench: Bench) -> None:
    pipe = Member("pipe", mode=0o600, more={"type": tarfile.FIFOTYPE})
    root = unpacked(bench, archive(Member("d/a", b"a"), Member("b", link="./d/a"), pipe))
    assert (root / "b").stat().st_ino == (root / "d/a").stat().st_ino
    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)


def test_device_nodes_are_left_out(bench: Bench) -> None:
    node = {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}
    root = unpacked(bench, archive(Member("dev/null", more=node), Member("a"), Member("dev/zero", more=node)))
    assert os.listdir(root) == ["a"]


def test_of_two_of_one_name_the_last_counts(bench: Bench) -> None:
    members = (Member("a", symlink="/etc/passwd"), Member("a", b"second"), Member("d/", mode=0o700), Member("d/"))
    root = unpacked(bench, archive(*members))
    assert ((root / "a").is_symlink(), (root / "a").read_bytes()) == (False, b"second")
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o644


def test_what_is_unpacked_can_be_written_to(bench: Bench) -> None:
    root = unpacked(bench, archive(Member("a")))
    (root / "b").write_text("new")


# ------------------------------------------------------------------------------------------------- the hostile ones

HOSTILE: dict[str, tuple[list[Member], str]] = {
    "an absolute name": ([Member("/etc/evil", b"x")], "names '/etc/evil', which is not below the root"),
    "a way up": ([Member("a/../../evil", b"x")], "not below the root"),
    "only a way up": ([Member("..", b"x")], "not below the root"),
    "a directory upwards": ([Member("a/../../evil/")], "not below the root"),
    "through a symlink out": ([Member("out", symlink="/tmp"), Member("out/evil", b"x")], "behind a symbolic link"),
    "through one inside": ([Member("d/"), Member("in", symlink="d"), Member("in/x", b"")], "behind a symbolic link"),
    "a directory on one": ([Member("out", symlink="/tmp"), Member("out/")], "behind a symbolic link"),
    "a link to the host": ([Member("a", link="/etc/passwd")], "names '/etc/passwd', which is not below the root"),
    "a link upwards": ([Member("a", link="../../etc/passwd")], "not below the root"),
    "a link through one": ([Member("e", symlink="/etc"), Member("a", link="e/passwd")], "behind a symbolic link"),
    "a link to what is not there": ([Member("a", link="b")], "hard link to 'b', which is not before it"),
    "a link to itself": ([Member("a", b"x"), Member("a", link="a")], "hard link to 'a'"),
    "a link to a directory": ([Member("d/"), Member("a", link="d")], "a link to what can have no second name"),
    "a file for a directory": ([Member("d/"), Member("d", b"x")], "was a directory before"),
    "below a file": ([Member("f", b"x"), Member("f/a", b"x")], "that was something else before"),
    "a directory for a file": ([Member("f", b"x"), Member("f/")], "that was something else before"),
    "the root as a file": ([Member("./.", b"x")], "is the root of the archive"),
    "a NUL": ([Member("a", pax={"path": "a\0b"})], "not below the root"),
    "a long name": ([Member("n" * 256)], "longer than file systems allow"),
    "a long path": ([Member("d/" * 2500 + "x")], "longer than file systems allow"),
    "an owner": ([Member("a", more={"uid": 1 << 40})], "an owner, a time or an attribute"),
    "another owner": ([Member("a", more={"gid": -2})], "an owner, a time or an attribute"),
    "a strange type": ([Member("a", more={"type": b"Z"})], "has the type b'Z'"),
    "no time": ([Member("a", pax={"mtime": "nan"})], "a time, a target or an attribute"),
    "no number": ([Member("a", pax={"mtime": "\u00b2.5"})], "a time, a target or an attribute"),
    "a time of a directory": ([Member("d/", pax={"mtime": "1e30"})], "'d' has an owner, a time or an attribute"),
    "a target with a NUL": ([Member("a", symlink="b", pax={"linkpath": "a\0b"})], "a time, a target or an attribute"),
    "through one to nothing": ([Member("lib", symlink="usr/lib"), Member("lib/x", b"")], "behind a symbolic link"),
    "no target": ([Member("a", symlink="")], "'a' is a symbolic link to nothing"),
    "a link into a directory that is not there": ([Member("a", link="d/b")], "hard link to 'd/b', which is not before"),
    "an attribute's name": ([Member("a", pax={f"{XATTR}user.a\0b": "x"})], "a time, a target or an attribute"),
    "an attribute's size": ([Member("a", pax={f"{XATTR}user.a": "x" * 65537})], "attribute that is larger"),
    "a map of holes": (
        [Member("a", pax={"GNU.sparse.map": "a,b", "GNU.sparse.numblocks": "1", "GNU.sparse.size": "1"})],
        "it is damaged after"),
    "a size of holes": ([Member("a", pax={"GNU.sparse.size": "x"})], "it is damaged after"),
    "a capability that is none": ([Member("a", pax={f"{XATTR}security.capability": "?"})], "an attribute"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_leads_out_or_cannot_be_is_refused(bench: Bench, case: str) -> None:
    members, words = HOSTILE[case]
    before = sorted(os.listdir("/tmp")), Path("/etc/passwd").stat().st_nlink
    assert words in refused(bench, archive(*members))
    assert (sorted(os.listdir("/tmp")), Path("/etc/passwd").stat().st_nlink) == before


def _header(name: str, kind: bytes, size: bytes, tail: bytes = b"") -> bytes:
    """A header of GNU tar with any twelve bytes for its size, and `tail` for its end."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157], header[512 - len(tail) : 512] = size, kind, tail
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


NEGATIVE = (-2048).to_bytes(12, "big", signed=True)
NONE = b"%011o\0" % 0
MORE = bytes(29) + b"\1" + bytes(12) + bytes(17)
"""The end of the header of a sparse file whose map goes on in the next block."""


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_a_size_below_nothing_is_refused(bench: Bench, kind: bytes) -> None:
    assert "size" in refused(bench, PLAIN[:3584] + _header("a", kind, NEGATIVE) + PLAIN[3584:])


def test_a_map_of_holes_that_is_cut_off_is_refused(bench: Bench) -> None:
    cut = _header("a", tarfile.GNUTYPE_SPARSE, NONE, MORE)
    assert "it is damaged after" in refused(bench, cut)


def test_headers_before_headers_have_an_end(bench: Bench) -> None:
    assert "it is damaged after" in refused(bench, _header("a", tarfile.XHDTYPE, NONE) * 1000 + PLAIN)


def test_what_is_said_of_all_members_has_a_bound(bench: Bench) -> None:
    """Each header is small enough; what they say together is not."""
    said = [
        tarfile.TarInfo.create_pax_global_header({f"{number}": "x" * (reading.HEADERS // 3)}) + PLAIN[:3584]
        for number in range(4)
    ]
    assert "the headers of all members" in refused(bench, b"".join(said))


def test_of_two_of_one_directory_the_last_time_counts(bench: Bench) -> None:
    root = unpacked(bench, archive(Member("d/", more={"mtime": 1}), Member("d/a"), Member("d/", more={"mtime": 2})))
    assert (root / "d").stat().st_mtime == 2


def test_a_tree_may_be_deep(bench: Bench) -> None:
    root = unpacked(bench, archive(Member("d/" * 2000 + "x", b"deep")))
    found = subprocess.run(["find", root, "-name", "x", "-printf", "%d"], check=True, capture_output=True)
    assert found.stdout == b"2001"


def test_a_name_that_is_no_text_is_kept_and_told(bench: Bench) -> None:
    root = unpacked(bench, archive(Member("\udcff")))
    assert os.listdir(os.fsencode(root)) == [b"\xff"]
    bench.release_all()
    assert "'/\ufffd'" in refused(bench, archive(Member("/\udcff")))


# ------------------------------------------------------------------------------------------------------ the limits


def test_what_unpacks_to_more_than_it_may(bench: Bench) -> None:
    bomb = archive(Member("zeros", bytes(20 << 20)), compression="zst")
    assert len(bomb) < 10_000
    message = refused(bench, bomb, max_size=5 << 20)
    assert f"it has {5 << 20} bytes or more, and max_size is {5 << 20}" in message


def test_what_has_too_many_members(bench: Bench) -> None:
    crowd = archive(*(Member(f"m{number}") for number in range(5000)), compression="gz")
    assert "members or more" in refused(bench, crowd, max_size=1 << 20)


def test_holes_take_no_room(bench: Bench, tmp_path: Path) -> None:
    with open(tmp_path / "holes", "wb") as sparse:
        sparse.truncate(1 << 40)
    packed = subprocess.run(["tar", "-cSC", tmp_path, "holes"], check=True, capture_output=True).stdout
    assert (unpacked(bench, packed, max_size=1 << 20) / "holes").stat().st_size == 1 << 40


def test_headers_have_a_bound(bench: Bench) -> None:
    """A name is read whole before anything is known of it."""
    long = Member("a", pax={"comment": "x" * (2 * reading.HEADERS)})
    assert "the headers of one member" in refused(bench, archive(long, compression="gz"))


def test_the_dictionary_of_an_xz_has_a_bound(bench: Bench) -> None:
    import lzma

    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    data = lzma.compress(archive(Member("a")), format=lzma.FORMAT_XZ, filters=filters)
    assert "Memory usage limit" in refused(bench, data)


PLAIN = archive(Member("a", b"x" * 3000), Member("b", b"y" * 3000))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no tar archive"),
        (bytes(10240), "it begins with nothing but zeros"),
        (b"hello\n" * 1000, "it begins with nothing that is known"),
        (b"<!DOCTYPE html>" + b" " * 2000, "a web page"),
        (PLAIN[:2000], "ends in the middle of a member"),
        (PLAIN[:3584], "after 3584 bytes there is neither"),
        (PLAIN[:3584] + b"\xff" * 512 + PLAIN[4096:], "neither a member nor the end"),
    ],
    ids=["empty", "zeros", "text", "page", "cut", "cut between", "damaged"],
)
def test_what_is_no_archive_or_not_whole(bench: Bench, data: bytes, words: str) -> None:
    assert words in refused(bench, data)
