"""The kind `overlay`: what it makes, what it refuses, and what it keeps."""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from drivers.bench import Bench, Made, place, standing
from imageapi.api import rules
from imageapi.config import Site
from imageapi.drivers.overlayfs import upper
from imageapi.drivers.overlayfs.upper import VOLATILE
from imageapi.errors import Conflict, Exhausted, Invalid, Problem
from imageapi.linux import mount
from imageapi.records import AnyRecord
from lab.elsewhere import mount_namespace
from tools.images import Format

pytestmark = pytest.mark.kernel


def test_an_overlay_is_written_and_its_lower_is_not(bench: Bench) -> None:
    lower = bench.mounted()
    record = bench.acquire(bench.overlay(lower))
    (place(record) / "data/message").write_text("changed")
    (place(record) / "etc/passwd").unlink()
    assert (place(lower) / "data/message").read_text() == "written when the image was made\n"
    assert (place(lower) / "etc/passwd").exists()
    assert record.facts.upperdir is not None
    assert Path(record.facts.upperdir, "data/message").read_text() == "changed"


def is_volatile(record: AnyRecord) -> bool:
    """As the kernel shows it; differently since 6.18."""
    return bool({"volatile", "fsync=volatile"} & set(standing(record).super_options.split(",")))


def test_it_is_volatile_and_carries_our_mark(bench: Bench) -> None:
    record = bench.layered()
    assert is_volatile(record)
    assert standing(record).source == bench.site.mark(record.key)


def test_the_first_lower_is_the_topmost(bench: Bench, run_dir: Path) -> None:
    binds = []
    for name in ("first", "second"):
        (run_dir / name).mkdir()
        (run_dir / name / "who").write_text(name)
        (run_dir / name / f"only-{name}").touch()
        binds.append(bench.acquire(bench.bind(str(run_dir / name))))
    merged = place(bench.acquire(bench.overlay(*binds)))
    assert (merged / "who").read_text() == "first"
    assert {path.name for path in merged.iterdir()} == {"who", "only-first", "only-second"}


def test_its_root_looks_like_its_lowers(bench: Bench, run_dir: Path) -> None:
    lower = run_dir / "lower"
    lower.mkdir()
    lower.chmod(0o1750)
    os.chown(lower, 1234, 5678)
    merged = place(bench.acquire(bench.overlay(bench.acquire(bench.bind(str(lower)))))).stat()
    assert (merged.st_mode & 0o7777, merged.st_uid, merged.st_gid) == (0o1750, 1234, 5678)


def test_one_lower_given_twice_is_refused(bench: Bench) -> None:
    lower = bench.mounted()
    with pytest.raises(Invalid, match="the same directory") as refusal:
        bench.acquire(bench.overlay(lower, lower))
    assert refusal.value.fields["path"] == "$.lower[1]"


