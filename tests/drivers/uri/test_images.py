"""Images in memory: what the format says is what is mounted, once in memory, and gone when it is released."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from drivers.bench import Bench
from imageapi.drivers.uri import room
from imageapi.errors import Exhausted, Invalid, Problem
from imageapi.linux import loop, memory, mount, mountinfo
from imageapi.records import AnyRecord, Facts
from lab import images
from lab.archives import Member, archive
from lab.web import Web
from tools.images import Format

pytestmark = pytest.mark.kernel

FORMATS = get_args(Format)
NOISE = random.Random(5).randbytes(8 << 20)


def refused(bench: Bench, path: Path | str, kind: type[Problem] = Invalid, **options: Any) -> Problem:
    with pytest.raises(kind) as refusal:
        bench.acquire(bench.uri(f"file://{path}", **options))
    assert os.listdir(bench.site.mounts_dir) == []
    assert loop.marked(bench.site.mark_prefix) == {}
    return refusal.value


def copied(bench: Bench, format: Format, change: Callable[[bytearray], None] = lambda data: None) -> Path:
    """The small image of that format in the test's own place, changed."""
    data, file = bytearray(images.small_image(format).read_bytes()), Path(bench.site.run_dir, "image")
    change(data)
    file.write_bytes(data)
    return file


def mounted(bench: Bench, record: AnyRecord) -> mountinfo.Mount:
    [found] = mountinfo.stack(record.facts.mountpoint or "")
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_is_mounted_read_only(bench: Bench, web: Web, format: Format) -> None:
    address = web.put("/image", images.small_image(format).read_bytes(), breaks=[300_000])
    record = bench.acquire(bench.uri(address, format=format))
    assert Path(record.facts.mountpoint or "", "bin/busybox").stat().st_size > 100_000
    found = mounted(bench, record)
    assert (found.fstype, found.source) == (format, record.facts.detail["device"])
    assert {"ro", "nodev", "nosuid"} <= set(found.options.split(","))
    assert record.facts.detail["staging"] == mount.MOUNT_ATTR_NOSUID
    state = loop.status(found.source)
    assert state is not None
    assert (state.name, state.read_only) == (bench.site.mark(record.key), True)


def test_a_tar_is_in_a_tmpfs_that_carries_our_mark(bench: Bench) -> None:
    file = Path(bench.site.run_dir, "a.tar")
    file.write_bytes(archive(Member("a")))
    record = bench.acquire(bench.uri(f"file://{file}", max_size=1 << 20))
    found = mounted(bench, record)
    assert (found.fstype, found.source) == ("tmpfs", bench.site.mark(record.key))
    assert {"nodev", "nosuid"} <= set(found.options.split(","))
    assert record.facts.detail["staging"] == mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NODEV
    assert os.statvfs(record.facts.mountpoint or "").f_blocks * 4096 == 1 << 20


@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("there", FORMATS)
def test_the_format_must_be_that_of_the_image(bench: Bench, asked: Format, there: Format) -> None:
    if asked == there:
        return
    problem = refused(bench, copied(bench, there), format=asked)
    assert f"it holds a file system of type {there}, not {asked}" in problem.message
    assert problem.fields["path"] == "$.format"


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_is_no_archive(bench: Bench, format: Format) -> None:
    problem = refused(bench, copied(bench, format))
    assert "an image needs its format" in problem.message
    assert f"it holds a file system of type {format}" in problem.message


def test_an_archive_is_no_image(bench: Bench) -> None:
    file = Path(bench.site.run_dir, "a.tar.gz")
    file.write_bytes(archive(Member("a", NOISE), compression="gz"))
    assert "it is gzip data" in refused(bench, file, format="squashfs").message


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_that_is_cut(bench: Bench, format: Format) -> None:
    def cut(data: bytearray) -> None:
        del data[-40_000:]

    assert f"its {format} file system is truncated" in refused(bench, copied(bench, format, cut), format=format).message


def test_an_image_that_the_kernel_refuses_is_told_in_its_words(bench: Bench) -> None:
    def spoil(data: bytearray) -> None:
        data[28:30] = b"\x09\x00"  # the major version of a squashfs

    message = refused(bench, copied(bench, "squashfs", spoil), format="squashfs").message
    assert "the kernel does not mount it as squashfs: " in message
    assert "mismatch" in message


