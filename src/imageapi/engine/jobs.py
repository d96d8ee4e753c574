"""Jobs on objects, each with the operation's deadline, which is put off by every word that it moves.

A job that does not come back in time is left to itself and remembered here, since what it does in the kernel may still
happen: its object is undone only after it has returned.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from imageapi.drivers.base import LOCAL_STORE, driver
from imageapi.drivers.paths import PLACE
from imageapi.engine.graph import Graph, describe
from imageapi.engine.pool import Chain, Job, Pool
from imageapi.errors import Problem, TimedOut
from imageapi.records import AnyRecord, Key, Phase
from imageapi.spec import Container

UNMADE = (Phase.PLANNED, Phase.ACQUIRING)
"""The phases of what is not there yet, or only in part."""


RELEASES = ("release", "delete")
"""The jobs that take an object out of the kernel: with what needed it, or asked for by itself."""


class GivenUp(Problem):
    """What was waited for will not be done: the request that it was done for has ended before."""


class Jobs:
    """The jobs of one engine. `timeout` is in seconds."""

    def __init__(self, pool: Pool, graph: Graph, timeout: float) -> None:
        self._pool = pool
        self._graph = graph
        self._timeout = timeout
        self._under_way: dict[Key, Job] = {}
        self.ended = 0.0
        """When the last job on an object ended, by the monotonic clock."""

    async def drive(self, verb: str, record: AnyRecord, *arguments: Any) -> Any:
        """Have the driver of an attachment or mount do `verb`.

        Raises: errors.Problem; errors.TimedOut with the job still under way.
        """
        return await self.run(self.store(record), Job(verb, record, *arguments))

    def store(self, record: AnyRecord) -> str:
        """The store whose failure makes calls about the object hang: its own, or the first one below it. A path of this
        host is only then the answer when nothing is another host's."""
        stores = list(self._stores(record))
        far = (store for store in stores if not store.startswith(PLACE))
        return next(far, stores[0] if stores else LOCAL_STORE)

    def _stores(self, record: AnyRecord) -> Iterator[str]:
        for one in (record, *self._graph.below(record.key)):
            if isinstance(one.spec, Container):
                continue
            kind = driver(one.key.collection, one.kind)
            store = kind.store(one.definition)
            if store != LOCAL_STORE and (one.phase in UNMADE or not getattr(kind, "copies", False)):
                yield store

    async def run(self, store: str, job: Job, timeout: float | None = None) -> Any:
        """The result of one job.

        Raises: errors.Problem; errors.TimedOut with the job still under way.
        """
        with self.series(store, [job]) as series:
            return await series.outcome(timeout)

    async def beside(self, store: str, job: Job) -> Any:
        """The result of a job that helps another one on its object to its end, and so does not take that one's place
        here.

        Raises: errors.Problem.
        """
        try:
            with self._series(store, [job]) as series:
                return await series.outcome()
        finally:
            self.ended = time.monotonic()

    def series(self, store: str, jobs: Sequence[Job]) -> Series:
        """Have jobs of one store done in turn."""
        for job in jobs:
            if job.about is not None:
                self._remember(job.about.key, job)
        return self._series(store, jobs)

    def _series(self, store: str, jobs: Sequence[Job]) -> Series:
        return Series(self._pool, Chain(store, jobs), self._timeout, self.giving_up)

    def giving_up(self, record: AnyRecord) -> str:
        """What else there is than to wait, for who waits for what was written to an object or below it: a clause; ""
        where that does not go through a storage helper. What can only be read is cut off without being asked."""
        stack = {one.key: one for one in (record, *self._graph.below(record.key))}
        helpers = {one.facts.helper for one in stack.values() if self._is_written(one)} - {None}
        if not helpers:
            return ""
        others = [one for one in self._graph.all("attach") if one.facts.helper in helpers and one.key not in stack]
        shared = "".join(f", and that of {describe(one)}" for one in others)
        command = " ".join(["kill", "-9", *sorted(str(helper.pid) for helper in helpers if helper is not None)])
        return f"; to give up what was written, '{command}' (its storage helper{shared})"

    @staticmethod
    def _is_written(record: AnyRecord) -> bool:
        return record.key.collection == "attach" and not driver("attach", record.kind).read_only(record.definition)

    def under_way(self, key: Key) -> asyncio.Future[Any] | None:
        """The job that is still under way on an object whose caller has given up; None when there is none. One that
        has ended may be there for a moment: who waits for it may hear of it first."""
        job = self._under_way.get(key)
        return None if job is None or job.result.done() else job.result

    def doing(self) -> list[Job]:
        """All jobs on objects that are under way or wait for their turn, the oldest first."""
        return [job for job in self._under_way.values() if not job.result.done()]

    async def settle(self, record: AnyRecord) -> None:
        """Wait until no job is under way on an object: several may wait for the same one, and the first to hear of its
        end begins the next.

        Raises: errors.TimedOut.
        """
        deadline = time.monotonic() + self._timeout
        while (job := self.under_way(record.key)) is not None:
            done, _ = await asyncio.wait({job}, timeout=deadline - time.monotonic())
            if not done:
                late = "the host has not come back from what was asked of it before; see to its store"
                raise TimedOut(f"{late}{self.giving_up(record)}")

    def _remember(self, key: Key, job: Job) -> None:
        def forget(_: object) -> None:
            self.ended = time.monotonic()
            if self._under_way.get(key) is job:
                del self._under_way[key]

        self._under_way[key] = job
        job.result.add_done_callback(forget)


