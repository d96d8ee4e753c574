"""The partitions of a block device, as the kernel has read them: it numbers them, and devtmpfs has their nodes.

A device-mapper device has none of its own: kpartx(8), which udev runs for multipath devices, maps each as a device
more, whose UUID tells what it is (`part2-mpath-…`).

Nothing here reads a partition table, and nothing is made in /dev: a node that is missing is told.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from typing import NamedTuple

from imageapi.drivers import holders
from imageapi.errors import Conflict, Invalid, Unsupported

BLKRRPART = 0x125F
_SECTOR = 512
"""Bytes in which sysfs counts, whatever the device's own block is."""
MAPPING = 6.0
"""Seconds that udev has to run kpartx for a multipath device that has just appeared."""


class Partition(NamedTuple):
    """A partition: the path of its node, and its size in bytes."""

    device: str
    size: int


def find(device: str, number: int) -> str:
    """The node of partition `number` of `device`. A disk that has just appeared may still be being read.

    Raises: errors.Invalid listing those there are; errors.Unsupported.
    """
    if _map_uuid(_sysfs(device)):
        holders.until(lambda: bool(read(device)), MAPPING)
    holders.until(lambda: number in read(device))
    found = read(device)
    if number not in found:
        raise Invalid(f"{device} has no partition {number}: {_instead(device, found)}", path="$.partition")
    node = found[number].device
    if not os.path.exists(node):
        raise Unsupported(f"the kernel has the partition, but there is no {node}: /dev must be a devtmpfs")
    return node


def read(device: str) -> dict[int, Partition]:
    """The partitions that the kernel knows of, by number, and those that are mapped."""
    disk = _sysfs(device)
    found = {number: _partition(path) for number, path in (*_own(disk), *_mapped(disk))}
    return {number: each for number, each in sorted(found.items()) if each is not None}


def _own(disk: str) -> Iterator[tuple[int, str]]:
    for name in os.listdir(disk):
        with contextlib.suppress(OSError):  # no partition, or gone by now
            yield int(_attribute(f"{disk}/{name}", "partition")), f"{disk}/{name}"


def _mapped(disk: str) -> Iterator[tuple[int, str]]:
    if uuid := _map_uuid(disk):
        for name in os.listdir(f"{disk}/holders"):
            number, _, whole = _map_uuid(f"{disk}/holders/{name}").removeprefix("part").partition("-")
            if whole == uuid and number.isdigit():
                yield int(number), f"{disk}/holders/{name}"


def _map_uuid(directory: str) -> str:
    """What device-mapper knows a device by; empty when it is none of its."""
    with contextlib.suppress(OSError):
        return _attribute(directory, "dm/uuid")
    return ""


def _partition(directory: str) -> Partition | None:
    with contextlib.suppress(OSError):
        return Partition(_node(directory), _SECTOR * int(_attribute(directory, "size")))
    return None


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
    if _map_uuid(_sysfs(device)):
        return f"the kernel reads no partition table there: 'kpartx -a {device}' maps them; its udev rule does so"
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
