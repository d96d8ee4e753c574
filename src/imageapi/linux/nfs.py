"""What the NFS client says of its mounts without asking their servers: /proc/fs/nfsfs, /proc/self/mountstats, and
/sys/fs/nfs (Linux 6.5)."""

from __future__ import annotations

import os
import re

VOLUMES = "/proc/fs/nfsfs/volumes"
"""A line for every file system that is up, mounted or still on its way out: version, server, port, st_dev, fsid."""
MOUNT_STATISTICS = "/proc/self/mountstats"
CONTROL = "/sys/fs/nfs"

_DEV = 3
_UPDATES = 7
"""NFSIOS_VFSUPDATEPAGE of <linux/nfs_iostat.h>: how often a page was changed, by write(2) or in a mapping."""
_WRITTEN, _WRITTEN_DIRECTLY = 1, 3
"""NFSIOS_NORMALWRITTENBYTES and NFSIOS_DIRECTWRITTENBYTES."""


def is_up(dev: str, path: str = VOLUMES) -> bool:
    """Whether there is an NFS file system of the st_dev `dev` ("0:45"), in this network namespace."""
    try:
        with open(path) as file:
            return any(line.split()[_DEV] == dev for line in file)
    except FileNotFoundError:
        return False


def may_have_written(mountpoint: str, path: str = MOUNT_STATISTICS) -> bool:
    """Whether anything was ever written through the NFS mount at `mountpoint`, a path without symbolic links, since it
    was mounted: if not, the kernel holds nothing for the server. True also when the mount is not found."""
    place = re.sub(r"[ \t\n\\]", lambda match: f"\\{ord(match[0]):03o}", mountpoint)
    with open(path, errors="surrogateescape", newline="\n") as file:
        found = [part for part in file.read().split("\ndevice ") if f" mounted on {place} with fstype nfs" in part]
    if not found:
        return True
    bytes_, events = _counters(found[-1], "bytes"), _counters(found[-1], "events")
    return any((bytes_[_WRITTEN], bytes_[_WRITTEN_DIRECTLY], events[_UPDATES]))


def _counters(part: str, name: str) -> list[int]:
    match = re.search(rf"^\s*{name}:\s+([\d ]+)$", part, re.MULTILINE)
    return [int(word) for word in match[1].split()] if match else [1] * 8


def off_switch(dev: str) -> str | None:
    """The file into which a 1 is written to have all that waits for the server of this file system fail, for good;
    None where the kernel has none."""
    path = f"{CONTROL}/{dev}/shutdown"
    return path if os.path.exists(path) else None


def is_off(dev: str) -> bool:
    """Whether that was done."""
    path = off_switch(dev)
    if path is None:
        return False
    with open(path) as file:
        return file.read().strip() == "1"
