"""The kind `attach`: what it mounts, what it refuses, and what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from drivers.bench import Bench, place, standing, traces
from imageapi.errors import Conflict, Invalid, Problem, Unsupported
from imageapi.linux import libc, mount, mountinfo
from imageapi.spec import Attach, Attachment, Loopback
from lab import images
from lab.elsewhere import mount_namespace
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


def test_an_option_the_kernel_refuses_is_named(bench: Bench) -> None:
    on = bench.acquire(bench.loopback("ext4"))
    with pytest.raises(Invalid, match=r"refuses the option 'frobnicate=7': .*Unknown parameter") as refusal:
        bench.acquire(bench.attach(on, "ext4", ["ro", "frobnicate=7"]))
    assert refusal.value.fields["path"] == "$.mount_options[1]"


def test_a_value_the_kernel_refuses_is_named(bench: Bench) -> None:
    on = bench.acquire(bench.loopback("ext4"))
    with pytest.raises(Invalid, match="errors=perhaps") as refusal:
        bench.acquire(bench.attach(on, "ext4", ["errors=perhaps"]))
    assert refusal.value.fields["path"] == "$.mount_options[0]"


def test_a_type_the_kernel_lacks_is_unsupported(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    with pytest.raises(Unsupported, match="no file system 'zfs'"):
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
