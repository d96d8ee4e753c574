"""Loop devices (loop(4)): a regular file as a block device.

A device carries a name of the caller's (`lo_file_name`, at most 63 bytes) by which it is found again. Looking at a
device goes through its backing file (LOOP_GET_STATUS64 asks for its attributes), so it may block where that does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from imageapi.linux import sysfs
from imageapi.linux.libc import Explained

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_PARTSCAN = 8
LO_FLAGS_DIRECT_IO = 16
LOOP_CLR_FD = 0x4C01
LOOP_SET_STATUS64 = 0x4C04
LOOP_GET_STATUS64 = 0x4C05
LOOP_CHANGE_FD = 0x4C06
LOOP_SET_DIRECT_IO = 0x4C08
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_ADD = 0x4C80
LOOP_CTL_GET_FREE = 0x4C82
LOOP_MAJOR = 7
BLKGETDISKSEQ = 0x8008_1280
"""<linux/fs.h>, from Linux 5.15 on."""
LO_NAME_SIZE = 64

_INFO = struct.Struct("=QQQQQIIII64s64s32sQQ")
"""struct loop_info64 of <linux/loop.h>."""
_CONFIG = struct.Struct(f"=II{_INFO.size}s8Q")
"""struct loop_config: the file, the block size in bytes, the info, reserved words."""
_BEHIND_ALL = 1 << 60
_ATTEMPTS = 128
_FREE = (errno.ENXIO, errno.ENOENT, errno.ENODEV)
"""What a device fails with that is free, or gone."""
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE, errno.EIO)
"""What the question whose a device is fails with when its file's file system is dead: the kernel asks that, too."""
_DETACH_SECONDS = 2.0
"""How long the last other opener (udev looking at the device) may take to close it."""


