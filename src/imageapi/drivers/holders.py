"""Who keeps the kernel from letting go, as a message names them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from imageapi.errors import Conflict
from imageapi.linux import users

GRACE = 0.3
FIRST_PAUSE = 0.0005
"""Seconds; each pause is twice as long as the last."""
_NAMED = 3
"""How many a sentence names; the field `holders` has all."""


def until(condition: Callable[[], bool], seconds: float = GRACE) -> bool:
    """Whether `condition` comes true within `seconds`: by default the time that the kernel takes to finish what a
    process left when it ended, since the mounts of a namespace go in a work queue, after its last process is gone."""
    deadline = time.monotonic() + seconds
    pause = FIRST_PAUSE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause *= 2
    return True


def busy(what: str, pids: Iterable[int], others: Iterable[str] = ()) -> Conflict:
    """The refusal to release `what` because of processes, and of other things (mountpoints, devices)."""
    holders = [*others, *(process(pid) for pid in dict.fromkeys(pids))]
    if not holders:
        return Conflict(f"{what} is in use, and the kernel does not say by whom: look with lsblk, findmnt and lsof")
    more = f" and {len(holders) - _NAMED} more" if len(holders) > _NAMED else ""
    verb = "is" if len(holders) == 1 else "are"
    named = ", ".join(holders[:_NAMED])
    return Conflict(f"{what} is in use by {named}{more}, which {verb} to be ended or unmounted first", holders=holders)


def process(pid: int) -> str:
    name = users.command(pid)
    return f"process {pid} ({name})" if name else f"process {pid}"
