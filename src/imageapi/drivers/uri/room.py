"""The file system in memory, and how large it may become.

It is a tmpfs of its own for each mount, with our mark as its source, and not mounted anywhere until it is whole: a
process that dies takes it along. tmpfs(5): `size` bounds its pages, `nr_inodes` what is no page.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

from imageapi.errors import Exhausted, Invalid, Problem
from imageapi.linux import memory, mount

RESERVE = 64 << 20
"""Bytes of memory that no mount may take from the host."""
INODE = 1024
"""Bytes that an inode and its name cost the kernel, about."""
FEWEST_INODES = 4096
ATTRIBUTES = mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOSUID
"""Of the mount where the host's users see it, and not in a container, which may make nodes in it as in any tmpfs."""
LOOK_EVERY = 16 << 20
"""Bytes between two looks at what is still free."""
Bound = Literal["asked", "free", "share"]
"""The request's max_size, all the memory that is free, or the part of it that one has without asking."""


class Room(NamedTuple):
    """How many bytes a mount may have, and what bounds them."""

    size: int
    bound: Bound

    def check(self, wanted: int) -> None:
        """Raises: errors.Invalid or errors.Exhausted, when there is no room for so many bytes."""
        if wanted > self.size:
            raise self.refusal(f"it has {wanted} bytes or more")

    def look(self, before: int, after: int) -> None:
        """Look now and then what the host has left, when from `before` bytes there have become `after`.

        Raises: errors.Exhausted.
        """
        if before // LOOK_EVERY != after // LOOK_EVERY and memory.available() < RESERVE:
            raise Exhausted("the memory of this host is running out; free some, or give a smaller image")

    def refusal(self, what: str) -> Problem:
        """The problem of an image that is too large."""
        if self.bound == "asked":
            return Invalid(
                f"{what}, and max_size is {self.size}; raise it, if the image is really meant to be so large"
            )
        if self.bound == "free":
            return Exhausted(f"{what}, and this host has {self.size} bytes of memory left for it; free some")
        return Exhausted(
            f"{what}, and without a max_size a mount may have {self.size}, half of the memory that is free; give one, "
            "or free memory"
        )


def room(max_size: int | None) -> Room:
    """What a mount may have now. Raises: OSError."""
    free = max(2, memory.available() - RESERVE)  # a tmpfs of size 0 has no bound at all
    if max_size is None:
        return Room(free // 2, "share")
    return Room(max_size, "asked") if max_size <= free else Room(free, "free")


def make(mark: str, size: int) -> int:
    """A descriptor of a new tmpfs of at most `size` bytes, which is mounted nowhere. Raises: OSError."""
    inodes = max(FEWEST_INODES, size // INODE)
    context = mount.fsopen("tmpfs")
    try:
        options = (("size", str(size)), ("nr_inodes", str(inodes)), ("mode", "0755"))
        mount.configure(context, mark, options)
        return mount.fsmount(context, ATTRIBUTES)
    finally:
        os.close(context)


def fullness(tree: int) -> str:
    """What a tmpfs is full of."""
    found = os.fstatvfs(tree)
    if found.f_bfree:
        return f"it has {found.f_files} members or more, each of which costs about {INODE} bytes"
    return f"it has {found.f_blocks * found.f_frsize} bytes or more"
