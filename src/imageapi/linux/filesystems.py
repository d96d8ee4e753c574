"""Which file systems this kernel has."""

from __future__ import annotations

import contextlib
import os

from imageapi.linux import mount


def known() -> dict[str, bool]:
    """The registered types, and whether each needs a block device (proc_filesystems(5))."""
    with open("/proc/filesystems") as file:
        lines = [line.rstrip("\n").split("\t") for line in file]
    return {name: first != "nodev" for first, name in lines}


def needs_device(fstype: str) -> bool | None:
    """Whether `fstype` needs a block device; None when the kernel has no such type, nor a module for it: asking by
    fsopen(2) makes the kernel load one."""
    found = known().get(fstype)
    if found is None:
        with contextlib.suppress(OSError):
            os.close(mount.fsopen(fstype))
            found = known().get(fstype)
    return found
