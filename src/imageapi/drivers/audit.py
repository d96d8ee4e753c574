"""What a look at the host needs that is about many records: what is mounted is read once for all of them, and no
storage is waited for.

Files are looked at where their file system is this host's own; where it is another's, whoever looks may wait for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from functools import cache
from typing import NamedTuple

from imageapi.linux import inotify, mountinfo
from imageapi.linux.mountinfo import Mount

LOCAL = frozenset(
    {
        *("bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660", "overlay", "ramfs"),
        *("squashfs", "tmpfs", "udf", "vfat", "xfs", "zfs"),
    }
)
"""File systems that ask no other host."""


DELETE = "{delete}"
"""In a remedy: that the object is deleted, and before it all that stands on it, of which the report knows."""


class Wrong(NamedTuple):
    """What is wrong with an object: a clause about it (`it is …`), and what would mend it. `loss` is what those that
    stand on it are told, as a clause about it; None when it is no harm to them."""

    problem: str
    remedy: str
    loss: str | None = None


def gone() -> Wrong:
    """The verdict on an object of which the kernel knows nothing."""
    problem = "it is gone from the kernel; delete it, and make it again"
    return Wrong(problem, DELETE, "is gone from the kernel")


class Host:
    """The host as one look sees it. `watches` are those that were added to the inotify instance `instance`, so that a
    change after this look is told; -1 is no instance."""

    def __init__(self, instance: int = -1) -> None:
        self._instance = instance
        self.watches: set[int] = set()
        self.mounts = mountinfo.read()
        self._at: defaultdict[str, list[Mount]] = defaultdict(list)
        for each in self.mounts:
            self._at[each.mountpoint].append(each)
        self._fstype = cache(lambda directory: mountinfo.holding(directory, self.mounts).fstype)

    def stack(self, place: str) -> list[Mount]:
        """The mounts at a mountpoint, lowest first; it is spelled as mountinfo spells it."""
        return mountinfo.stacked(self._at.get(place, ()))

    def is_local(self, path: str) -> bool:
        """Whether a file, whose path goes over no symbolic link, can be looked at without waiting for another host. It
        may be a mount itself: what a storage daemon exports is."""
        with contextlib.suppress(ValueError):
            return self._fstype(path if path in self._at else os.path.dirname(path)) in LOCAL
        return False

    def watch(self, path: str, mask: int) -> None:
        """Have changes of a local file or directory told from now on. One that is gone, or for which there is no room,
        is not: the next look sees what has become of it."""
        if self._instance >= 0:
            with contextlib.suppress(OSError):
                self.watches.add(inotify.add(self._instance, path, mask))
