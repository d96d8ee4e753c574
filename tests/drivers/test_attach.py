"""The kind `attach`: what it mounts, what it refuses, and what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from drivers.bench import Bench, place, standing, traces
from imageapi.drivers import filesystem_options
from imageapi.drivers.mount_options import Option
from imageapi.errors import Conflict, Invalid, Problem, Unsupported
from imageapi.linux import libc, mount, mountinfo
from imageapi.linux.libc import Explained
from imageapi.records import AnyRecord
from imageapi.spec import Attach, Attachment, Loopback
from lab import images
from lab.elsewhere import mount_namespace
from lab.partitions import add_partition
from tools.images import Format

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("format", ["squashfs", "erofs", "ext4"])
def test_a_read_only_attachment_is_mounted_read_only_and_without_devices(bench: Bench, format: Format) -> None:
    record = bench.mounted(format)
    assert (place(record) / "data/message").read_text() == "written when the image was made\n"
    assert {"ro", "nodev"} <= set(standing(record).options.split(","))


def test_options_reach_the_kernel(bench: Bench) -> None:
    on = bench.acquire(bench.loopback("ext4", ro=False))
    record = bench.acquire(bench.attach(on, "ext4", ["noatime,nosuid", "errors=continue", "data=journal", "noexec"]))
    found = standing(record)
    assert {"rw", "noatime", "nosuid", "noexec", "nodev"} <= set(found.options.split(","))
    assert "data=journal" in found.super_options
    assert found.source == on.facts.device_file


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["ro", "frobnicate=7"], "option 'frobnicate=7': ext4 has no such option"),
        (["ro", "errors=panic"], "option 'errors=panic': its value must be continue or remount-ro"),
        (["ro", "nolaod"], "did you mean 'noload'?"),
        (["ro", "noatiem"], "did you mean 'noatime'?"),
        (["ro", "journal_dev=259"], "names another device of the host"),
        (["ro", "noatime,dev"], "device nodes of an image mean nothing"),
        (["ro", "offset=1048576"], "give the number of the partition"),
    ],
)
def test_an_option_that_is_not_in_the_list_is_refused_with_its_place(
    bench: Bench, options: list[str], words: str
) -> None:
    on = bench.acquire(bench.loopback("ext4"))
    with pytest.raises(Invalid) as refusal:
        bench.acquire(bench.attach(on, "ext4", options))
    assert words in refusal.value.message
    assert refusal.value.fields["path"] == "$.mount_options[1]"


def test_an_option_the_kernel_refuses_is_named(bench: Bench) -> None:
    """Here since it is only for the journal of a file system that has one."""
    on = bench.acquire(bench.loopback("ext4", ro=False))
    with pytest.raises(Problem, match="journal_async_commit") as refusal:
        bench.acquire(bench.attach(on, "ext4", ["noatime", "data=ordered", "journal_async_commit"]))
    assert refusal.value.code == 422


def test_more_options_than_the_kernel_takes_are_refused(bench: Bench) -> None:
    on = bench.acquire(bench.loopback("ext4", ro=False))
    with pytest.raises(Invalid, match="longer than the kernel takes") as refusal:
        bench.acquire(bench.attach(on, "ext4", ["commit=5"] * 500))
    assert refusal.value.fields["path"] == "$.mount_options"


@pytest.mark.parametrize("fs_type", ["squashfs", "erofs", "ext4", "xfs", "btrfs"])
def test_every_flag_that_is_listed_is_one_of_the_kernels(fs_type: str) -> None:
    """As its own parser sees it, which is asked without a device. Names that it no longer has are its affair: of those
    this kernel is built without it says the same."""
    taken = {name for name, option in listed(fs_type).items() if is_known(fs_type, name, option)}
    assert len(taken) > 0.9 * len(listed(fs_type)) - 1


def listed(fs_type: str) -> dict[str, Option]:
    table = filesystem_options.table(fs_type)
    return {name: option for name, option in table.items() if not option.refused and "context" not in name}


def is_known(fs_type: str, name: str, option: Option) -> bool:
    """Whether the kernel's parser knows the name; what it makes of the value is another matter."""
    context = mount.fsopen(fs_type)
    try:
        values = option.values
        value = None if values is None else str(values[0]) if isinstance(values, range | tuple) else "1"
        mount.fsconfig(context, mount.FSCONFIG_SET_FLAG if value is None else mount.FSCONFIG_SET_STRING, name, value)
    except Explained as error:
        return "Unknown parameter" not in error.detail
    finally:
        os.close(context)
    return True


