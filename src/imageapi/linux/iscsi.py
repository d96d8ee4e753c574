"""The sessions of the kernel's iSCSI initiator, through sysfs (drivers/scsi/scsi_transport_iscsi.c), and the SCSI
devices below them.

A session carries the name of the open-iscsi interface it was made with: by that it is known whose it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

CLASS = "/sys/class/iscsi_session"
TRANSPORT = "/sys/class/iscsi_transport/tcp"

LOGGED_IN, FAILED = "LOGGED_IN", "FAILED"
"""A session's state while its target answers, and while it is away and looked for; FREE once it was given up."""


class Session(NamedTuple):
    """A session with a target. `interface` is the name that whoever made it gave."""

    id: int
    target: str
    interface: str
    state: str

    @property
    def directory(self) -> str:
        return f"{CLASS}/session{self.id}"


def available() -> bool:
    """Whether the kernel has the initiator over TCP."""
    return os.path.isdir(TRANSPORT)


def sessions() -> list[Session]:
    """All sessions, in the order of their numbers."""
    names = os.listdir(CLASS) if os.path.isdir(CLASS) else []
    found = (session(int(name.removeprefix("session"))) for name in names)
    return sorted(each for each in found if each is not None)


def session(number: int) -> Session | None:
    """The session of this number; None when there is none (any more)."""
    directory = f"{CLASS}/session{number}"
    try:
        target, interface, state = (_read(f"{directory}/{name}") for name in ("targetname", "ifacename", "state"))
    except OSError:
        return None
    return Session(number, target, interface, state)


def scan(of: Session, lun: int) -> None:
    """Look for a LUN of the session's target: scsi_host's `scan` takes channel, target and LUN with its addressing
    method. The device may be there a moment later.

    Raises: OSError.
    """
    device = os.path.realpath(f"{of.directory}/device")
    host = os.path.basename(os.path.dirname(device))
    descriptor = os.open(f"/sys/class/scsi_host/{host}/scan", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, f"0 0 {lun}".encode())
    finally:
        os.close(descriptor)


def disks(of: Session) -> list[str]:
    """The names (`sda`) of the block devices that the session has."""
    return sorted(_disks(f"{of.directory}/device"))


def _disks(device: str) -> Iterator[str]:
    for target in _entries(device, "target"):
        for unit in _entries(target, ""):
            with contextlib.suppress(OSError):
                yield from os.listdir(f"{unit}/block")


def _entries(directory: str, prefix: str) -> list[str]:
    try:
        return [f"{directory}/{name}" for name in os.listdir(directory) if name.startswith(prefix)]
    except OSError:
        return []


def map_over(disk: str) -> str | None:
    """The multipath device (`dm-0`) that has the block device as one of its paths."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/sys/block/{disk}/holders"):
            if _read(f"/sys/block/{name}/dm/uuid").startswith("mpath-"):
                return name
    return None


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read().rstrip("\n")
