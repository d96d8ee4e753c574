"""A container's start: it may be waited for by several, be given up, come to something late, or be over before we know
that it began.

Each start has a number (`attempt`) that is on disk before it is made. One that nobody waits for any more is ended when
it comes; until then its container stays.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from imageapi.config import Config
from imageapi.engine import endings
from imageapi.engine.graph import Picture, describe, standing
from imageapi.engine.ledger import Ledger
from imageapi.engine.lives import run_of
from imageapi.engine.mending import Mender
from imageapi.engine.tasks import Tasks
from imageapi.errors import Conflict, Problem, TimedOut
from imageapi.records import AnyRecord, Facts, Key, Run
from imageapi.runtime import command
from imageapi.runtime.client import Supervisor
from imageapi.runtime.clock import now
from imageapi.runtime.protocol import Ended, Start, Started

T = TypeVar("T")
log = logging.getLogger(__name__)

CREATED, STARTING = "container created", "starting container"
START_TIMEOUT = 20.0
"""Seconds, within those of an operation, until an image that does not let its command be executed is given up."""
SHORTEST = 2.0
"""Seconds that its second try has at least."""
ASK_AGAIN = 1.0
"""Seconds until a supervisor that could not do what it was asked for is asked again."""


class Starts:
    """The starts of one engine. `finish` is called for a container whose end was told before its start was."""

    def __init__(
        self,
        ledger: Ledger,
        tasks: Tasks,
        mender: Mender,
        supervisor: Supervisor,
        config: Config,
        finish: Callable[[AnyRecord, Ended], None],
    ) -> None:
        self._ledger = ledger
        self._graph = ledger.graph
        self._tasks = tasks
        self._mender = mender
        self._supervisor = supervisor
        self._operation_timeout = config.operation_timeout
        self._start_timeout = min(START_TIMEOUT, config.operation_timeout)
        self._finish = finish
        self._starting: dict[Key, asyncio.Task[Any]] = {}
        self._early: dict[Key, Ended] = {}
        self._late: set[tuple[int, int]] = set()

    def under_way(self, key: Key) -> asyncio.Task[Any] | None:
        """The start that is being done; its result is its container's picture, where it is no new one."""
        return self._starting.get(key)

    def hear(self, record: AnyRecord, ended: Ended) -> bool:
        """Take the news of an end that has come before we know of its start; False where none is under way."""
        if record.key not in self._starting:
            return False
        self._early[record.key] = ended
        return True

    def is_late(self, record: AnyRecord) -> bool:
        """Whether something may still come of a start that was given up."""
        return any(container == record.id for container, _ in self._late)

    async def first(self, record: AnyRecord) -> None:
        """Run the command of a container that is just being made.

        Raises: errors.Problem.
        """
        await self._begin(record, self._start(record, run_of(record), (CREATED, STARTING)))

    async def again(self, record: AnyRecord) -> Picture:
        """Run the command of a container that does not run; the container as it has begun.

        Raises: errors.Problem.
        """
        return await self._begin(record, self._start_again(record))

    async def _begin(self, record: AnyRecord, start: Coroutine[Any, Any, T]) -> T:
        """Have a start done, whether its caller waits for it or not."""
        starting = self._starting[record.key] = self._tasks.spawn(start)
        return await asyncio.shield(starting)

    async def _start_again(self, record: AnyRecord) -> Picture:
        """A new start, with the next number; the last one's end is forgotten, also when nothing takes its place. The
        container as it has begun."""
        old = run_of(record)
        run = record.run = Run(created_at=old.created_at, logfile=old.logfile, attempt=old.attempt + 1, before=old)
        try:
            await self._start(record, run, (STARTING,))
        except Problem:
            if old.attempt:
                self._tasks.linger(self.forget_later(record.id, old.attempt))
            raise
        return self._graph.still(record.key)

    async def _start(self, record: AnyRecord, run: Run, told: Sequence[str]) -> None:
        """Do a start; the container's log is told so many things first."""
        try:
            if self._graph.is_shown(record.key):  # else its number is on disk since it was claimed
                self._ledger.change(record)
            started = await self._execute(record, run, told)
        except Problem as problem:
            run.state, run.finished_at, run.before = "dead", now(), None
            self._ledger.note(record, problem=f"it could not be started: {problem.message}")
            if isinstance(problem, TimedOut):
                self.give_up(record.id, run.attempt)
            raise
        else:
            run.state, run.pid, run.start_time, run.started_at = "running", started.pid, started.start_time, now()
            run.before = None
            record.problem = endings.log_problem(run, started.log_trouble)
            if self._graph.is_shown(record.key):  # else it is written with its create's success
                self._ledger.note(record)
        finally:
            del self._starting[record.key]
            if (ended := self._early.pop(record.key, None)) and ended.attempt == run.attempt:
                self._finish(record, ended)

    def give_up(self, container: int, attempt: int) -> None:
        """A start that nobody waits for any more is undone; until then its container is not deleted. Where this server
        ends before, the next one finds it."""
        self._late.add((container, attempt))
        self._tasks.linger(self._abandon(container, attempt))

    async def _abandon(self, container: int, attempt: int) -> None:
        """End what may still come of a start: a supervisor that hung does it late."""
        while True:
            record = self._graph.find(Key("container", container))
            try:
                with self._mender.relieving(*filter(None, [record])):
                    await self._supervisor.undo(container, attempt, self._operation_timeout)
                break
            except Problem as problem:
                log.warning("start %d of container %d is not ended yet: %s", attempt, container, problem.message)
                await asyncio.sleep(ASK_AGAIN)
        self._late.discard((container, attempt))

    async def _execute(self, record: AnyRecord, run: Run, told: Sequence[str]) -> Started:
        """Have the supervisor execute the command. When it was not, and a storage helper has ended, that is mended and
        it is tried again, once, in what is left of the time; a create is begun anew as a whole.

        Raises: errors.Problem, when it was not executed.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._start_timeout
        try:
            return await self._ask_to_execute(record, run, told, self._start_timeout)
        except Problem as problem:
            late = isinstance(problem, TimedOut)
            if late or not (self._graph.is_shown(record.key) and await self._mender.recover(record)):
                raise self._explained(record, problem) from problem
        run.attempt += 1  # the end of what came of the first try may still be told, and is not this one's
        try:
            self._ledger.change(record)
            return await self._ask_to_execute(record, run, (STARTING,), max(SHORTEST, end - loop.time()))
        except Problem as problem:
            raise self._explained(record, problem) from problem

    def _explained(self, record: AnyRecord, problem: Problem) -> Problem:
        """A failure, with what is wrong below the container, which it may come of."""
        wrong = (f"{describe(one)}: {one.problem}" for one in self._graph.below(record.key) if one.problem)
        if (reason := next(wrong, None)) is None or isinstance(problem, Conflict):
            return problem
        return type(problem)(f"{problem.message}; {reason}", **problem.fields)

    async def _ask_to_execute(self, record: AnyRecord, run: Run, told: Sequence[str], timeout: float) -> Started:
        facts = self._mount_of(record).facts
        assert facts.mountpoint is not None, "it is mounted"
        order = self._order(record, run, facts, told, timeout)
        return await self._supervisor.start(order, os.path.dirname(facts.mountpoint))

    def _mount_of(self, record: AnyRecord) -> AnyRecord:
        """What the container runs on.

        Raises: errors.Conflict, when it does not stand any more.
        """
        key = record.edges()[0]
        mount = self._graph.find(key)
        if mount is None:
            raise Conflict(f"{key}, which {describe(record)} runs on, is gone; delete the container, and make it again")
        if not standing(mount):
            raise Conflict(f"{describe(mount)} cannot be used: {mount.problem or 'it is being deleted'}")
        return mount

    def _order(self, record: AnyRecord, run: Run, mounted: Facts, told: Sequence[str], timeout: float) -> Start:
        return Start(
            id=record.id,
            attempt=run.attempt,
            root=os.path.basename(mounted.mountpoint or ""),
            cleared=mounted.detail.get("staging", 0),
            argv=command.split(record.spec.command),
            told=list(told),
            timeout=timeout,
            systemd=record.spec.systemd,
            logfile=os.path.basename(run.logfile),
            mark=self._ledger.site.mark(record.key),
        )

    async def forgotten(self, container: int, attempt: int) -> bool:
        """Whether the supervisor has dropped what it keeps of an end."""
        try:
            await self._supervisor.forget(container, attempt)
        except Problem as problem:
            log.warning("the end of container %d is still kept: %s", container, problem.message)
            return False
        return True

    async def forget_later(self, container: int, attempt: int) -> None:
        """Have it dropped, however often the supervisor must be asked."""
        while not await self.forgotten(container, attempt):
            await asyncio.sleep(ASK_AGAIN)
