"""How a block device takes its requests, through sysfs (Documentation/ABI/stable/sysfs-block). Devices are named as
there: `sda`, `loop3`.
"""

from __future__ import annotations

import fcntl
import os

from imageapi.linux import sysfs

BLKROSET = 0x125D


def schedulers(name: str) -> list[str]:
    """The I/O schedulers that the device can have; the one it has comes first."""
    words = sysfs.read(f"/sys/block/{name}/queue/scheduler").split()
    return sorted((word.strip("[]") for word in words), key=lambda word: f"[{word}]" not in words)


def set_scheduler(name: str, scheduler: str) -> None:
    """Give the device an I/O scheduler; its module is loaded if need be. The queue stands still meanwhile.

    Raises: OSError(EINVAL) when the kernel has none of this name.
    """
    sysfs.write(f"/sys/block/{name}/queue/scheduler", scheduler)


def in_flight(name: str) -> int:
    """How many requests, reads and writes, it has not answered yet."""
    return sum(map(int, sysfs.read(f"/sys/class/block/{name}/inflight").split()))


def set_read_only(device: str) -> None:
    """Have the kernel refuse writes to a device (BLKROSET, ioctl_list(2)), whoever opens it.

    Raises: OSError.
    """
    fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, BLKROSET, (1).to_bytes(4, "little"))
    finally:
        os.close(fd)
