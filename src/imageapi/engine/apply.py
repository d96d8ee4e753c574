"""A create: plan, claim, make step by step, publish; or undo all of it.

What was claimed is undone by taking one's own references away and collecting: what somebody else has come to share
meanwhile has a holder, and stays. Each step runs to its end whether its client is still there or not, since others may
wait for its result.
"""

from __future__ import annotations

import asyncio

from imageapi.engine.collect import Collector
from imageapi.engine.containers import Containers
from imageapi.engine.graph import describe, standing
from imageapi.engine.jobs import Jobs
from imageapi.engine.ledger import Ledger
from imageapi.engine.plan import Later, Plan, plan
from imageapi.engine.tasks import Tasks
from imageapi.errors import Conflict, Problem, TimedOut
from imageapi.records import AnyRecord, Key, Phase
from imageapi.spec import Container, Object


class _GivenUp(Problem):
    """Somebody else's step that was to be shared will not be done: its request ended before."""


class Applier:
    """The creates of one engine. `timeout` bounds, in seconds, what one waits for others."""

    def __init__(
        self, ledger: Ledger, jobs: Jobs, containers: Containers, collector: Collector, tasks: Tasks, timeout: float
    ) -> None:
        self._ledger = ledger
        self._graph = ledger.graph
        self._jobs = jobs
        self._containers = containers
        self._collector = collector
        self._tasks = tasks
        self._timeout = timeout
        self._making: dict[Key, asyncio.Future[None]] = {}
        self._steps: dict[Key, asyncio.Task[None]] = {}

    async def create(self, thing: Object) -> AnyRecord:
        """Make `thing` and all that it nests. Cancelling undoes it as a failure does.

        Raises: errors.Problem, and then nothing is left but what the kernel has not come back from.
        """
        running = getattr(thing, "state", None) == "running"
        while True:
            claimed = await self._claim(thing)
            try:
                await self._carry_out(claimed, running=running)
                return claimed.root
            except _GivenUp:
                await self._tasks.through(self._undo(claimed))
            except BaseException as error:
                undone = self._tasks.spawn(self._undo(claimed))
                if not isinstance(error, asyncio.CancelledError):
                    await asyncio.shield(undone)
                raise

    async def _carry_out(self, claimed: Plan, *, running: bool) -> None:
        for record in claimed.steps:
            step = self._tasks.spawn(self._make(record, claimed, running=running))
            self._steps[record.key] = step
            await asyncio.shield(step)
        self._ledger.publish(claimed)
        for record in claimed.steps:
            del self._steps[record.key]

    async def _claim(self, thing: Object) -> Plan:
        """Plan again until nothing that is going away stands in the way, then enter the plan in the same step."""
        while isinstance(planned := plan(thing, self._graph, self._ledger.draw_token), Later):
            await self._wait_for(planned)
        self._ledger.claim(planned)
        for record in planned.steps:
            self._making[record.key] = asyncio.get_running_loop().create_future()
        return planned

    async def _wait_for(self, later: Later) -> None:
        try:
            await asyncio.wait_for(self._ledger.rest(later.key), self._timeout)
        except TimeoutError:
            raise TimedOut(f"{later.key} is being deleted, and is not gone after {self._timeout:g}s") from None

    async def _make(self, record: AnyRecord, claimed: Plan, *, running: bool) -> None:
        """One step. Its result is that of all who came to share it."""
        try:
            inputs = [await self._ready(key) for key in record.edges()]
            if isinstance(record.spec, Container):
                await self._make_container(record, running=running)
            else:
                await self._acquire(record, inputs)
        except Problem as problem:
            record.problem = problem.message  # nobody is to share it from now on
            self._tell(record.key, problem)
            raise self._located(problem, record, claimed) from problem
        self._tell(record.key, None)

    def _tell(self, key: Key, problem: BaseException | None) -> None:
        """Let those who wait for a step know how it ended; the first word counts."""
        future = self._making.pop(key, None)
        if future is None or future.done():
            return
        if problem is None:
            future.set_result(None)
        else:
            future.set_exception(problem)
            future.exception()

    async def _ready(self, key: Key) -> AnyRecord:
        """An object to build on; one that is just being made is waited for, and its failure is ours too."""
        if (making := self._making.get(key)) is not None:
            await asyncio.shield(making)
        record = self._graph.find(key)
        if record is None or not standing(record):
            reason = f": {record.problem}" if record and record.problem else ": it is being deleted"
            raise Conflict(f"{describe(record) if record else key} cannot be used{reason}")
        return record

    async def _acquire(self, record: AnyRecord, inputs: list[AnyRecord]) -> None:
        self._ledger.change(record, phase=Phase.ACQUIRING)
        facts = await self._jobs.drive("acquire", record, inputs)
        self._ledger.change(record, phase=Phase.LIVE, facts=facts)

    async def _make_container(self, record: AnyRecord, *, running: bool) -> None:
        self._containers.make(record)
        if running:
            await self._containers.start(record)

    def _located(self, problem: Problem, record: AnyRecord, claimed: Plan) -> Problem:
        """The problem with its place in the request, the step it happened in, and the id of what stays behind it."""
        place = claimed.paths[record.key]
        inside = place if isinstance(record.spec, Container) else f"{place}.{record.kind}"
        fields = {"step": f"making {describe(record)}", **problem.fields}
        fields["path"] = inside + str(problem.fields.get("path", "")).removeprefix("$")
        if self._jobs.under_way(record.key):
            fields["id"] = record.id
        return type(problem)(problem.message, **fields)

    async def _undo(self, claimed: Plan) -> None:
        """Take the plan's objects away again, the root first, when the step that is under way has ended."""
        claimed.root.pinned = False
        for record in reversed(claimed.steps):
            if (step := self._steps.pop(record.key, None)) is not None:
                await asyncio.wait({step})
            if record.phase is Phase.PLANNED:
                record.problem = "its create has ended before it was made"
            self._tell(record.key, _GivenUp(f"{describe(record)} is not made: its create has ended"))
            await self._collector.collect([record.key])
