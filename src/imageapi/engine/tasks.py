"""Work that goes on when nobody waits for it: each task is held until it ends, and a failure of its own is logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


class Tasks:
    """The background tasks of one engine."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `work`. Who awaits the task gets its error; if nobody does, the log has it."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def through(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which goes on to its end even when the caller is cancelled."""
        return await asyncio.shield(self.spawn(work))

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.debug("%s ended with %r", task.get_coro(), error)

    async def drain(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for what is under way, then cancel what is left."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=timeout)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
