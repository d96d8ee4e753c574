"""Keys that the kernel keeps for its own drivers (keyrings(7), add_key(2))."""

from __future__ import annotations

import errno
import os

from imageapi.linux import ceilings
from imageapi.linux.libc import encode, syscall

SYS_add_key = {"x86_64": 248, "aarch64": 217}.get(os.uname().machine, -1)
"""-1 elsewhere, which the kernel answers with ENOSYS."""

KEY_SPEC_PROCESS_KEYRING = -2 & 0xFFFF_FFFF_FFFF_FFFF
"""The process's own; the kernel drops it, and what is only in it, when the process ends."""


def add_key(kind: str, name: str, payload: bytes, keyring: int = KEY_SPEC_PROCESS_KEYRING) -> int:
    """Make a key of type `kind` (`ceph`, `user`) and return its serial number. A second one of that name in the
    keyring replaces the payload.

    Raises: OSError; ENODEV when no module knows the type, EINVAL for a payload it cannot read.
    """
    try:
        return syscall(SYS_add_key, encode(kind), encode(name), payload, len(payload), keyring, names=(f"key {name}",))
    except OSError as error:
        if error.errno == errno.EDQUOT:
            raise ceilings.reached(error, "kernel.keys.root_maxkeys", "kernel.keys.root_maxbytes") from error
        raise