class Status(NamedTuple):
    """A loop device in use: its name, its file as (st_dev, st_ino), and where in the file it begins, in bytes.
    `sequence` is the kernel's number for what the device is now, which nothing else has before the next boot; None
    before Linux 5.15."""

    name: str
    backing: tuple[int, int]
    offset: int
    flags: int
    sequence: int | None

    @property
    def read_only(self) -> bool:
        return bool(self.flags & LO_FLAGS_READ_ONLY)

    @property
    def direct_io(self) -> bool:
        return bool(self.flags & LO_FLAGS_DIRECT_IO)


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    """A descriptor of a device; errors raised inside are about its path."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    except OSError as error:
        error.filename = error.filename or path
        raise
    finally:
        os.close(fd)


def attach(
    fd: int,
    name: str,
    *,
    read_only: bool,
    block_size: int = 512,
    direct_io: bool = True,
    partitions: bool = False,
    autoclear: bool = False,
    before: Callable[[str], None] = lambda _: None,
) -> tuple[str, Status]:
    """Attach the open file `fd` to a free loop device, in one step that nobody sees half done: its path, and what it
    is now. Where the file or its file system cannot do direct I/O it is buffered. `before` is told which device is to
    be tried, each time.

    Raises: OSError; EBUSY when other programs took every device we were offered.
    """
    flags = LO_FLAGS_READ_ONLY * read_only | LO_FLAGS_AUTOCLEAR * autoclear | LO_FLAGS_PARTSCAN * partitions
    flags |= LO_FLAGS_DIRECT_IO * direct_io
    info = _INFO.pack(*(0,) * 8, flags, _name(name), b"", b"", 0, 0)
    config = _CONFIG.pack(fd, block_size, info, *(0,) * 8)
    return _configure_free(fd, config, os.O_RDONLY if read_only else os.O_RDWR, before)


def _name(name: str) -> bytes:
    encoded = os.fsencode(name)
    if len(encoded) >= LO_NAME_SIZE:
        raise OSError(errno.ENAMETOOLONG, f"the name of a loop device has at most {LO_NAME_SIZE - 1} bytes", name)
    return encoded


def _configure_free(file: int, config: bytes, mode: int, before: Callable[[str], None]) -> tuple[str, Status]:
    """LOOP_CONFIGURE the device that LOOP_CTL_GET_FREE offers. Others are offered the same one, so whoever comes
    second (EBUSY) asks again. One that somebody keeps open exclusively is offered for ever, so it is passed over."""
    for attempt in range(_ATTEMPTS):
        device = _free_device(passed_over=max(0, attempt - _ATTEMPTS // 2))
        before(device)
        try:
            with _opened(device, mode) as fd:
                return device, _configure(fd, file, config)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.ENOENT):
                raise
            time.sleep(attempt / 10_000)
    raise _none(errno.EBUSY, "every loop device offered was taken by another program; stop what takes them, ask again")


def _configure(device: int, file: int, config: bytes) -> Status:
    fcntl.ioctl(device, LOOP_CONFIGURE, config)
    try:
        state, found = _status(device), os.fstat(file)
        if state.backing != (found.st_dev, found.st_ino):
            raise OSError(errno.EIO, "the loop device is not what it was made")
    except OSError:
        fcntl.ioctl(device, LOOP_CLR_FD)
        raise
    return state


def _free_device(*, passed_over: int) -> str:
    with _opened("/dev/loop-control", os.O_RDWR) as control:
        try:
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise _none(errno.ENOSPC, "the kernel has no more loop devices; detach some (losetup -a)") from error
            raise
        if passed_over:
            number = _another(control, number + passed_over)
    return _node(number)


def _none(number: int, remedy: str) -> Explained:
    """There is no loop device to be had."""
    error = Explained(number, "no free loop device", "/dev/loop-control")
    error.remedy = remedy
    return error


def _another(control: int, number: int) -> int:
    """The number of a device, from `number` on, that is free, or is made: a host may have any number of them."""
    while True:
        try:
            return fcntl.ioctl(control, LOOP_CTL_ADD, number)
        except FileExistsError:
            if not os.path.exists(f"/sys/block/loop{number}/loop"):
                return number
        number += 1


def _node(number: int) -> str:
    """The node of loop device `number`, made where no devtmpfs makes it.

    Raises: OSError(ENODEV) when something else has its name.
    """
    path = f"/dev/loop{number}"
    device = os.makedev(LOOP_MAJOR, number)
    if not os.path.exists(path):
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o660, device)
    found = os.stat(path)
    if not stat.S_ISBLK(found.st_mode) or found.st_rdev != device:
        raise OSError(errno.ENODEV, f"not the node of block device {LOOP_MAJOR}:{number}", path)
    return path


def status(device: str) -> Status | None:
    """What `device` is attached to, or None when it is free or gone."""
    try:
        with _opened(device, os.O_RDONLY) as fd:
            return _status(fd)
    except OSError as error:
        if error.errno in _FREE:
            return None
        raise


def _status(fd: int) -> Status:
    """Raises: OSError(ENXIO) when the device is free."""
    raw = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(_INFO.size))
    dev, inode, _, offset, _, _, _, _, flags, name, *_rest = _INFO.unpack(raw)
    return Status(os.fsdecode(name.split(b"\0")[0]), (dev, inode), offset, flags, _sequence(fd))


def _sequence(fd: int) -> int | None:
    try:
        return int.from_bytes(fcntl.ioctl(fd, BLKGETDISKSEQ, bytes(8)), "little")
    except OSError:
        return None


def detach(device: str, name: str | None = None, sequence: int | None = None) -> None:
    """Take `device` off its file, if it still carries `name` (any, when None), and wait until it is really free.
    Nothing is done to one that is free, gone, or another's. Where somebody has it mounted, or the file's file system is
    dead, the kernel tells no name: then its number for what the device is must be `sequence`.

    Raises: OSError(EBUSY) while it is mounted in any mount namespace, held by another device, or open.
    """
    try:
        with _opened(device, os.O_RDONLY | os.O_EXCL) as fd:
            if name is not None and not _is_named(fd, name, sequence):
                return
            fcntl.ioctl(fd, LOOP_CLR_FD)
    except OSError as error:
        if error.errno == errno.EBUSY and sequence is not None and attribute(device, "diskseq") != str(sequence):
            return
        if error.errno not in _FREE:
            raise
    _wait_until_free(device, name)


def _is_named(fd: int, name: str, sequence: int | None) -> bool:
    try:
        return _status(fd).name == name
    except OSError as error:
        if error.errno not in _DEAD or sequence is None:
            raise
        return _sequence(fd) == sequence


def _wait_until_free(device: str, name: str | None) -> None:
    """LOOP_CLR_FD answers at once, and the device goes when its last opener closes it."""
    deadline = time.monotonic() + _DETACH_SECONDS
    while _still_carries(device, name):
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, "still open elsewhere; it is detached when the last opener closes it", device)
        time.sleep(0.005)


def _still_carries(device: str, name: str | None) -> bool:
    """Whether `device` is attached, under this name (any, when None). A dead file system has no answer, but the device
    stands on it yet."""
    try:
        found = status(device)
    except OSError as error:
        if error.errno not in _DEAD:
            raise
        return True
    return found is not None and name in (None, found.name)


def marked(prefix: str, *, among: Iterable[str] | None = None) -> dict[str, str]:
    """The devices whose name begins with `prefix`, by name: all those in use, or `among` some, since one file that
    hangs would hang the whole search."""
    found: dict[str, str] = {}
    for device in in_use() if among is None else among:
        with contextlib.suppress(OSError):
            state = status(device)
            if state is not None and state.name.startswith(prefix):
                found[state.name] = device
    return found


def backing_path(device: str) -> str:
    """The path of the file under `device`, from sysfs, which does not touch the file; "" when it is free."""
    return attribute(device, "loop/backing_file")


def attribute(device: str, name: str) -> str:
    """What sysfs says of a block device, without touching its file; "" when there is no such device or attribute."""
    try:
        return sysfs.read(f"/sys/block/{os.path.basename(device)}/{name}")
    except OSError:
        return ""


def in_use() -> list[str]:
    """The attached devices: sysfs shows the `loop` attributes of those alone."""
    names = [name for name in os.listdir("/sys/block") if name.startswith("loop") and name[4:].isdigit()]
    return [f"/dev/{name}" for name in names if os.path.exists(f"/sys/block/{name}/loop")]


def is_free(device: str) -> bool:
    """Whether nothing has `device` mounted or holds it exclusively, in any mount namespace: open with O_EXCL, for
    any block device. One that is gone is free."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise
    return True


