"""What is on disk of each life, so that the next supervisor can take it up: `<id>.json` in the supervisor's directory.

Nothing is synced: it means nothing after the next boot.
"""

from __future__ import annotations

import contextlib
import os

import msgspec

from imageapi.linux import whole
from imageapi.runtime.protocol import Life

SUFFIX = ".json"


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A life, and how to know its process again: `born` is its start time, which may be long before it executed the
    command, and `inode` its pidfd's, where pidfds have one of their own. What is kept for it is kept under `name`.
    `groups` are the directories of its cgroups, for systemd."""

    life: Life
    name: str
    boot_id: str
    logfile: str
    born: int
    inode: int | None = None
    groups: list[str] = []


encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode


def save(directory: int, entry: Entry) -> None:
    """Write an entry in place of the last one of its container."""
    whole.write(f"{entry.life.id}{SUFFIX}", encode(entry), directory)


def load(directory: int, boot_id: str) -> list[Entry]:
    """The entries of this boot; all others are removed."""
    found = []
    for name in sorted(os.listdir(directory)):
        if name.endswith((SUFFIX, SUFFIX + whole.BESIDE)):
            entry = _read(directory, name)
            if entry is not None and entry.boot_id == boot_id and name.endswith(SUFFIX):
                found.append(entry)
            else:
                os.unlink(name, dir_fd=directory)
    return found


def peek(directory: str, boot_id: str) -> list[Entry]:
    """The entries of this boot, for who is not the supervisor; `directory` is its path. What cannot be read is just
    being written, or is none."""
    try:
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        read = (_peek(opened, name) for name in sorted(os.listdir(opened)) if name.endswith(SUFFIX))
        return [entry for entry in read if entry is not None and entry.boot_id == boot_id]
    finally:
        os.close(opened)


def _peek(directory: int, name: str) -> Entry | None:
    with contextlib.suppress(FileNotFoundError):
        return _read(directory, name)
    return None


def _read(directory: int, name: str) -> Entry | None:
    file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return _decode(os.read(file, 1 << 20))
    except msgspec.MsgspecError:
        return None
    finally:
        os.close(file)


def remove(directory: int, container: int) -> None:
    """Remove a container's entry; one that is gone is no error."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{container}{SUFFIX}", dir_fd=directory)
