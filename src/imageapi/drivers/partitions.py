"""The partitions of a block device, as the kernel has read them: it numbers them, and devtmpfs has their nodes.

Nothing here reads a partition table, and nothing is made in /dev: a node that is missing is told.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import NamedTuple

from imageapi.drivers import holders
from imageapi.errors import Conflict, Invalid, Unsupported

BLKRRPART = 0x125F
_SECTOR = 512
"""Bytes in which sysfs counts, whatever the device's own block is."""


class Partition(NamedTuple):
    """A partition: the path of its node, and its size in bytes."""

    device: str
    size: int


def find(device: str, number: int) -> str:
    """The node of partition `number` of `device`. A disk that has just appeared may still be being read.

    Raises: errors.Invalid listing those there are; errors.Unsupported.
    """
    holders.until(lambda: number in read(device))
    found = read(device)
    if number not in found:
        raise Invalid(f"{device} has no partition {number}: {_instead(device, found)}", path="$.partition")
    node = found[number].device
    if not os.path.exists(node):
        raise Unsupported(f"the kernel has the partition, but there is no {node}: /dev must be a devtmpfs")
    return node


def read(device: str) -> dict[int, Partition]:
    """The partitions that the kernel knows of, by number."""
    disk = _sysfs(device)
    found: dict[int, Partition] = {}
    for name in os.listdir(disk):
        with contextlib.suppress(OSError):  # no partition, or gone by now
            number = int(_attribute(f"{disk}/{name}", "partition"))
            found[number] = Partition(_node(f"{disk}/{name}"), _SECTOR * int(_attribute(f"{disk}/{name}", "size")))
    return dict(sorted(found.items()))


def have_read(device: str) -> None:
    """Have the kernel read the partition table, unless it knows of partitions already (ioctl BLKRRPART).

    Raises: errors.Problem; OSError.
    """
    if read(device):
        return
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, BLKRRPART)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Conflict(f"{device} is in use, so that its partitions cannot be read now") from None
        if error.errno != errno.EINVAL:
            raise
        raise Invalid(f"{device} is no device that has partitions", path="$.readPartitions", errno="EINVAL") from None
    finally:
        os.close(fd)


def _instead(device: str, found: dict[int, Partition]) -> str:
    if found:
        return "it has " + ", ".join(f"{number} ({each.size >> 20} MiB)" for number, each in found.items())
    if os.path.exists(f"{_sysfs(device)}/partition"):
        return "it is a partition itself; leave the number out"
    with contextlib.suppress(OSError):
        if _attribute(_sysfs(device), "loop/partscan") == "0":
            return "its partitions were not read; attach it with readPartitions set to true"
    return "the kernel sees no partition table on it, or knows none of that kind"


def _sysfs(device: str) -> str:
    number = os.stat(device).st_rdev
    return f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"


def _node(directory: str) -> str:
    """The device's node, by the name that devtmpfs gives it."""
    lines = _attribute(directory, "uevent").splitlines()
    return "/dev/" + next(line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME="))


def _attribute(directory: str, name: str) -> str:
    with open(f"{directory}/{name}", encoding="ascii") as file:
        return file.read().strip()
