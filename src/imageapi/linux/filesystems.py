"""Which file systems this kernel has."""

from __future__ import annotations

import contextlib
import os

from imageapi.linux import mount

NEVER_WRITTEN = frozenset({"cramfs", "erofs", "iso9660", "romfs", "squashfs"})
"""Types that are made whole and then only read. The driver of some of them refuses to be mounted read-write."""

_seen: dict[str, bool] = {}
"""What `needs_device` has found. A module that is unloaded is loaded again by the kernel when it is needed."""


def known() -> dict[str, bool]:
    """The registered types, and whether each needs a block device (proc_filesystems(5))."""
    with open("/proc/filesystems") as file:
        lines = [line.rstrip("\n").split("\t") for line in file]
    return {name: first != "nodev" for first, name in lines}


def lack(fstype: str) -> str:
    """The sentence for a type that the kernel has not, and what to do."""
    return f"this kernel has no file system '{fstype}', nor a module of it: 'modprobe {fstype}' must succeed"


def needs_device(fstype: str) -> bool | None:
    """Whether `fstype` needs a block device; None when the kernel has no such type, nor a module for it: asking by
    fsopen(2) makes the kernel load one."""
    if fstype not in _seen:
        _seen.update(known())
    if fstype not in _seen:
        with contextlib.suppress(OSError):
            os.close(mount.fsopen(fstype))
            _seen.update(known())
    return _seen.get(fstype)
