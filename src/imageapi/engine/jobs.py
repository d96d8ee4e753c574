"""Jobs on objects, each with the operation's deadline.

A job that does not come back in time is left to itself and remembered here, since what it does in the kernel may still
happen: its object is undone only after it has returned.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from imageapi.drivers.base import LOCAL_STORE, driver
from imageapi.engine.graph import Graph, describe
from imageapi.engine.pool import Job, Pool
from imageapi.engine.worker import Descriptor
from imageapi.errors import TimedOut
from imageapi.records import AnyRecord, Key


class Jobs:
    """The jobs of one engine. `timeout` is in seconds."""

    def __init__(self, pool: Pool, graph: Graph, timeout: float) -> None:
        self._pool = pool
        self._graph = graph
        self._timeout = timeout
        self._under_way: dict[Key, asyncio.Task[Any]] = {}

    async def drive(self, verb: str, record: AnyRecord, *arguments: Any) -> Any:
        """Have the driver of an attachment or mount do `verb`.

        Raises: errors.Problem; errors.TimedOut with the job still under way.
        """
        return await self.run(record, Job(self.store(record), verb, record, *arguments))

    def store(self, record: AnyRecord) -> str:
        """The store whose failure makes calls about the object hang: its own, or the first one below it."""
        for one in (record, *self._graph.below(record.key)):
            store = driver(one.key.collection, one.kind).store(one.definition)
            if store != LOCAL_STORE:
                return store
        return LOCAL_STORE

    async def run(self, record: AnyRecord | None, job: Job, timeout: float | None = None) -> Any:
        """The result of a job about `record`, or about the host.

        Raises: errors.Problem; errors.TimedOut with the job still under way.
        """
        limit = self._timeout if timeout is None else timeout
        task = asyncio.ensure_future(self._pool.perform(job))
        if record is not None:
            self._remember(record.key, task)
        try:
            done, _ = await asyncio.wait({task}, timeout=limit)
        except asyncio.CancelledError:
            self._give_up(task, job)
            raise
        if not done:
            self._give_up(task, job)
            raise TimedOut(self._complaint(record, job, limit), step=job.name)
        return task.result()

    def under_way(self, key: Key) -> asyncio.Task[Any] | None:
        """The job that is still under way on an object whose caller has given up; None when there is none."""
        return self._under_way.get(key)

    async def settle(self, key: Key) -> None:
        """Wait for the job that is still under way on an object, if one is.

        Raises: errors.TimedOut.
        """
        if (job := self.under_way(key)) is None:
            return
        done, _ = await asyncio.wait({job}, timeout=self._timeout)
        if not done:
            raise TimedOut(f"the host has not come back from what was asked of {key} before; see to its store")

    def _remember(self, key: Key, task: asyncio.Task[Any]) -> None:
        def forget(ended: asyncio.Task[Any]) -> None:
            if self._under_way.get(key) is ended:
                del self._under_way[key]
            if not ended.cancelled():
                ended.exception()

        self._under_way[key] = task
        task.add_done_callback(forget)

    @staticmethod
    def _give_up(task: asyncio.Task[Any], job: Job) -> None:
        """A job that no worker has begun is taken back; one that has begun may still have its effect."""
        if job.started:
            task.add_done_callback(_close_unclaimed)
        else:
            task.cancel()

    @staticmethod
    def _complaint(record: AnyRecord | None, job: Job, limit: float) -> str:
        where = "the host" if job.store == LOCAL_STORE else job.store
        what = f"{job.name} of {describe(record) if record else 'the host'} did not finish in {limit:g}s"
        if not job.started:
            return f"{what}: others wait for {where} as well; see to it, then ask again"
        return f"{what}: {where} does not answer; see to it, or delete what needs it"


def _close_unclaimed(ended: asyncio.Task[Any]) -> None:
    """Close the descriptor that comes when nobody waits for it any more: a root keeps its devices busy."""
    if not ended.cancelled() and ended.exception() is None and isinstance(ended.result(), Descriptor):
        os.close(ended.result())
