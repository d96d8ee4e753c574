"""A create: plan, claim, make step by step, publish; or undo all of it.

The steps of one store go to one worker together, which begins each without waiting for us; a container comes last.
What was claimed is undone by taking one's own references away and collecting: what somebody else has come to share
meanwhile has a holder, and stays.
Each step runs to its end whether its client is still there or not, since others may wait for its result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from itertools import groupby

from imageapi.engine import stages
from imageapi.engine.collect import Collector
from imageapi.engine.containers import Containers
from imageapi.engine.graph import describe, standing
from imageapi.engine.jobs import GivenUp, Jobs, Series
from imageapi.engine.ledger import Ledger
from imageapi.engine.mending import Mender
from imageapi.engine.plan import Later, Plan, plan
from imageapi.engine.pool import Job
from imageapi.engine.tasks import Tasks
from imageapi.errors import Conflict, Exhausted, Problem, TimedOut
from imageapi.records import AnyRecord, Key, Phase
from imageapi.spec import Container, Object

HELPER_ENDED = (
    "its storage helper has ended, and it was tried twice: see whether the kernel killed that since no memory was left "
    "(dmesg), and ask again"
)

GRACE = 2.0
"""Seconds that a create which had to wait for others has at least for its first step, and for its undo. With those of
its operation they are fewer than the 30 that a Go client waits."""
UNDOING = "the host has not come back from undoing it yet; it goes when that is done"


class Applier:
    """The creates of one engine. `timeout` bounds, in seconds, what one waits for others."""

    def __init__(
        self,
        ledger: Ledger,
        jobs: Jobs,
        containers: Containers,
        collector: Collector,
        mender: Mender,
        tasks: Tasks,
        timeout: float,
    ) -> None:
        self._ledger = ledger
        self._graph = ledger.graph
        self._jobs = jobs
        self._containers = containers
        self._collector = collector
        self._mender = mender
        self._tasks = tasks
        self._timeout = timeout
        self._awaited: dict[Key, asyncio.Future[None]] = {}

    async def create(self, thing: Object) -> AnyRecord:
        """Make `thing` and all that it nests. Cancelling undoes it as a failure does. One that fails when a storage
        helper has ended is undone, and begun anew, once.

        Raises: errors.Problem, and then nothing is left but what the kernel has not come back from.
        """
        end = asyncio.get_running_loop().time() + self._timeout
        try:
            return await self._create(thing, end)
        except _Bereft as bereft:
            await self._mender.mended(bereft.of)
        try:
            return await self._create(thing, end)
        except _Bereft as again:
            raise _explained(again.problem) from again

    async def _create(self, thing: Object, end: float) -> AnyRecord:
        """What fails is undone until `end`, by the clock of the event loop, and then by itself.

        Raises: errors.Problem; _Bereft.
        """
        running = getattr(thing, "state", None) == "running"
        while True:
            claimed = await self._claim(thing, running=running)
            making = _Making(
                claimed,
                self._ledger,
                self._jobs,
                self._containers,
                self._mender,
                self._awaited,
                running=running,
                patience=min(self._timeout, self._time_to(end)),
            )
            made = self._tasks.spawn(making.carry_out())
            try:
                await asyncio.shield(made)
                self._ledger.publish(claimed)
                for record in claimed.steps:
                    self._mender.watch(record)
                stages.end("publish")
                return claimed.root
            except GivenUp:
                await self._tasks.through(self._undo(claimed))
            except Problem as problem:
                making.stop()
                undone = self._tasks.spawn(self._undo(claimed, made))
                lost = self._mender.lost(*claimed.steps)
                left = await self._left(claimed, undone, end)
                if lost and left is None and not isinstance(problem, TimedOut):
                    raise _Bereft(lost, problem) from problem
                if left is not None:
                    raise _with_what_is_left(problem, left) from problem
                raise
            except BaseException:
                making.stop()
                self._tasks.spawn(self._undo(claimed, made))
                raise

    async def _left(self, claimed: Plan, undone: asyncio.Task[None], end: float) -> AnyRecord | None:
        """Which object the kernel, or a process in it, keeps of what is undone, if it keeps any. It is shown from now
        on, and its name is free."""
        await asyncio.wait({undone}, timeout=self._time_to(end))
        left = next((record for record in reversed(claimed.steps) if self._is_left(record)), None)
        if left is not None and left.problem is None:
            self._graph.free_name(left)
            self._ledger.expose(left, f"it is being deleted, but: {UNDOING}")
        return left

    @staticmethod
    def _time_to(end: float) -> float:
        return max(GRACE, round(end - asyncio.get_running_loop().time(), 1))

    def _is_left(self, record: AnyRecord) -> bool:
        return self._graph.find(record.key) is record and record.phase is Phase.RELEASING

    async def _claim(self, thing: Object, *, running: bool) -> Plan:
        """Plan again until nothing that is going away stands in the way, then enter the plan in the same step."""
        while isinstance(planned := plan(thing, self._graph, self._ledger.draw_token), Later):
            await self._wait_for(planned)
        stages.end("plan")
        if isinstance(planned.root.spec, Container):
            self._containers.prepare(planned.root, running=running)
        self._ledger.claim(planned)
        stages.end("claim")
        for record in planned.steps:
            self._awaited[record.key] = asyncio.get_running_loop().create_future()
        return planned

    async def _wait_for(self, later: Later) -> None:
        try:
            await asyncio.wait_for(self._ledger.rest(later.key), self._timeout)
        except TimeoutError:
            raise TimedOut(f"{later.key} is being deleted, and is not gone after {self._timeout:g}s") from None

    async def _undo(self, claimed: Plan, made: asyncio.Future[None] | None = None) -> None:
        """Let the plan's objects go, when the step that is under way has ended: all are held by the root alone, or by
        somebody who has come to share them. Collecting frees ids, so nothing is done by an id after it."""
        if made is not None:
            await asyncio.wait({made})
        for record in claimed.steps:
            self._give_up(record)
        self._ledger.abandon(claimed)
        await self._collector.collect([claimed.root.key])
        if claimed.root.phase is Phase.LIVE:
            self._ledger.note(claimed.root)  # it was not written as such: its own create never said so

    def _give_up(self, record: AnyRecord) -> None:
        """What was not made is nobody's to share, and who waits for it plans again."""
        if record.phase in (Phase.PLANNED, Phase.ACQUIRING):
            record.problem = record.problem or "its create has ended before it was made"
        ended = GivenUp(f"{describe(record)} is not made: its create has ended")
        _tell(self._awaited.pop(record.key, None), ended)