def test_one_directory_by_two_mounts_is_refused(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    first, second = bench.acquire(bench.attach(on)), bench.acquire(bench.attach(on))
    with pytest.raises(Invalid, match=f"{second.key} is the same directory as {first.key}"):
        bench.acquire(bench.overlay(first, second))


def test_a_lower_within_another_is_refused(bench: Bench, run_dir: Path) -> None:
    (run_dir / "outer/inner").mkdir(parents=True)
    outer = bench.acquire(bench.bind(str(run_dir / "outer")))
    inner = bench.acquire(bench.bind(str(run_dir / "outer/inner")))
    with pytest.raises(Invalid, match="lies within another"):
        bench.acquire(bench.overlay(inner, outer))


def test_a_third_overlay_over_two_is_refused(bench: Bench) -> None:
    second = bench.layered(bench.layered())
    for top in (second, bench.acquire(bench.bind_inside(second, "/"))):
        with pytest.raises(Invalid, match="no more than 2") as refusal:
            bench.acquire(bench.overlay(top))
        assert refusal.value.fields["path"] == "$.lower[0]"


def test_paths_with_the_characters_of_the_option_syntax(site: Site, run_dir: Path) -> None:
    odd = Site(run_dir=str(run_dir / r"a:b,c\d=e f"), instance=site.instance)
    os.makedirs(odd.mounts_dir)
    bench = Bench(odd)
    record = bench.layered(bench.mounted(), bench.mounted("erofs"))
    (place(record) / "written").write_text("here")
    assert record.facts.upperdir is not None
    assert Path(record.facts.upperdir, "written").read_text() == "here"
    bench.release_all()


def test_more_lowers_than_a_page_of_options_holds(bench: Bench, run_dir: Path) -> None:
    binds = []
    for number in range(90):
        (run_dir / f"lower-{number}").mkdir()
        (run_dir / f"lower-{number}" / str(number)).touch()
        binds.append(bench.acquire(bench.bind(str(run_dir / f"lower-{number}"))))
    record = bench.acquire(bench.overlay(*binds))
    assert {path.name for path in place(record).iterdir()} == {str(number) for number in range(90)}
    assert is_volatile(record)
    (place(record) / "written").touch()


def test_release_removes_what_a_container_left_in_the_upper(bench: Bench) -> None:
    record = bench.layered()
    fd = os.open(place(record) / "var", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deep", dir_fd=fd)
        deeper = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    (place(record) / "out").symlink_to("/etc")
    os.mkfifo(place(record) / "fifo")
    before = set(os.listdir("/etc"))
    bench.release(record)
    assert not os.path.exists(bench.site.upperdir(record.token))
    assert set(os.listdir("/etc")) == before


def test_what_is_mounted_in_the_upper_by_a_stranger_is_not_emptied(bench: Bench, run_dir: Path) -> None:
    record = bench.layered()
    dear = run_dir / "dear"
    dear.mkdir()
    (dear / "kept").write_text("dear to somebody")
    assert record.facts.upperdir is not None
    spot = Path(record.facts.upperdir, "spot")
    spot.mkdir()
    mount.mount(str(dear), str(spot), None, mount.MS_BIND, None)
    try:
        with pytest.raises(Conflict, match="something is mounted in"):
            bench.release(record)
        assert (dear / "kept").read_text() == "dear to somebody"
    finally:
        mount.umount(str(spot))
    bench.release(record)


def test_an_overlay_in_another_namespace_keeps_its_upper(bench: Bench, run_dir: Path) -> None:
    """Where it is mounted at another place, so that removing the mountpoint does not detach it."""
    record = bench.layered()
    spot = run_dir / "spot"
    spot.mkdir()
    mount.mount(str(place(record)), str(spot), None, mount.MS_BIND, None)
    with mount_namespace() as pid:
        mount.umount(str(spot))
        with pytest.raises(Conflict) as refusal:
            bench.release(record)
        assert refusal.value.fields["holders"] == [f"process {pid} (sleep)"]
        assert os.path.isdir(bench.site.upperdir(record.token))
    bench.release(record)
    assert not os.path.exists(bench.site.upperdir(record.token))


def test_more_lowers_than_the_kernel_takes_are_refused_with_its_limit(bench: Bench, run_dir: Path) -> None:
    lower = bench.acquire(bench.bind(str(run_dir)))
    with pytest.raises(Invalid, match="501 lower mounts are more than the 500") as refusal:
        bench.acquire(bench.overlay(*[lower] * 501))
    assert refusal.value.fields["path"] == "$.lower"


# -------------------------------------------------------------------------------------------------- read-only


@pytest.mark.parametrize("formats", [("squashfs",), ("squashfs", "erofs")])
def test_a_read_only_overlay_has_no_upper(bench: Bench, formats: tuple[Format, ...]) -> None:
    record = bench.acquire(bench.overlay(*map(bench.mounted, formats), ro=True))
    assert (place(record) / "data/message").read_text() == "written when the image was made\n"
    with pytest.raises(OSError, match="Read-only"):
        (place(record) / "new").touch()
    assert (record.facts.upperdir, record.facts.workdir) == (None, None)


# ------------------------------------------------------------------------------------ an upper in another mount


def message(record: AnyRecord) -> Path:
    return place(record) / "data/message"


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_what_is_written_to_a_disk_is_there_for_the_next_overlay(bench: Bench, fs_type: str) -> None:
    lower, disk = bench.mounted(), bench.disk(fs_type)
    for found, written in (("written when the image was made\n", "first"), ("first", "second")):
        record = bench.acquire(bench.overlay(lower, upper=disk))
        assert message(record).read_text() == found
        message(record).write_text(written)
        assert not is_volatile(record)
        bench.release(record)
    assert (place(disk) / "upper/data/message").read_text() == "second"
    assert sorted(path.name for path in place(disk).iterdir() if path.name in ("upper", "work")) == ["upper", "work"]


def test_one_mount_has_room_for_the_writes_of_several(bench: Bench) -> None:
    lower, disk = bench.mounted(), bench.disk()
    first, second = (bench.acquire(bench.overlay(lower, upper=disk, upper_path=path)) for path in ("/a", "b/c:d,e"))
    message(first).write_text("first")
    message(second).write_text("second")
    assert (place(disk) / "a/upper/data/message").read_text() == "first"
    assert (place(disk) / "b/c:d,e/upper/data/message").read_text() == "second"
    assert second.facts.upperdir == os.path.realpath(place(disk) / "b/c:d,e/upper")


@pytest.mark.parametrize("path", ["/a//b", "a/./b/", "./a/b/."])
def test_a_place_may_be_spelled_in_several_ways(bench: Bench, run_dir: Path, path: str) -> None:
    lower = run_dir / "lower"
    lower.mkdir(mode=0o751)
    disk = bench.disk()
    record = bench.acquire(bench.overlay(bench.acquire(bench.bind(str(lower))), upper=disk, upper_path=path))
    assert record.facts.upperdir == f"{place(disk)}/a/b/upper"
    assert place(record).stat().st_mode & 0o7777 == 0o751
    with pytest.raises(Invalid, match="lies in what is"):
        bench.acquire(bench.overlay(bench.mounted(), disk, upper=disk, upper_path=f"c/{path}"))
    assert not (place(disk) / "c").exists()


def test_a_lock_that_somebody_keeps_is_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upper, "PATIENCE", 0.05)
    disk = bench.disk()
    (place(disk) / "a/upper").mkdir(parents=True)
    directory = os.open(place(disk) / "a/upper", os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_SH)
        with pytest.raises(Conflict, match="keeps a lock on '/a/upper'"):
            bench.acquire(bench.overlay(bench.mounted(), upper=disk, upper_path="a"))
    finally:
        os.close(directory)
    bench.acquire(bench.overlay(bench.mounted(), upper=disk, upper_path="a"))


def test_its_root_looks_like_its_lowers_until_it_was_changed(bench: Bench, run_dir: Path) -> None:
    lower, disk = run_dir / "lower", bench.disk()
    lower.mkdir()
    lower.chmod(0o1750)
    for found, changed in ((0o1750, 0o700), (0o700, 0o755)):
        record = bench.acquire(bench.overlay(bench.acquire(bench.bind(str(lower))), upper=disk))
        assert place(record).stat().st_mode & 0o7777 == found
        place(record).chmod(changed)
        bench.release(record)


def test_a_tmpfs_bounds_what_is_written(bench: Bench) -> None:
    record = bench.acquire(bench.overlay(bench.mounted(), upper=bench.acquire(bench.tmpfs("1m"))))
    with pytest.raises(OSError, match="No space left"):
        (place(record) / "large").write_bytes(bytes(2 << 20))


def test_an_upper_that_is_read_only_is_refused(bench: Bench) -> None:
    """As the planner sees it coming in most cases; not when the file under a loop device cannot be written."""
    with pytest.raises(Invalid, match="read-only, and an upper is written") as refusal:
        bench.acquire(bench.overlay(bench.mounted(), upper=bench.mounted("ext4")))
    assert refusal.value.fields["path"] == "$.upper"


def test_a_failed_overlay_takes_away_what_it_made_in_the_upper(bench: Bench) -> None:
    disk, lower = bench.disk(), bench.mounted()
    before = sorted(place(disk).rglob("*"))
    with pytest.raises(Invalid, match=r"lies in what is \$.lower\[1\]") as refusal:
        bench.acquire(bench.overlay(lower, disk, upper=disk, upper_path="/a/b"))
    assert refusal.value.fields["path"] == "$.upper"
    assert sorted(place(disk).rglob("*")) == before


@pytest.mark.parametrize("name", ["a", "a/upper", "a/work"])
def test_the_way_to_the_upper_goes_over_no_link(bench: Bench, run_dir: Path, name: str) -> None:
    outside, disk = run_dir / "outside", bench.disk()
    outside.mkdir()
    spot = place(disk) / name
    spot.parent.mkdir(exist_ok=True)
    spot.symlink_to(outside)
    with pytest.raises(Invalid, match=f"'{spot.name}' in {disk.key} leads over something") as refusal:
        bench.acquire(bench.overlay(bench.mounted(), upper=disk, upper_path="/a"))
    assert refusal.value.fields["path"] == "$.upper_path"
    assert not list(outside.iterdir())


def test_a_full_upper_is_named(bench: Bench) -> None:
    full = bench.disk()
    with pytest.raises(OSError, match="No space left"):
        (place(full) / "large").write_bytes(bytes(64 << 20))
    with pytest.raises(Exhausted, match=f"{full.key} is full") as refusal:
        bench.acquire(bench.overlay(bench.mounted(), upper=full))
    assert refusal.value.fields["path"] == "$.upper"
    assert not (place(full) / "upper").exists()


def test_two_overlays_on_one_upper_are_refused_whatever_mount_it_is_reached_by(bench: Bench, run_dir: Path) -> None:
    lower = bench.mounted()
    first, second = (bench.acquire(bench.bind(str(run_dir))) for _ in range(2))
    record = bench.acquire(bench.overlay(lower, upper=first, upper_path="a:b,c\\d"))
    with pytest.raises(Conflict, match="writes to this place") as refusal:
        bench.acquire(bench.overlay(lower, upper=second, upper_path="a:b,c\\d"))
    assert refusal.value.fields["holders"] == [f"the mount at {os.path.realpath(place(record))}"]
    bench.release(record)
    bench.acquire(bench.overlay(lower, upper=second, upper_path="a:b,c\\d"))


def test_an_upper_of_more_lowers_than_a_page_holds_may_have_odd_characters(bench: Bench, run_dir: Path) -> None:
    binds = []
    for number in range(90):
        (run_dir / f"lower-{number}").mkdir()
        binds.append(bench.acquire(bench.bind(str(run_dir / f"lower-{number}"))))
    record = bench.acquire(bench.overlay(*binds, upper=bench.disk(), upper_path="a:b,c\\d"))
    (place(record) / "written").touch()
    assert Path(record.facts.upperdir or "", "written").exists()


# ---------------------------------------------------------------------------------------------------- volatile


def test_a_volatile_upper_is_written_out_when_its_overlay_goes(bench: Bench) -> None:
    lower, disk = bench.mounted(), bench.disk()
    for text in ("first", "second"):
        record = bench.acquire(bench.overlay(lower, upper=disk, volatile=True))
        assert is_volatile(record)
        message(record).write_text(text)
        bench.release(record)
    assert (place(disk) / "upper/data/message").read_text() == "second"


def test_a_volatile_upper_that_was_lost_is_refused_with_a_remedy(bench: Bench) -> None:
    lower, disk = bench.mounted(), bench.disk()
    marker = place(disk) / "a" / "work" / VOLATILE
    marker.mkdir(parents=True)
    with pytest.raises(Invalid, match=f"remove the directory /{marker.relative_to(place(disk))}") as refusal:
        bench.acquire(bench.overlay(lower, upper=disk, upper_path="a"))
    assert refusal.value.fields["path"] == "$.upper"
    marker.rmdir()
    bench.acquire(bench.overlay(lower, upper=disk, upper_path="a"))


def test_the_mark_of_a_volatile_upper_is_the_kernels(bench: Bench) -> None:
    """So that we look for what it really makes."""
    disk = bench.disk()
    bench.acquire(bench.overlay(bench.mounted(), upper=disk, volatile=True))
    assert (place(disk) / "work" / VOLATILE).is_dir()


# ----------------------------------------------------------------------------------------------------- options

ASKED: list[dict[str, Any]] = [
    {"redirect_dir": "on"}, {"redirect_dir": "off"}, {"redirect_dir": "follow"}, {"redirect_dir": "nofollow"},
    {"metacopy": True}, {"metacopy": False}, {"index": True}, {"index": False}, {"userxattr": True},
    {"xino": "on"}, {"xino": "off"}, {"volatile": True}, {"volatile": False},
]  # fmt: skip


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_options_are_what_the_kernel_then_has(bench: Bench, asked: dict[str, Any]) -> None:
    """It shows what is not its default; on this machine `off` is that of most."""
    record = bench.acquire(bench.overlay(bench.mounted(), upper=bench.disk(), **asked))
    [(name, value)] = asked.items()
    if name == "volatile":
        assert is_volatile(record) is value
        return
    shown = f"{name}={value}" if isinstance(value, str) else f"{name}=on" if name != "userxattr" else name
    assert (shown in standing(record).super_options.split(",")) is (value not in (False, "off", "follow"))


def test_an_option_that_a_layer_cannot_do_is_refused_and_not_ignored(bench: Bench) -> None:
    """Overlays have no file handles, of which `index` is made."""
    disk = bench.disk()
    before = sorted(place(disk).rglob("*"))
    with pytest.raises(Invalid, match="cannot do 'index'") as refusal:
        bench.acquire(bench.overlay(bench.layered(), upper=disk, upper_path="/a", index=True))
    assert refusal.value.fields["path"] == "$.options.index"
    assert sorted(place(disk).rglob("*")) == before, "what the kernel made in the work directory is gone, too"


def test_an_upper_on_an_overlay_is_refused(bench: Bench) -> None:
    """By the kernel with no word."""
    with pytest.raises(Invalid, match="no upper can be on one") as refusal:
        bench.acquire(bench.overlay(bench.mounted(), upper=bench.layered()))
    assert refusal.value.fields["path"] == "$.upper"


def test_combinations_that_the_kernel_refuses_are_refused_before(bench: Bench) -> None:
    lowers, upper = [bench.mounted(), bench.mounted("erofs")], bench.disk()
    choices = {
        "metacopy": (None, True, False),
        "redirect_dir": (None, "on", "off", "follow", "nofollow"),
        "index": (None, True),
        "xino": (None, "on"),
        "userxattr": (False, True),
    }
    for number, values in enumerate(itertools.product(*choices.values())):
        asked = dict(zip(choices, values, strict=True))
        made = bench.overlay(*lowers, upper=upper, upper_path=str(number), **asked)
        assert is_allowed(made) == is_taken(bench, made), asked


def is_allowed(made: Made) -> bool:
    try:
        rules.check(made.record.spec)
    except Invalid:
        return False
    return True


def is_taken(bench: Bench, made: Made) -> bool:
    try:
        bench.release(bench.acquire(made))
    except Problem:
        return False
    return True