@pytest.mark.parametrize(("fs_type", "size"), [("xfs", "300M"), ("btrfs", "128M")])
def test_other_disks_are_written_and_read_again(bench: Bench, run_dir: Path, fs_type: str, size: str) -> None:
    image = images.formatted(run_dir / "disk", fs_type, size)
    writable = bench.acquire(bench.loopback(path=str(image), ro=False))
    record = bench.acquire(bench.attach(writable, fs_type))
    (place(record) / "file").write_text("kept")
    bench.release(record)
    bench.release(writable)
    on = bench.acquire(bench.loopback(path=str(image), ro=True))
    assert (place(bench.acquire(bench.attach(on, fs_type))) / "file").read_text() == "kept"


def test_a_copy_of_what_is_mounted_is_a_conflict_with_a_remedy(bench: Bench, run_dir: Path) -> None:
    image = images.formatted(run_dir / "disk", "xfs", "300M")
    shutil.copy(image, run_dir / "copy")
    first, second = (bench.acquire(bench.loopback(path=str(run_dir / name), ro=False)) for name in ("disk", "copy"))
    bench.acquire(bench.attach(first, "xfs"))
    with pytest.raises(Conflict, match="nouuid"):
        bench.acquire(bench.attach(second, "xfs"))
    bench.acquire(bench.attach(second, "xfs", ["nouuid"]))


