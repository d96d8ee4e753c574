"""Loop devices, and what the kernel does with them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imageapi.errors import Exhausted, from_oserror
from imageapi.linux import loop, mount
from lab import images
from lab.elsewhere import mount_namespace
from linux.conftest import Attach

pytestmark = pytest.mark.kernel
LOOP_CTL_REMOVE = 0x4C81


def state_of(device: str) -> loop.Status:
    state = loop.status(device)
    assert state is not None
    return state


def test_the_name_comes_back(attach: Attach) -> None:
    device = attach(name="imageapi:00000000:attach/7")
    image = images.small_image("squashfs").stat()
    state = state_of(device)
    assert state.name == "imageapi:00000000:attach/7"
    assert state.backing == (image.st_dev, image.st_ino)
    assert state.read_only
    assert loop.backing_path(device) == str(images.small_image("squashfs").resolve())


def test_a_name_has_at_most_63_bytes(attach: Attach) -> None:
    assert state_of(attach(name="n" * 63)).name == "n" * 63
    with pytest.raises(OSError, match="63 bytes") as refusal:
        attach(name="n" * 64)
    assert refusal.value.errno == errno.ENAMETOOLONG


def test_marked_finds_what_begins_with_the_prefix(attach: Attach) -> None:
    prefix = f"imageapi:{os.getpid():x}"
    first, second = attach(name=f"{prefix}:1"), attach(name=f"{prefix}:12")
    attach(name="another")
    assert loop.marked(prefix) == {f"{prefix}:1": first, f"{prefix}:12": second}


def test_marked_looks_at_no_more_than_it_is_to(attach: Attach) -> None:
    prefix = f"imageapi:{os.getpid():x}"
    seen = attach(name=f"{prefix}:seen")
    attach(name=f"{prefix}:left-out")
    assert loop.marked(prefix, among=[seen]) == {f"{prefix}:seen": seen}


def test_direct_io_saves_the_second_copy(attach: Attach) -> None:
    device = attach()
    assert state_of(device).direct_io
    loop.set_direct_io(device, False)
    assert not state_of(device).direct_io
    assert not state_of(attach(direct_io=False)).direct_io


def test_a_file_that_cannot_do_direct_io_is_attached_all_the_same(attach: Attach, spot: Path) -> None:
    """A squashfs has none."""
    outer = attach()
    mount.mount(outer, str(spot), "squashfs", mount.MS_RDONLY, None)
    try:
        device = attach(spot / "bin/busybox")
        assert not state_of(device).direct_io
        loop.detach(device)
    finally:
        mount.umount(str(spot))


@pytest.mark.parametrize("block", [512, 4096])
def test_the_block_size_is_what_was_asked_for(attach: Attach, block: int) -> None:
    name = os.path.basename(attach(block_size=block))
    assert Path(f"/sys/block/{name}/queue/logical_block_size").read_text() == f"{block}\n"


def test_large_blocks_break_a_file_system_with_small_ones(attach: Attach, spot: Path) -> None:
    """The small ext4 has blocks of 1 KiB."""
    device = attach(images.small_image("ext4"), block_size=4096)
    with pytest.raises(OSError, match="Invalid argument"):
        mount.mount(device, str(spot), "ext4", mount.MS_RDONLY, None)
    mount.mount(attach(images.small_image("ext4")), str(spot), "ext4", mount.MS_RDONLY, None)
    mount.umount(str(spot))


def test_many_at_once_get_a_device_each(attach: Attach) -> None:
    """LOOP_CTL_GET_FREE offers all of them the same one."""
    with ThreadPoolExecutor(16) as pool:
        devices = list(pool.map(lambda number: attach(name=f"racer/{number}"), range(32)))
    assert len(set(devices)) == 32
    assert [state_of(device).name for device in devices] == [f"racer/{number}" for number in range(32)]


def test_a_free_device_that_somebody_keeps_open_is_passed_over(attach: Attach) -> None:
    kept = attach()
    loop.detach(kept)
    user = os.open(kept, os.O_RDONLY | os.O_EXCL)
    try:
        assert attach() != kept
    finally:
        os.close(user)


@pytest.mark.parametrize(("lacking", "remedy"), [(errno.ENOSPC, "losetup -a"), (errno.EBUSY, "ask again")])
def test_a_host_without_a_free_device_says_what_to_do(
    attach: Attach, monkeypatch: pytest.MonkeyPatch, lacking: int, remedy: str
) -> None:
    """No device is offered, or somebody else takes each."""
    request = loop.LOOP_CTL_GET_FREE if lacking == errno.ENOSPC else loop.LOOP_CONFIGURE
    asked = fcntl.ioctl

    def refuse(descriptor: int, number: int, *more: Any) -> Any:
        if number == request:
            raise OSError(lacking, os.strerror(lacking))
        return asked(descriptor, number, *more)

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(OSError, match="no free loop device") as refusal:
        attach()
    problem = from_oserror(refusal.value, "attaching")
    assert isinstance(problem, Exhausted)
    assert remedy in problem.message


@pytest.fixture
def spare() -> Iterator[int]:
    """The number of a loop device that nobody else on this machine was offered, and which goes again."""
    number = 700 + os.getpid() % 300
    with open("/dev/loop-control", "rb") as control:
        fcntl.ioctl(control, loop.LOOP_CTL_ADD, number)
        yield number
        fcntl.ioctl(control, LOOP_CTL_REMOVE, number)


def test_the_node_is_made_where_none_is(spare: int) -> None:
    os.unlink(f"/dev/loop{spare}")
    path = loop._node(spare)
    try:
        found = os.stat(path)
        assert stat.S_ISBLK(found.st_mode)
        assert found.st_rdev == os.makedev(7, spare)
    finally:
        os.unlink(path)  # not the kernel's own, so it does not take it away


def test_a_node_of_something_else_is_not_taken(spare: int) -> None:
    path = f"/dev/loop{spare}"
    os.unlink(path)
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    try:
        with pytest.raises(OSError, match="not the node") as refusal:
            loop._node(spare)
        assert refusal.value.errno == errno.ENODEV
    finally:
        os.unlink(path)


def test_detach_is_idempotent_and_leaves_another_name_alone(attach: Attach) -> None:
    device = attach(name="mine")
    loop.detach(device, "yours")
    assert state_of(device).name == "mine"
    loop.detach(device, "mine")
    loop.detach(device, "mine")
    assert loop.status(device) is None
    loop.detach("/dev/loop4095")


def test_detach_refuses_what_is_in_use(attach: Attach, spot: Path) -> None:
    device = attach()
    mount.mount(device, str(spot), "squashfs", mount.MS_RDONLY, None)
    try:
        assert not loop.is_free(device)
        with pytest.raises(OSError, match="busy") as refusal:
            loop.detach(device)
        assert (refusal.value.errno, refusal.value.filename) == (errno.EBUSY, device)
    finally:
        mount.umount(str(spot))
    assert loop.is_free(device)


def test_detach_leaves_alone_what_another_has_mounted_on_the_same_device(attach: Attach, spot: Path) -> None:
    """A mounted device tells nobody its name who wants it for himself alone."""
    device = attach(name="others")
    state = state_of(device)
    assert state.sequence is not None
    mount.mount(device, str(spot), "squashfs", mount.MS_RDONLY, None)
    try:
        loop.detach(device, "mine", state.sequence - 1)
        assert state_of(device) == state
        with pytest.raises(OSError, match="busy"):
            loop.detach(device, "others", state.sequence)
    finally:
        mount.umount(str(spot))


def test_detach_does_not_say_done_while_it_is_only_going_to_be(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    """LOOP_CLR_FD succeeds, and the device stays until its last opener closes it."""
    device = attach()
    user = os.open(device, os.O_RDONLY)
    monkeypatch.setattr(loop, "_DETACH_SECONDS", 0.05)
    try:
        with pytest.raises(OSError, match="last opener") as refusal:
            loop.detach(device)
        assert refusal.value.errno == errno.EBUSY
        assert loop.status(device) is not None
    finally:
        os.close(user)
    assert loop.status(device) is None


def test_umount_here_does_not_free_it_while_another_namespace_holds_a_copy(attach: Attach, spot: Path) -> None:
    device = attach()
    mount.mount(device, str(spot), "squashfs", mount.MS_RDONLY, None)
    with mount_namespace():
        mount.umount(str(spot))
        assert not loop.is_free(device)
        with pytest.raises(OSError, match="busy"):
            loop.detach(device)
        assert loop.status(device) is not None
        spot.rmdir()
        assert loop.is_free(device)


def test_another_file_can_be_put_under_a_mount(attach: Attach, spot: Path, run_dir: Path) -> None:
    copy = run_dir / "copy"
    shutil.copyfile(images.small_image("squashfs"), copy)
    device = attach(copy)
    mount.mount(device, str(spot), "squashfs", mount.MS_RDONLY, None)
    try:
        with open(images.small_image("squashfs"), "rb") as file:
            loop.change_file(device, file.fileno(), "another", lambda: True)
        copy.write_bytes(b"")
        assert (spot / "data/message").read_text() == "written when the image was made\n"
        assert state_of(device).backing[1] == images.small_image("squashfs").stat().st_ino
    finally:
        mount.umount(str(spot))


def test_another_file_must_have_the_same_size(attach: Attach) -> None:
    with open(images.small_image("erofs"), "rb") as file, pytest.raises(OSError, match="Invalid") as refusal:
        loop.change_file(attach(), file.fileno(), "another", lambda: True)
    assert refusal.value.errno == errno.EINVAL


def test_no_file_is_put_under_a_device_that_is_anothers_by_now(attach: Attach) -> None:
    device = attach()
    before = state_of(device)
    with open(images.small_image("squashfs"), "rb") as file, pytest.raises(OSError, match="another's") as refusal:
        loop.change_file(device, file.fileno(), "ours", lambda: False)
    assert refusal.value.errno == errno.ENXIO
    assert state_of(device) == before


def test_the_tail_that_fills_no_sector_is_cut(attach: Attach, run_dir: Path) -> None:
    (run_dir / "odd").write_bytes(bytes(1024 + 511))
    device = attach(run_dir / "odd")
    fd = os.open(device, os.O_RDONLY)
    try:
        assert os.lseek(fd, 0, os.SEEK_END) == 1024
    finally:
        os.close(fd)