class Series:
    """Jobs under way in one worker; their outcomes are asked for in turn. At the end of the `with` none is begun any
    more: the one that is under way still ends in its own time."""

    def __init__(self, pool: Pool, chain: Chain, timeout: float, giving_up: Callable[[AnyRecord], str]) -> None:
        self._pool = pool
        self._chain = chain
        self._giving_up = giving_up
        self._timeout = timeout
        self._asked = iter(tuple(chain.jobs))
        pool.submit(chain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Begin no other job; who waits for one learns that it is given up."""
        if self._chain.jobs:
            self._pool.give_up(self._chain)

    async def outcome(self, timeout: float | None = None) -> Any:
        """The result of the next job; `timeout` in seconds is the operation's, unless told.

        Raises: errors.Problem, as the job raised it; errors.TimedOut, with the job still under way; GivenUp.
        """
        job = next(self._asked)
        limit = self._timeout if timeout is None else timeout
        await _wait_while_it_moves(job, limit)
        if not job.result.done() and self._is_late(job):
            raise TimedOut(self._complaint(job, limit), step=job.name)
        if job.result.cancelled():
            raise GivenUp(f"{job.name} was not done: its request has ended")
        return job.result.result()

    def _is_late(self, job: Job) -> bool:
        """Begin no other job; whether this one has still no result: it has not come back, or never had a place."""
        self.stop()
        return not job.result.done() or job.result.cancelled()

    def _complaint(self, job: Job, limit: float) -> str:
        store, about = self._chain.store, job.about
        where = "the host" if store == LOCAL_STORE else store
        late = f"stood still for {limit:g}s, {job.progress.step}" if job.progress else f"did not finish in {limit:g}s"
        what = f"{job.name} of {describe(about) if about else 'the host'} {late}"
        if self._chain.worker is None:
            return f"{what}: others wait for {where} as well; see to it, then ask again"
        if job.name in RELEASES and about is not None:
            remedy = f"it goes when that is back{self._giving_up(about)}"
        else:
            remedy = "see to it, or delete what needs it"
        return f"{what}: {where} does not answer; {remedy}"


async def _wait_while_it_moves(job: Job, limit: float) -> None:
    """Wait for the result, as long as the job has said within `limit` seconds that it moves."""
    begun = time.monotonic()
    while not job.result.done():
        left = max(begun, job.moved) + limit - time.monotonic()
        if left <= 0:
            return
        await asyncio.wait({job.result}, timeout=left)