def test_an_ext4_that_was_not_unmounted_is_to_be_repaired(bench: Bench) -> None:
    """Its journal cannot be replayed onto what is read-only."""

    def interrupt(data: bytearray) -> None:
        data[1024 + 96] |= 0x4  # EXT4_FEATURE_INCOMPAT_RECOVER

    file = Path(bench.site.run_dir, "image")
    subprocess.run(["mkfs.ext4", "-q", "-O", "^metadata_csum", file, "8M"], check=True)
    data = bytearray(file.read_bytes())
    interrupt(data)
    file.write_bytes(data)
    assert "run e2fsck on it before it is published" in refused(bench, file, format="ext4").message


def test_what_an_image_says_of_its_size_is_looked_at_first(bench: Bench, web: Web) -> None:
    """A server that does not tell the size is not read to its end."""
    address = web.put("/image", images.small_image("ext4").read_bytes(), chunked=True)
    with pytest.raises(Invalid, match="max_size"):
        bench.acquire(bench.uri(address, format="ext4", max_size=1 << 20))


# ------------------------------------------------------------------------------------------------------ the memory


def shared_memory() -> int:
    """Bytes in all tmpfs of this host (proc_meminfo(5), Shmem)."""
    [line] = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:")]
    return int(line.split()[1]) << 10


def used(directory: str | None) -> int:
    found = os.statvfs(directory or "")
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def test_a_tar_takes_what_its_files_take(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a.tar.zst").write_bytes(archive(Member("a", NOISE), Member("b", NOISE), compression="zst"))
    record = bench.acquire(bench.uri(f"file://{tmp_path}/a.tar.zst"))
    assert used(record.facts.mountpoint) == 2 * len(NOISE)


@pytest.mark.parametrize("format", ["tar", "squashfs"])
def test_it_is_in_memory_once_and_gone_with_its_mount(bench: Bench, tmp_path: Path, format: str) -> None:
    """64 MiB: what else happens on the host at that moment is less than a quarter of it."""
    size, slack = 64 << 20, 16 << 20
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/noise").write_bytes(NOISE * 8)
    if format == "tar":
        subprocess.run(["tar", "-C", tmp_path / "tree", "-cf", tmp_path / "image", "."], check=True)
    else:
        quick = ["-quiet", "-no-progress", "-noD", "-noF", "-no-duplicates"]
        subprocess.run(["mksquashfs", tmp_path / "tree", tmp_path / "image", *quick], check=True)
    before = shared_memory()
    record = bench.acquire(bench.uri(f"file://{tmp_path}/image", format=format))
    assert abs(shared_memory() - before - size) < slack
    bench.release(record)
    assert shared_memory() - before < slack


def test_one_that_was_half_made_is_found_again(bench: Bench) -> None:
    """A crash came before its record knew the device."""
    record = bench.acquire(bench.uri(f"file://{images.small_image()}", format="squashfs"))
    record.facts = Facts(mountpoint=record.facts.mountpoint)
    bench.release(record)
    assert loop.marked(bench.site.mark_prefix) == {}


def test_a_host_without_memory_is_told_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: room.RESERVE + (1 << 20))
    image = copied(bench, "ext4")
    assert "half of the memory that is free" in refused(bench, image, Exhausted, format="ext4").message
    left = refused(bench, image, Exhausted, format="ext4", max_size=1 << 40)
    assert f"this host has {1 << 20} bytes of memory left for it" in left.message


def test_memory_that_runs_out_meanwhile_ends_it(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(archive(Member("a", NOISE * 3)))
    looks = iter([1 << 40])
    monkeypatch.setattr(memory, "available", lambda: next(looks, 0))
    assert "the memory of this host is running out" in refused(bench, tmp_path / "a.tar", Exhausted).message


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/no/such/file", "does not exist on this host"),
        ("/etc", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        ("/etc/passwd/x", "goes through something on this host that is no directory"),
    ],
)
def test_a_file_that_cannot_be_one(bench: Bench, path: str, words: str) -> None:
    problem = refused(bench, path)
    assert (problem.fields["path"], words in problem.message) == ("$.uri", True)


def test_a_file_with_a_name_that_is_written_with_percents(bench: Bench) -> None:
    Path(bench.site.run_dir, "a b?#.tar").write_bytes(archive(Member("a")))
    bench.acquire(bench.uri(f"file://localhost{bench.site.run_dir}/a%20b%3F%23.tar"))
