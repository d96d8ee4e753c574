"""Collection: what nothing needs is released, and then what only it needed, all the way down.

`releasing` is entered in the same step of the loop that found no holder, so that nobody can come to share what is on
its way out. What the kernel will not let go stays, with its problem, and is tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection, Iterable
from itertools import groupby

from imageapi.engine import journal
from imageapi.engine.containers import Containers
from imageapi.engine.graph import describe
from imageapi.engine.jobs import Jobs
from imageapi.engine.ledger import Ledger
from imageapi.engine.mending import Mender
from imageapi.engine.pool import Job
from imageapi.engine.tasks import Tasks
from imageapi.errors import Exhausted, Problem, TimedOut
from imageapi.records import AnyRecord, Key, Phase
from imageapi.spec import Container

log = logging.getLogger(__name__)

FIRST_RETRY = 0.1
LAST_RETRY, SCARCE_RETRY = 30.0, 1.0
"""Seconds between two tries to release the same object: doubled each time up to the last; while it is only that the
host has run out of something, to the shorter one."""


class Collector:
    """The collector of one engine."""

    def __init__(self, ledger: Ledger, jobs: Jobs, containers: Containers, mender: Mender, tasks: Tasks) -> None:
        self._ledger = ledger
        self._graph = ledger.graph
        self._jobs = jobs
        self._containers = containers
        self._mender = mender
        self._tasks = tasks

    async def collect(self, keys: Iterable[Key]) -> None:
        """Release everything among `keys` that nothing needs, and all that only it needed. Never raises: what
        cannot be released now has its problem, and is tried again."""
        await asyncio.gather(*(self._collect(key) for key in keys))

    async def _collect(self, key: Key) -> None:
        record = self._graph.find(key)
        if record is None or record.phase is Phase.RELEASING or self._graph.held(key):
            return
        before = record.phase
        record.phase, record.problem = Phase.RELEASING, None
        if self._jobs.under_way(key):
            asked = "making it" if before is Phase.ACQUIRING else "what was asked of it before"
            self.put_off(record, TimedOut(f"the host has not come back from {asked}; it is undone when it does"))
        elif before is Phase.PLANNED:
            await self.forget(record)
        elif isinstance(record.spec, Container):
            await self._release_alone(record)
        else:
            await self._release_together(self._leaving(record))

    async def _release_alone(self, record: AnyRecord) -> None:
        try:
            await self.release(record)
        except Problem as problem:
            self.put_off(record, problem)
        else:
            await self.forget(record)

    def _leaving(self, record: AnyRecord) -> list[AnyRecord]:
        """What goes with an object that is `releasing`, and is so from now on, too: it first, each before what only
        it and others before it need."""
        leaving, keys = [record], {record.key}
        for one in leaving:
            for below in filter(None, map(self._graph.find, one.edges())):
                if below.key not in keys and self._goes_with(below, keys):
                    below.phase = Phase.RELEASING
                    leaving.append(below)
                    keys.add(below.key)
        return leaving

    def _goes_with(self, record: AnyRecord, leaving: Collection[Key]) -> bool:
        """Whether nothing but those `leaving` needs the object, and nothing else is being done to it."""
        return (
            record.phase is Phase.LIVE
            and not self._jobs.under_way(record.key)
            and not self._graph.held(record.key, leaving)
        )

    async def _release_together(self, leaving: list[AnyRecord]) -> None:
        """Release objects in their order, those of one store by one worker. Where the kernel does not let one go,
        those behind it stay, but for those that nothing needs by then."""
        below = dict.fromkeys(edge for record in leaving for edge in record.edges())
        for store, group in groupby(leaving, self._jobs.store):
            kept = await self._release_in_turn(store, list(group))
            if kept is not None:
                self._spare(record for record in leaving if record is not kept)
                break
        await self.collect(below)

    async def _release_in_turn(self, store: str, group: list[AnyRecord]) -> AnyRecord | None:
        """The one that could not be released, if there is one: none after it is tried."""
        jobs = [Job("release", record) for record in group]
        with self._mender.relieving(*group), self._jobs.series(store, jobs) as series:
            for record in group:
                try:
                    await _or_bug(record, series.outcome())
                except Problem as problem:
                    self.put_off(record, problem)
                    return record
                self._drop(record)
        return None

    def _spare(self, records: Iterable[AnyRecord]) -> None:
        for record in records:
            if self._graph.find(record.key) is record:
                self._ledger.spare(record)
                self._mender.resume(record)

    async def release(self, record: AnyRecord, verb: str = "release") -> None:
        """Have the kernel let go of an object that is `releasing`; a job still under way on it is waited for first.
        `verb` is one of jobs.RELEASES.

        Raises: errors.Problem; a bug is one, too, so that it is told and tried again.
        """
        with self._mender.relieving(record):
            await self._jobs.settle(record)
            if isinstance(record.spec, Container):
                await _or_bug(record, self._containers.discard(record))
            else:
                await _or_bug(record, self._jobs.drive(verb, record))

    async def forget(self, record: AnyRecord) -> None:
        """Drop a record whose object is gone, tell those that stood on it, and collect what stood below it."""
        if isinstance(record.spec, Container):
            journal.close(record)
            self._drop(record)
            await asyncio.gather(self._containers.forget(record), self.collect(record.edges()))
        else:
            self._drop(record)
            await self.collect(record.edges())

    def _drop(self, record: AnyRecord) -> None:
        lost = f"{describe(record)}, which it needs, was deleted by force"
        self._ledger.fault((holder.key for holder in self._graph.holders(record.key)), lost)
        self._ledger.drop(record.key)
        self._mender.forget(record)

    def put_off(self, record: AnyRecord, problem: Problem) -> None:
        """Keep an object that is `releasing` with its problem, and try again until the kernel lets it go."""
        self._graph.free_name(record)
        self._ledger.expose(record, f"it is being deleted, but: {problem.message}")
        log.warning("%s is not released yet: %s", describe(record), problem.message)
        self._mender.relieve(record)
        self._tasks.linger(self._retry(record))

    async def _retry(self, record: AnyRecord) -> None:
        delay = FIRST_RETRY
        while self._graph.find(record.key) is record:
            await asyncio.sleep(delay)
            try:
                await self.release(record)
            except Problem as problem:
                delay = min(2 * delay, SCARCE_RETRY if isinstance(problem, Exhausted) else LAST_RETRY)
                self._ledger.expose(record, f"it is being deleted, but: {problem.message}")
                self._mender.relieve(record)
            else:
                await self.forget(record)


async def _or_bug(record: AnyRecord, release: Awaitable[None]) -> None:
    """Do a release; what fails in it by a bug fails with a reason that says so."""
    try:
        await release
    except Problem:
        raise
    except Exception as bug:
        log.exception("a bug in the release of %s", describe(record))
        raise Problem("its release failed by a bug of this server; the server's log has the trace") from bug