def change_file(device: str, fd: int, name: str, is_it: Callable[[], bool]) -> None:
    """Put another file of the same size under a read-only device, also while it is mounted; `name` is the device's.
    `is_it` looks whether the device is the one that is meant, once it is held: nobody takes it off its file then.

    Since Linux 6.18 the kernel asks the old file for its size, and one whose file system is dead has none. Then the
    device is told to begin far behind the end of any file, where the sizes of both are 0, and afterwards at 0 again:
    what reads it meanwhile gets an error, as before. Done again, this finishes what a death has left half done.

    Raises: OSError(EINVAL) when it is writable or the size differs; OSError(ENXIO) when it is another's by now.
    """
    with _opened(device, os.O_RDONLY) as loop:
        if not is_it():
            raise OSError(errno.ENXIO, "it has been taken off its file, and may be another's by now", device)
        try:
            _change_file(loop, fd, name)
        finally:
            _begin_at(loop, 0, name)


def _change_file(loop: int, fd: int, name: str) -> None:
    try:
        fcntl.ioctl(loop, LOOP_CHANGE_FD, fd)
    except OSError as error:
        if error.errno != errno.EINVAL or not _is_dead(loop):
            raise
        _begin_at(loop, _BEHIND_ALL, name)
        fcntl.ioctl(loop, LOOP_CHANGE_FD, fd)


def _is_dead(loop: int) -> bool:
    """Whether the file under a device cannot even be asked for its attributes."""
    try:
        _status(loop)
    except OSError as error:
        return error.errno != errno.ENXIO
    return False


def _begin_at(loop: int, offset: int, name: str) -> None:
    """Have a device begin `offset` bytes into its file; whether it is read-only, and does direct I/O, stays."""
    info = _INFO.pack(*(0,) * 3, offset, *(0,) * 4, 0, _name(name), b"", b"", 0, 0)
    fcntl.ioctl(loop, LOOP_SET_STATUS64, info)


def set_direct_io(device: str, on: bool) -> None:
    """Go past the page cache of the file's own file system, which would keep a second copy.

    Raises: OSError(EINVAL) when the file cannot.
    """
    with _opened(device, os.O_RDONLY) as loop:
        fcntl.ioctl(loop, LOOP_SET_DIRECT_IO, int(on))
