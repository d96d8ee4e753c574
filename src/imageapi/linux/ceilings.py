"""Numbers that the kernel lets nothing grow beyond: sysctls (proc_sys_fs(5), proc_sys_kernel(5)), by their names."""

from __future__ import annotations

import contextlib

from imageapi.linux.libc import Explained

SLACK = 4
"""Mounts that may be missing up to the ceiling: one mount(2) may make several, by propagation."""


def ceiling(name: str) -> int | None:
    """The number; None where the kernel has none of this name."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/sys/{name.replace('.', '/')}") as file:
        return int(file.read())
    return None


def mounts_are_full() -> bool:
    """Whether this mount namespace has as many mounts as it may: mount(2) fails with ENOSPC then."""
    most = ceiling("fs.mount-max")
    with open("/proc/self/mountinfo", "rb") as file:
        return most is not None and sum(1 for _ in file) + SLACK > most


def reached(error: OSError, *names: str) -> Explained:
    """The error, with what must be raised."""
    explained = Explained(error.errno, error.strerror, error.filename, None, error.filename2)
    told = " or ".join(f"{name}, which is {ceiling(name)}" for name in names)
    explained.remedy = f"the kernel's ceiling is reached; raise {told} (sysctl -w)"
    return explained
