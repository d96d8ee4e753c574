"""The kind `loopback`: what it takes, what it refuses, and what it says."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path

import pytest

from drivers.bench import Bench
from drivers.exporting import ATTRIBUTES_VALID
from imageapi.drivers import block
from imageapi.errors import Conflict, Invalid, TimedOut
from imageapi.linux import killable, loop, mount
from imageapi.records import AnyRecord, Facts
from lab import fuse, images
from lab.elsewhere import mount_namespace
from lab.partitions import add_partition
from tools.images import Format

pytestmark = pytest.mark.kernel
LOOP_SET_STATUS64 = 0x4C04


def device_of(record: AnyRecord) -> str:
    assert record.facts.device_file is not None
    return record.facts.device_file


def logical_block(device: str) -> int:
    return int(Path(f"/sys/block/{os.path.basename(device)}/queue/logical_block_size").read_text())


def test_the_device_carries_our_mark(bench: Bench) -> None:
    record = bench.acquire(bench.loopback())
    state = loop.status(device_of(record))
    assert state is not None
    assert state.name == bench.site.mark(record.key)
    assert state.read_only
    assert state.direct_io


@pytest.mark.parametrize(("format", "block"), [("squashfs", 4096), ("erofs", 4096), ("ext4", 512)])
def test_the_block_is_large_where_that_cannot_harm(bench: Bench, format: Format, block: int) -> None:
    assert logical_block(device_of(bench.acquire(bench.loopback(format)))) == block


def test_a_size_that_is_no_multiple_of_4096_has_small_blocks(bench: Bench, run_dir: Path) -> None:
    image = run_dir / "odd.img"
    shutil.copyfile(images.small_image("squashfs"), image)
    os.truncate(image, image.stat().st_size + 700)
    record = bench.acquire(bench.loopback(path=str(image)))
    assert logical_block(device_of(record)) == 512
    assert record.facts.detail["cut"] == 700 - 512


def test_written_data_reach_the_file(bench: Bench, run_dir: Path) -> None:
    image = run_dir / "disk"
    image.write_bytes(bytes(1 << 20))
    record = bench.acquire(bench.loopback(path=str(image), ro=False))
    assert record.facts.detail["read_only"] is False
    with open(device_of(record), "r+b") as device:
        device.write(b"written")
    bench.release(record)
    assert image.read_bytes().startswith(b"written")


def test_a_file_on_a_read_only_file_system_is_attached_read_only(bench: Bench, run_dir: Path) -> None:
    directory = run_dir / "shut"
    directory.mkdir()
    (directory / "disk").write_bytes(bytes(1 << 20))
    read_only = bench.acquire(bench.bind(str(directory), ro=True))
    record = bench.acquire(bench.loopback_inside(read_only, "disk"))
    assert record.facts.detail["read_only"] is True


@pytest.mark.parametrize("sector", [512, 4096])
def test_the_block_is_what_a_partition_table_counts_in(bench: Bench, run_dir: Path, sector: int) -> None:
    """The table of a disk with large sectors is not seen on one with small ones, nor the other way round."""
    image = run_dir / "disk"
    image.write_bytes(bytes(sector) + b"EFI PART".ljust(1 << 20, b"\0"))
    record = bench.acquire(bench.loopback(path=str(image), readPartitions=True))
    assert logical_block(device_of(record)) == sector


@pytest.mark.parametrize("wanted", [True, False])
def test_partitions_are_scanned_when_asked_for(bench: Bench, wanted: bool) -> None:
    """Which kinds of table are known is the kernel's affair."""
    device = device_of(bench.acquire(bench.loopback(readPartitions=wanted)))
    assert Path(f"/sys/block/{os.path.basename(device)}/loop/partscan").read_text() == f"{int(wanted)}\n"
    assert logical_block(device) == (512 if wanted else 4096)


