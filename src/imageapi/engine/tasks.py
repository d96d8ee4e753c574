"""Work that goes on when nobody waits for it: each task is held until it ends. A problem is told to who
awaits it, and is in the record where nobody does; anything else is a bug, and logged as one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from imageapi.errors import Problem

T = TypeVar("T")
log = logging.getLogger(__name__)


class Tasks:
    """The background tasks of one engine."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._lingering: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `work`."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def linger(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start `work` that is cut short at the end, since the next start takes it up from the records."""
        task = self.spawn(work)
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)
        return task

    async def through(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which goes on to its end even when the caller is cancelled."""
        return await asyncio.shield(self.spawn(work))

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Problem):
            log.error("a bug in %s", task.get_coro(), exc_info=error)

    async def drain(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for what is under way, then cancel what is left."""
        for task in self._lingering:
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running), timeout=timeout)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do `work`, but leave off when `stop` comes first; whether it was done, and there is still no stop."""
    working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if working.done():
        working.result()
    working.cancel()
    return not stop.is_set()
