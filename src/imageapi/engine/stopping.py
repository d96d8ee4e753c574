"""How a container is asked to end, so that it really does.

The first process of a pid namespace gets only the signals it catches: one that neither catches nor blocks SIGTERM
would wait for ever, and is killed at once. What it catches is read no sooner than 100 ms after its exec, since a
program needs that long to install its handlers. systemd is sent SIGRTMIN+3 (halt) once it catches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from imageapi.engine.lives import age, since_boot
from imageapi.linux import pidfd
from imageapi.records import AnyRecord, Run
from imageapi.runtime.client import Supervisor

SETTLED = 0.1
"""Seconds after the exec before the handlers of a program are judged."""
LOOK = 0.01
"""Seconds between two looks at whether systemd catches its signal yet."""


class Stopper:
    """Stops containers. `timeout` is the time from the request until SIGKILL, in seconds."""

    def __init__(self, supervisor: Supervisor, timeout: float) -> None:
        self._supervisor = supervisor
        self._timeout = timeout

    async def stop(self, record: AnyRecord, end: asyncio.Event) -> None:
        """Have the container end; returns when it has been asked in the last way there is.

        Raises: errors.Problem; OSError. Then it is to be called again.
        """
        run = record.run
        if run is None or run.pid is None:
            return
        if (left := self._left(run)) > 0:
            ask = self._halt_systemd if record.spec.systemd else self._terminate
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    if await ask(record.id, run, run.pid, end):
                        await end.wait()
        if not end.is_set():
            await self._supervisor.kill(record.id, run.attempt)

    def _left(self, run: Run) -> float:
        """The seconds until SIGKILL, however often this was begun, and by whichever server."""
        if run.stop_asked is None:
            run.stop_asked = since_boot()
        return run.stop_asked + self._timeout - since_boot()

    async def _halt_systemd(self, container: int, run: Run, pid: int, end: asyncio.Event) -> bool:
        while not pidfd.catches(pid, signal.SIGRTMIN + 3):
            if await _is_set(end, LOOK):
                return False
        await self._supervisor.signal(container, run.attempt, signal.SIGRTMIN + 3)
        return True

    async def _terminate(self, container: int, run: Run, pid: int, end: asyncio.Event) -> bool:
        if not pidfd.catches(pid, signal.SIGTERM):
            if await _is_set(end, max(0.0, SETTLED - _age(run))):
                return False
            if not pidfd.catches(pid, signal.SIGTERM):
                return False
        await self._supervisor.signal(container, run.attempt, signal.SIGTERM)
        return True


def _age(run: Run) -> float:
    """How long the first process has surely lived, in seconds: its start is known to a clock tick only."""
    return age(run.start_time or 0) - 1 / os.sysconf("SC_CLK_TCK")


async def _is_set(event: asyncio.Event, within: float) -> bool:
    """Whether the event happens `within` so many seconds."""
    try:
        await asyncio.wait_for(event.wait(), within)
    except TimeoutError:
        return False
    return True