def test_a_partition_in_use_keeps_the_device(bench: Bench, run_dir: Path) -> None:
    image = run_dir / "disk"
    image.write_bytes(bytes(1 << 20) + images.small_image("squashfs").read_bytes())
    record = bench.acquire(bench.loopback(path=str(image), readPartitions=True))
    partition = add_partition(device_of(record), start=1 << 20, length=image.stat().st_size - (1 << 20))
    user = os.open(partition, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(Conflict):
            bench.release(record)
    finally:
        os.close(user)
    bench.release(record)
    assert bench.observe(record) is None


def test_a_path_in_a_mount_never_leads_out_of_it(bench: Bench, run_dir: Path) -> None:
    layered = bench.layered()
    assert layered.facts.mountpoint is not None
    inside = Path(layered.facts.mountpoint)
    outside = run_dir / "outside.img"
    outside.write_bytes(bytes(4096))
    (inside / "link").symlink_to(outside)
    with pytest.raises(Invalid, match=f"does not exist in {layered.key}"):
        bench.acquire(bench.loopback_inside(layered, "/link"))
    within = Path(f"{inside}{outside}")
    within.parent.mkdir(parents=True)
    within.write_bytes(bytes(8192))
    record = bench.acquire(bench.loopback_inside(layered, "../../../link", ro=True))
    assert record.facts.detail["backing"][1] == within.stat().st_ino


def test_what_is_no_image_is_refused_with_a_remedy(bench: Bench, run_dir: Path) -> None:
    (run_dir / "empty").touch()
    (run_dir / "short").write_bytes(b"x")
    (run_dir / "loop").symlink_to("loop")
    os.mkfifo(run_dir / "fifo")
    os.mknod(run_dir / "disk", 0o60600, os.makedev(7, 0))
    reasons = {
        "missing": "does not exist on this host",
        "empty": "is empty",
        "empty/below": "no directory",
        "short": "less than one sector",
        "loop": "circles",
        "fifo": "no regular file",
        "disk": "use the kind 'local'",
        "": "is a directory",
    }
    for name, reason in reasons.items():
        with pytest.raises(Invalid, match=reason) as refusal:
            bench.acquire(bench.loopback(path=f"{run_dir}/{name}"))
        assert refusal.value.fields["path"] == "$.path"
    with pytest.raises(Invalid, match="relative"):
        bench.acquire(bench.loopback(path="image"))


def test_a_copy_in_another_mount_namespace_keeps_it_and_is_named(bench: Bench, run_dir: Path) -> None:
    record = bench.acquire(bench.loopback())
    spot = run_dir / "spot"
    spot.mkdir()
    mount.mount(device_of(record), str(spot), "squashfs", mount.MS_RDONLY, None)
    with mount_namespace() as pid:
        mount.umount(str(spot))
        with pytest.raises(Conflict) as refusal:
            bench.release(record)
        assert refusal.value.fields["holders"] == [f"process {pid} (sleep)"]
        assert bench.observe(record) is not None
    bench.release(record)
    assert bench.observe(record) is None


def test_a_mount_of_it_here_is_named(bench: Bench, run_dir: Path) -> None:
    record = bench.acquire(bench.loopback())
    spot = run_dir / "spot"
    spot.mkdir()
    mount.mount(device_of(record), str(spot), "squashfs", mount.MS_RDONLY, None)
    try:
        with pytest.raises(Conflict) as refusal:
            bench.release(record)
    finally:
        mount.umount(str(spot))
    assert f"the mount at {os.path.realpath(spot)}" in refusal.value.fields["holders"]


def test_the_search_for_a_device_does_not_wait_for_the_dead_file_of_another(bench: Bench, tmp_path: Path) -> None:
    """It has no path any more, so that nothing tells that it is not this host's."""
    with fuse.shown(tmp_path) as image:
        other = bench.acquire(bench.loopback(path=str(image.path)))
        mount.umount(str(image.path), mount.MNT_DETACH)
        made = bench.acquire(bench.loopback())
        image.hang()
        time.sleep(ATTRIBUTES_VALID)
        found = killable.ask({"": lambda: block.find_loop(bench.site.mark(made.key), None)}, 10)
        image.work()
        assert found == {"": device_of(made)}
        bench.release(other)


def test_a_device_that_does_not_say_whose_it_is_may_be_the_one_that_is_looked_for(bench: Bench, tmp_path: Path) -> None:
    """A crash came before its record knew the device, and then its store was lost: a release must not be done with it
    as if there were none."""
    with fuse.shown(tmp_path) as image:
        record = bench.acquire(bench.loopback(path=str(image.path)))
        device = device_of(record)
        mount.umount(str(image.path), mount.MNT_DETACH)
        image.hang()
        time.sleep(ATTRIBUTES_VALID)
        record.facts = Facts()
        try:
            with pytest.raises(TimedOut, match=f"{device} on .* it is tried again"):
                bench.release(record)
            assert block.find_loop("imageapi:none", None, only="/another") is None
        finally:
            image.work()
        assert loop.status(device) is not None
        bench.release(record)
        assert loop.status(device) is None


def test_a_mounted_device_that_does_not_say_whose_it_is_holds_up_no_release(bench: Bench, tmp_path: Path) -> None:
    """What is half made is mounted nowhere."""
    with fuse.shown(tmp_path) as image:
        other = bench.acquire(bench.loopback(path=str(image.path)))
        mounted = bench.acquire(bench.attach(other))
        mount.umount(str(image.path), mount.MNT_DETACH)
        image.hang()
        time.sleep(ATTRIBUTES_VALID)
        nothing = killable.ask({"": lambda: block.find_loop("imageapi:none", None)}, 10)
        image.work()
        assert nothing == {"": None}
        bench.release(mounted)
        bench.release(other)


def test_one_that_was_half_made_on_a_file_of_fuse_is_found_again(bench: Bench, tmp_path: Path) -> None:
    """A crash came before its record knew the device."""
    with fuse.shown(tmp_path) as image:
        record = bench.acquire(bench.loopback(path=str(image.path)))
        device = device_of(record)
        record.facts = Facts()
        bench.release(record)
        assert loop.status(device) is None


def test_a_device_that_was_given_to_another_is_left_alone(bench: Bench) -> None:
    """As after a reboot, or when an administrator detached it by hand: there is one of that number, not ours."""
    record = bench.acquire(bench.loopback())
    device = device_of(record)
    rename(device, "a stranger's")
    assert bench.observe(record) is None
    bench.release(record)
    state = loop.status(device)
    assert state is not None
    assert state.name == "a stranger's"
    loop.detach(device)


def test_a_device_that_the_kernel_has_made_another_since_is_not_even_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file may be on a server that is dead."""
    record = bench.acquire(bench.loopback())
    record.facts.detail["sequence"] -= 1
    with monkeypatch.context() as patched:
        patched.delattr(loop, "status")
        assert bench.observe(record) is None
    record.facts.detail["sequence"] += 1


def rename(device: str, name: str) -> None:
    """Change `lo_file_name`, as LOOP_SET_STATUS64 can: the 64 bytes at 56 of struct loop_info64."""
    with open(device, "rb") as file:
        info = fcntl.ioctl(file, loop.LOOP_GET_STATUS64, bytes(232))
        fcntl.ioctl(file, LOOP_SET_STATUS64, info[:56] + name.encode().ljust(64, b"\0") + info[120:])


def test_what_it_says_for_the_planner(bench: Bench) -> None:
    read_only, writable = bench.loopback().record, bench.loopback(ro=False).record
    driver = bench.driver(read_only)
    assert driver.read_only(read_only.definition)
    assert not driver.read_only(writable.definition)
    assert not driver.identities(writable.definition)
    assert not driver.forced(writable.definition)
