"""dm-multipath: several sessions with one logical unit as one device, where multipathd runs."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Sequence

from imageapi.drivers.deadline import Deadline
from imageapi.errors import Conflict
from imageapi.linux import iscsi

PID_FILES = ("/run/multipathd.pid", "/run/multipathd/multipathd.pid")
WAIT = 8.0
"""Seconds that multipathd has to see the paths and make the map, or to let go of it."""
PAUSE = 0.05


def runs() -> bool:
    """Whether multipathd is there to make a map."""
    return any(_is_daemon(path) for path in PID_FILES)


def _is_daemon(path: str) -> bool:
    try:
        with open(path, encoding="ascii") as file:
            pid = int(file.read())
        with open(f"/proc/{pid}/comm", encoding="ascii") as file:
            return file.read().strip() == "multipathd"
    except (OSError, ValueError):
        return False


def await_map(disks: Sequence[str], deadline: Deadline) -> str | None:
    """The name of the map over all of the disks, or over those that multipathd has come to in time: it adds the others
    by itself. None when it does not want them (see its blacklist)."""
    patience = Deadline(min(WAIT, deadline.left()))
    with contextlib.suppress(TimeoutError):
        patience.wait(lambda: None not in _maps(disks) and len(_maps(disks)) == 1)
    return next((each for each in _maps(disks) if each), None)


def _maps(disks: Sequence[str]) -> set[str | None]:
    return {iscsi.map_over(disk) for disk in disks}


def remove(name: str, deadline: Deadline) -> None:
    """Take a map off its disks, if it is there. Who looks at a device once its user has closed it (udev) has it open
    for a moment, so it is tried again.

    Raises: errors.Conflict in multipath's words.
    """
    patience = Deadline(min(WAIT, deadline.left()))
    words = ""
    while os.path.isdir(f"/sys/block/{name}"):
        try:
            words = _flush(name, patience)
        except TimeoutError:
            raise Conflict(f"multipathd keeps /dev/{name}: see 'multipath -ll'", detail=words) from None


def _flush(name: str, deadline: Deadline) -> str:
    """One attempt: what multipath says to it. Raises: TimeoutError."""
    time.sleep(min(PAUSE, deadline.left()))
    return _said("multipath", "-f", f"/dev/{name}")


def queues(device: str) -> bool:
    """Whether the device is one that has I/O wait when no path is left, for as long as multipathd thinks right (its
    no_path_retry). Raises: TimeoutError."""
    is_map = os.path.isdir(f"/sys/block/{os.path.basename(device)}/dm")
    return is_map and "queue_if_no_path" in _said("dmsetup", "table", device)


def _said(*command: str) -> str:
    """What a command printed, or complained. Raises: TimeoutError."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT)
    except subprocess.TimeoutExpired:
        raise TimeoutError(errno.ETIMEDOUT, "it does not come back", command[0]) from None
    return (done.stderr or done.stdout).strip()