def _with_what_is_left(problem: Problem, left: AnyRecord) -> Problem:
    """The problem, with the id of what stays of the create for now."""
    stays = f"{problem.message}; {describe(left)} goes as soon as the host lets go of it"
    return type(problem)(stays, **problem.fields, id=left.id)


class _Bereft(Exception):
    """A create that met a `problem` when the storage helpers of some stores had ended."""

    def __init__(self, of: set[str], problem: Problem) -> None:
        super().__init__(problem.message)
        self.of = of
        self.problem = problem


def _explained(problem: Problem) -> Problem:
    """What to say of a create that has met the same twice; a conflict says what is wrong with the image itself."""
    if isinstance(problem, Conflict):
        return problem
    return Exhausted(f"{problem.message}; {HELPER_ENDED}", **problem.fields)


class _Making:
    """The steps of one claimed plan. `awaited` has, for everything that is being made by anybody, how that ends.
    `patience` is the seconds that are left for the first step; each one that is done is progress."""

    def __init__(
        self,
        claimed: Plan,
        ledger: Ledger,
        jobs: Jobs,
        containers: Containers,
        mender: Mender,
        awaited: dict[Key, asyncio.Future[None]],
        *,
        running: bool,
        patience: float,
    ) -> None:
        self._claimed = claimed
        self._ledger = ledger
        self._graph = ledger.graph
        self._jobs = jobs
        self._containers = containers
        self._mender = mender
        self._awaited = awaited
        self._running = running
        self._patience: float | None = patience
        self._series: Series | None = None
        self._stopped = False

    def stop(self) -> None:
        """Begin no other step."""
        self._stopped = True
        if self._series is not None:
            self._series.stop()

    async def carry_out(self) -> None:
        """Raises: errors.Problem, about its place in the request; GivenUp, after `stop` or when somebody else's step
        that was to be shared is not done."""
        for record in self._claimed.steps:
            await self._step(record, self._shared(record))
        below = [record for record in self._claimed.steps if not isinstance(record.spec, Container)]
        for store, group in groupby(below, self._jobs.store):
            await self._make_together(store, list(group))
        if isinstance(self._claimed.root.spec, Container):
            await self._make(self._claimed.root, self._run(self._claimed.root))

    async def _shared(self, record: AnyRecord) -> None:
        """Wait for what others are just making; their failure is ours, too."""
        own = {one.key for one in self._claimed.steps}
        shared = [key for key in record.edges() if key not in own]
        for key in shared:
            if (making := self._awaited.get(key)) is not None:
                await asyncio.shield(making)
        self._check(shared)

    async def _make_together(self, store: str, group: list[AnyRecord]) -> None:
        self._check_wanted()
        jobs = [Job("acquire", record, [self._graph.get(key) for key in record.edges()]) for record in group]
        for record in group:
            record.phase = Phase.ACQUIRING  # from now on it must be undone, whether we have heard of it or not
        try:
            with self._jobs.series(store, jobs) as self._series:
                for record in group:
                    await self._make(record, self._acquire(record, self._series))
        finally:
            _plan_again(jobs)

    def _check_wanted(self) -> None:
        """Raises: GivenUp, after `stop`."""
        if self._stopped:
            raise GivenUp("its request has ended")

    async def _make(self, record: AnyRecord, work: Awaitable[None]) -> None:
        """Make one object. The root is written when it is published, and not before."""
        await self._step(record, work)
        record.phase, self._patience = Phase.LIVE, None
        self._mender.watch(record)
        if record is not self._claimed.root:
            self._ledger.change(record)
        stages.end("start" if isinstance(record.spec, Container) else record.kind)
        _tell(self._awaited.pop(record.key, None), None)

    async def _step(self, record: AnyRecord, work: Awaitable[None]) -> None:
        """Do what is to be done for a record. How it fails is how it fails for all who came to share it."""
        try:
            await work
        except GivenUp:
            raise
        except Problem as problem:
            record.problem = problem.message  # nobody is to share it from now on
            _tell(self._awaited.pop(record.key, None), problem)
            raise self._located(problem, record) from problem

    async def _acquire(self, record: AnyRecord, series: Series) -> None:
        self._check(record.edges())
        record.facts = await series.outcome(self._patience)

    async def _run(self, container: AnyRecord) -> None:
        self._check_wanted()
        self._check(container.edges())
        container.phase = Phase.ACQUIRING
        if self._running:
            await self._containers.start_new(container)
        else:
            self._containers.make(container)

    def _check(self, keys: Iterable[Key]) -> None:
        """Raises: errors.Conflict, when one of the objects to build on does not stand any more."""
        for key in keys:
            below = self._graph.find(key)
            if below is None or not standing(below):
                reason = f": {below.problem}" if below and below.problem else ": it is being deleted"
                raise Conflict(f"{describe(below) if below else key} cannot be used{reason}")

    def _located(self, problem: Problem, record: AnyRecord) -> Problem:
        """The problem with its place in the request, and the step it happened in."""
        place = self._claimed.paths[record.key]
        inside = place if isinstance(record.spec, Container) else f"{place}.{record.kind}"
        fields = {"step": f"making {describe(record)}", **problem.fields}
        fields["path"] = inside + str(problem.fields.get("path", "")).removeprefix("$")
        return type(problem)(problem.message, **fields)


def _plan_again(jobs: Iterable[Job]) -> None:
    """What was not begun is as it was planned: there is nothing to undo."""
    for job in jobs:
        if job.about is not None and not job.begun():
            job.about.phase = Phase.PLANNED


def _tell(awaited: asyncio.Future[None] | None, problem: BaseException | None) -> None:
    """Let those who wait for a step know how it ended; the first word counts."""
    if awaited is None or awaited.done():
        return
    if problem is None:
        awaited.set_result(None)
    else:
        awaited.set_exception(problem)
        awaited.exception()
