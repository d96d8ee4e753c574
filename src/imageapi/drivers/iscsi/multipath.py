"""dm-multipath: several sessions with one logical unit as one device, where multipathd runs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence

from imageapi.drivers.qmp import Deadline
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
    """The name of the map over all of the disks; None when multipathd does not want them (see its blacklist)."""
    patience = Deadline(min(WAIT, deadline.left()))
    try:
        patience.wait(lambda: None not in _maps(disks) and len(_maps(disks)) == 1)
    except TimeoutError:
        return None
    return _maps(disks).pop()


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
    """One attempt: what multipath says to it."""
    time.sleep(min(PAUSE, deadline.left()))
    done = subprocess.run(
        ["multipath", "-f", f"/dev/{name}"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT
    )
    return (done.stderr or done.stdout).strip()