def test_a_type_the_kernel_lacks_is_unsupported(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    with pytest.raises(Unsupported, match=r"no file system 'zfs'.*'modprobe zfs' must succeed.*squashfs"):
        bench.acquire(bench.attach(on, "zfs"))


def test_a_type_without_a_device_is_refused(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    with pytest.raises(Invalid, match="no file system of block devices"):
        bench.acquire(bench.attach(on, "tmpfs"))


def test_another_type_than_the_image_has_names_both(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    with pytest.raises(Invalid, match="type squashfs, not ext4") as refusal:
        bench.acquire(bench.attach(on, "ext4"))
    assert refusal.value.fields["path"] == "$.fs_type"


def test_a_truncated_image_says_how_much_is_missing(bench: Bench, run_dir: Path) -> None:
    image = run_dir / "cut.img"
    shutil.copyfile(images.small_image("squashfs"), image)
    os.truncate(image, image.stat().st_size - 8192)
    on = bench.acquire(bench.loopback(path=str(image)))
    with pytest.raises(Invalid, match=r"truncated: it needs [0-9]+ bytes and has [0-9]+, [0-9]+ too few"):
        bench.acquire(bench.attach(on))


def test_a_damaged_image_is_refused_in_the_kernels_words(bench: Bench, run_dir: Path) -> None:
    image = run_dir / "damaged.img"
    shutil.copyfile(images.small_image("squashfs"), image)
    with image.open("r+b") as file:
        file.seek(48)  # the table positions that follow bytes_used in the superblock
        file.write(b"\xa5" * 48)
    on = bench.acquire(bench.loopback(path=str(image)))
    before = traces(bench.site)
    with pytest.raises(Problem) as refusal:
        bench.acquire(bench.attach(on))
    assert refusal.value.code == 422
    assert traces(bench.site) == before


def test_a_journal_that_must_be_replayed_on_a_read_only_device_has_a_remedy(bench: Bench, run_dir: Path) -> None:
    image = run_dir / "dirty.img"
    shutil.copyfile(images.small_image("ext4"), image)
    subprocess.run(["debugfs", "-w", "-R", "feature needs_recovery", image], check=True, capture_output=True)
    on = bench.acquire(bench.loopback(path=str(image)))
    with pytest.raises(Invalid, match="noload"):
        bench.acquire(bench.attach(on, "ext4"))
    assert (place(bench.acquire(bench.attach(on, "ext4", ["noload"]))) / "data").is_dir()


def test_the_same_device_with_other_options_is_a_conflict(bench: Bench) -> None:
    on = bench.acquire(bench.loopback("ext4", ro=False))
    first = bench.acquire(bench.attach(on, "ext4"))
    with pytest.raises(Conflict) as refusal:
        bench.acquire(bench.attach(on, "ext4", ["ro"]))
    assert refusal.value.fields["holders"] == [f"the mount at {os.path.realpath(place(first))}"]


def test_a_file_system_mounted_twice_is_released_one_by_one(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    first, second = bench.acquire(bench.attach(on)), bench.acquire(bench.attach(on))
    bench.release(first)
    assert (place(second) / "data").is_dir()
    bench.release(second)


def test_a_detached_tree_keeps_it_until_it_is_closed(bench: Bench) -> None:
    """As a container's root does; the mount is gone then, and the release that is tried again must still see it."""
    record = bench.mounted()
    tree = mount.open_tree(libc.AT_FDCWD, str(place(record)), mount.OPEN_TREE_CLONE | mount.OPEN_TREE_CLOEXEC)
    try:
        for _ in range(2):
            with pytest.raises(Conflict, match="in use"):
                bench.release(record)
    finally:
        os.close(tree)
    bench.release(record)


def test_a_copy_in_another_namespace_goes_with_the_mountpoint(bench: Bench) -> None:
    record = bench.mounted()
    dev = standing(record).dev
    with mount_namespace() as pid:
        assert mountinfo.holders(dev) == [pid]
        bench.release(record)
        assert mountinfo.holders(dev) == []


def test_whether_a_mount_is_read_only_at_planning_time(bench: Bench) -> None:
    driver = bench.driver(bench.attach(bench.plan(Attachment(kind="loopback")).record).record)
    nested = Attachment(kind="loopback", loopback=Loopback("/image", "root", ro=True))
    writable = Attachment(kind="loopback", loopback=Loopback("/image", "root"))
    assert driver.read_only(Attach(nested, "squashfs"))
    assert not driver.read_only(Attach(writable, "ext4"))
    assert driver.read_only(Attach(writable, "ext4", ["ro"]))
    assert not driver.read_only(Attach(writable, "ext4", ["ro", "rw"]))
    assert not driver.read_only(Attach(Attachment(id=3), "ext4"))
    assert driver.read_only(Attach(Attachment(id=3), "squashfs"))


# ------------------------------------------------------------------------------------------------ partitions


@pytest.fixture
def divided(bench: Bench, run_dir: Path) -> AnyRecord:
    """A disk with two partitions; the second has the small image."""
    content = images.small_image("squashfs").read_bytes()
    (run_dir / "disk").write_bytes(bytes(2 << 20) + content)
    on = bench.acquire(bench.loopback(path=str(run_dir / "disk"), readPartitions=True))
    assert on.facts.device_file is not None
    add_partition(on.facts.device_file, 1 << 20, 1 << 20, number=1)
    add_partition(on.facts.device_file, 2 << 20, len(content), number=2)
    return on


def test_a_partition_is_mounted_by_its_number(bench: Bench, divided: AnyRecord) -> None:
    record = bench.acquire(bench.attach(divided, partition=2))
    assert (place(record) / "data/message").exists()
    assert standing(record).source == f"{divided.facts.device_file}p2"
    with pytest.raises(Conflict):
        bench.release(divided)
    bench.release(record)
    bench.release(divided)
    assert not os.path.exists(f"{divided.facts.device_file}p2")


def test_a_partition_that_is_not_there_is_refused_with_those_that_are(bench: Bench, divided: AnyRecord) -> None:
    with pytest.raises(Invalid, match=r"has no partition 3: it has 1 \(1 MiB\), 2 \([0-9]+ MiB\)") as refusal:
        bench.acquire(bench.attach(divided, partition=3))
    assert refusal.value.fields["path"] == "$.partition"


def test_a_partition_without_its_file_system_says_so(bench: Bench, divided: AnyRecord) -> None:
    with pytest.raises(Invalid, match=r"p1 cannot be mounted as squashfs: .*nothing but zeros"):
        bench.acquire(bench.attach(divided, partition=1))


def test_partitions_that_were_not_read_are_explained(bench: Bench) -> None:
    with pytest.raises(Invalid, match="attach it with readPartitions"):
        bench.acquire(bench.attach(bench.acquire(bench.loopback()), partition=1))
    with pytest.raises(Invalid, match="no partition table"):
        bench.acquire(bench.attach(bench.acquire(bench.loopback(readPartitions=True)), partition=1))


def test_a_local_device_has_partitions_too(bench: Bench, divided: AnyRecord) -> None:
    whole = bench.acquire(bench.local(str(divided.facts.device_file)))
    assert (place(bench.acquire(bench.attach(whole, partition=2))) / "data").is_dir()
    second = bench.acquire(bench.local(f"{divided.facts.device_file}p2"))
    with pytest.raises(Invalid, match="it is a partition itself"):
        bench.acquire(bench.attach(second, partition=2))


def test_reading_the_table_of_a_local_device_again(bench: Bench) -> None:
    read = bench.acquire(bench.loopback(readPartitions=True)).facts.device_file
    bench.acquire(bench.local(str(read), readPartitions=True))
    not_read = bench.acquire(bench.loopback()).facts.device_file
    with pytest.raises(Invalid, match="no device that has partitions") as refusal:
        bench.acquire(bench.local(str(not_read), readPartitions=True))
    assert refusal.value.fields["path"] == "$.readPartitions"
