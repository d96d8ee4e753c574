"""Whether the file systems on a device can be read again after its storage was away.

Some keep the errors they met: squashfs has its last blocks of directories and inodes in a cache, those too that could
not be read (fs/squashfs/cache.c), until it has read enough others; ext4 and xfs are shut down for good by Linux 6.6 and
later when the file under a loop device is changed (fs_bdev_mark_dead). So all files are looked at: that drives out what
can be driven out, and shows what cannot.
"""

from __future__ import annotations

import os
import time

from imageapi.drivers import partitions
from imageapi.linux import mountinfo
from imageapi.linux.mountinfo import Mount

SECONDS = 3.0
"""For how long files are looked at: a large image is not gone through, and drives out its errors with a part."""
ROUNDS = 2
EMPTY = 3
"""The size of a squashfs directory without files. One that cannot be read shows none, and no error."""


def complaint(device: str) -> str | None:
    """What is still wrong with the file systems on `device` and its partitions; None when they can be read."""
    devices = {device, *(each.device for each in partitions.read(device).values())}
    for each in mountinfo.read(mention=device):
        if each.source in devices and not _can_be_read(each):
            return (
                f"the storage is back, but the kernel's {each.fstype} keeps errors that it met meanwhile, so that some "
                f"files at {each.mountpoint} cannot be read: stop what uses it, delete it, and make it again"
            )
    return None


def _can_be_read(mount: Mount) -> bool:
    return not all(_walk(mount, time.monotonic() + SECONDS) for _ in range(ROUNDS))


def _walk(mount: Mount, deadline: float) -> bool:
    """Look at all files of a mount; whether any could not be."""
    failed, waiting = False, [mount.mountpoint]
    while waiting and time.monotonic() < deadline:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as opened:
                entries = list(opened)
            failed |= not entries and mount.fstype == "squashfs" and os.lstat(directory).st_size > EMPTY
        except OSError:
            failed = True
        else:
            failed |= sum(_fails(entry, waiting) for entry in entries) > 0
    return failed


def _fails(entry: os.DirEntry[str], waiting: list[str]) -> bool:
    """Look at a name, where its content begins, and where that ends: each is kept in another place."""
    try:
        size = entry.stat(follow_symlinks=False).st_size
        if entry.is_symlink():
            os.readlink(entry.path)
        elif entry.is_file():
            _touch(entry.path, size)
        elif entry.is_dir():
            waiting.append(entry.path)
    except OSError:
        return True
    return False


def _touch(path: str, size: int) -> None:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for place in {0, max(0, size - 1)}:
            os.pread(file, 1, place)
    finally:
        os.close(file)
