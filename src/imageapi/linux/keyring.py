"""Keys that the kernel keeps for its own drivers (keyrings(7), add_key(2), keyctl(2))."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from imageapi.linux.libc import encode, syscall

SYS_add_key, SYS_keyctl = {"x86_64": (248, 250), "aarch64": (217, 219)}.get(os.uname().machine, (-1, -1))
"""-1 elsewhere, which the kernel answers with ENOSYS."""

KEY_SPEC_PROCESS_KEYRING = -2 & 0xFFFF_FFFF_FFFF_FFFF
KEYCTL_UNLINK = 9


def add_key(kind: str, name: str, payload: bytes, keyring: int = KEY_SPEC_PROCESS_KEYRING) -> int:
    """Make a key of type `kind` (`ceph`, `user`) and return its serial number. A second one of that name in the
    keyring replaces the payload.

    Raises: OSError; ENODEV when no module knows the type, EINVAL for a payload it cannot read.
    """
    return syscall(SYS_add_key, encode(kind), encode(name), payload, len(payload), keyring, names=(f"key {name}",))


def unlink(serial: int, keyring: int = KEY_SPEC_PROCESS_KEYRING) -> None:
    """Take a key out of the keyring, so that nothing can name it any more. One that is not there is no error.

    Raises: OSError.
    """
    try:
        syscall(SYS_keyctl, KEYCTL_UNLINK, serial, keyring, names=(f"key {serial}",))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOKEY):
            raise


@contextlib.contextmanager
def key(kind: str, name: str, payload: bytes) -> Iterator[None]:
    """The kernel finds the key `name` for this process, and only while the context lasts."""
    serial = add_key(kind, name, payload)
    try:
        yield
    finally:
        unlink(serial)
