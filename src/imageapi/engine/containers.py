"""A container's life: made, started, stopped, ended, discarded.

The supervisor runs it and outlives this process; here is what it means. A container is started at most once at a time,
each start has a number (`attempt`) that is on disk before it is made, and every end is matched to its start by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import msgspec

from imageapi.config import Config
from imageapi.drivers.base import driver
from imageapi.engine import endings, journal
from imageapi.engine.graph import Picture, describe
from imageapi.engine.jobs import Jobs
from imageapi.engine.ledger import Ledger
from imageapi.engine.lives import run_of, since_boot, time_of
from imageapi.engine.mending import Mender
from imageapi.engine.pool import Job, Pool
from imageapi.engine.starts import ASK_AGAIN, CREATED, Starts
from imageapi.engine.stopping import Stopper
from imageapi.engine.tasks import Tasks
from imageapi.errors import Conflict, NotFound, Problem, TimedOut
from imageapi.records import AnyRecord, Key, Phase, Run
from imageapi.runtime.client import Supervisor
from imageapi.runtime.clock import now
from imageapi.runtime.protocol import Ended, Life, LogTrouble
from imageapi.spec import Overlay, Tmpfs

log = logging.getLogger(__name__)

CUT_OFF = "the start was cut off by the end of the server, and is undone"
"""What the log of a container says of it."""


class Containers:
    """The containers of one engine."""

    def __init__(self, ledger: Ledger, jobs: Jobs, tasks: Tasks, mender: Mender, pool: Pool, config: Config) -> None:
        self._ledger = ledger
        self._graph = ledger.graph
        self._jobs = jobs
        self._tasks = tasks
        self._mender = mender
        self._stop_timeout = config.stop_timeout
        self._operation_timeout = config.operation_timeout
        self._ends: dict[Key, asyncio.Event] = {}
        self._syncing: dict[Key, AnyRecord] = {}
        """Of each container that has ended, and whose state does not say so yet, the mount that is waited for."""
        self._supervisor = Supervisor(
            ledger.site, launch=pool.start_supervisor, on_ended=self._on_ended, on_log=self._on_log
        )
        self._starts = Starts(ledger, tasks, mender, self._supervisor, config, self._begin_to_finish)
        self._stopper = Stopper(self._supervisor, config.stop_timeout)

    async def connect(self) -> None:
        """Find the supervisor, or have it started, and make its containers and our records one."""
        dismissed: list[asyncio.Task[None]] = []
        lives = {Key("container", life.id): life for life in await self._supervisor.connect()}
        for key, life in ((key, life) for key, life in lives.items() if key not in self._graph.aside):
            record = self._graph.find(key)
            if life.starting:
                self._starts.give_up(life.id, life.attempt)
            elif record is None or not self._adopt(record, life):
                dismissed.append(self._tasks.linger(self._dismiss(life)))
        for record in self._graph.all("container"):
            if self.active(record) and record.key not in lives:
                self._tasks.spawn(self._finish(record, None))
            self._take_back(record)
        if dismissed:  # what they stand on is released next; but one may hang in its storage
            await asyncio.wait(dismissed, timeout=ASK_AGAIN)

    async def restore(self) -> None:
        """Have the supervisor make again what somebody has removed of its files. Raises: errors.Problem."""
        await self._supervisor.greet()

    async def leave(self) -> None:
        """Leave the supervisor, which goes on while a container runs, and ends with us when there is none."""
        needed = any(self.active(record) for record in self._graph.all("container"))
        if not needed and self._supervisor.pid is not None:
            try:
                await self._supervisor.quit()
            except Problem as problem:
                log.debug("the supervisor stays: %s", problem.message)
        self._supervisor.close()

    # ------------------------------------------------------------------------------------------------ questions

    def active(self, record: AnyRecord) -> bool:
        """Whether the container has, or is about to have, a process."""
        if self._starts.under_way(record.key):
            return True
        return record.run is not None and record.run.state in ("running", "stopping")

    def check_deletable(self, record: AnyRecord, *, force: bool) -> None:
        """Refuse to delete a container that runs.

        Raises: Conflict.
        """
        if self.active(record) and not force:
            raise Conflict(
                f"{describe(record)} is {run_of(record).state}; ask for its state 'exited' and wait for it, or delete "
                f"it with force=true"
            )

    # --------------------------------------------------------------------------------------------------- verbs

    def prepare(self, record: AnyRecord, *, running: bool) -> None:
        """A container that is planned has the name of its log, and the number of its first start, if there is one: no
        other start has it, since the id may have been another's, of whose start something may still come."""
        logfile = self._ledger.site.logfile(record.id, int(time.time()))
        record.run = Run(created_at=now(), logfile=logfile, attempt=(1 + record.token) * running, untold=True)

    def make(self, record: AnyRecord) -> None:
        """The container exists: it has its log file, whose first line says so."""
        journal.say(record, CREATED)

    async def start_new(self, record: AnyRecord) -> None:
        """Run the command of a container that is just being made.

        Raises: errors.Problem.
        """
        await self._starts.first(record)

    async def start(self, record: AnyRecord) -> Picture:
        """Run the container's command; the container as it was when that had been executed, whatever has been asked of
        it since. One that runs is left alone.

        Raises: errors.Problem, with the container `dead`; errors.Conflict while it is stopping, being deleted, or
        something may still come of its last start.
        """
        self._check_kept(record)
        if (starting := self._starts.under_way(record.key)) is None:
            state = run_of(record).state
            if state == "running":
                return self._graph.still(record.key)
            if state == "stopping":
                raise Conflict(f"{describe(record)} is stopping; ask again when it has exited")
            if self._starts.is_late(record):
                reason = record.problem or "it is ended as soon as its storage answers: ask again then"
                raise Conflict(f"the last start of {describe(record)} is still being undone; {reason}")
            self._ends.pop(record.key, None)
            return await self._starts.again(record)
        shared: Picture = await asyncio.shield(starting)
        return shared

    async def stop(self, record: AnyRecord) -> Picture:
        """Ask the container to end; its state is `stopping` until it has. One that does not run is left alone. The
        container as it was when it had been asked.

        Raises: errors.Conflict, while it is being deleted.
        """
        self._check_kept(record)
        if (starting := self._starts.under_way(record.key)) is not None:
            await asyncio.wait({starting})
            self._check_kept(record)
        run = run_of(record)
        if run.state == "running":
            run.state, run.stop_requested, run.stop_asked = "stopping", True, since_boot()
            self._ledger.note(record)
            self._tasks.linger(self._stop(record))
        return self._graph.still(record.key)

    async def end(self, record: AnyRecord) -> None:
        """Stop a container because its host is going down, and wait until it has ended, or the time for that is over:
        then its release kills it."""
        if self.active(record):
            journal.say(record, "stopping container: the host is going down")
            with contextlib.suppress(Problem):
                await self.stop(record)
        if self.active(record):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._end_of(record).wait(), self._stop_timeout + self._operation_timeout)

    @staticmethod
    def _check_kept(record: AnyRecord) -> None:
        """Refuse to do anything for a container that is on its way out: what it started would be nobody's.

        Raises: Conflict.
        """
        if record.phase is Phase.RELEASING:
            raise Conflict(f"{describe(record)} is being deleted")

    async def _stop(self, record: AnyRecord) -> None:
        """Have the container end, however often the supervisor must be asked."""
        end = self._end_of(record)
        while not end.is_set():
            try:
                await self._stopper.stop(record, end)
                with self._mender.relieving(record):
                    await end.wait()
            except (Problem, OSError) as problem:
                log.warning("%s is not stopped yet: %s", describe(record), problem)
                await asyncio.sleep(ASK_AGAIN)

    async def discard(self, record: AnyRecord) -> None:
        """Kill what runs.

        Raises: errors.TimedOut, when its processes do not end.
        """
        if record.run is not None and self.active(record):
            await self._kill(record)
        if self._starts.is_late(record):
            raise TimedOut("its start was given up, and what came of it has not ended yet; it is undone when it has")

    async def forget(self, record: AnyRecord) -> None:
        """What the supervisor keeps of a container that is gone goes: its end."""
        self._ends.pop(record.key, None)
        run = run_of(record)
        if run.attempt and not await self._starts.forgotten(record.id, run.attempt):
            self._tasks.linger(self._starts.forget_later(record.id, run.attempt))

    async def _kill(self, record: AnyRecord) -> None:
        if (starting := self._starts.under_way(record.key)) is not None:
            await asyncio.wait({starting})
        run, end = run_of(record), self._end_of(record)
        if run.state not in ("running", "stopping"):
            return
        await self._ask_to_kill(record, run)
        try:
            await asyncio.wait_for(end.wait(), self._operation_timeout)
        except TimeoutError:
            raise TimedOut(f"{self._waited_for(record)}{self._jobs.giving_up(record)}") from None

    async def _ask_to_kill(self, record: AnyRecord, run: Run) -> None:
        """Raises: errors.Problem; where it was not even asked, nobody has asked for the container's end."""
        asked, run.stop_requested = run.stop_requested, True
        try:
            await self._supervisor.kill(record.id, run.attempt)
        except NotFound:  # it has no process any more, and nobody is left to say so
            await self._finish(record, None)
        except TimedOut:
            raise
        except Problem:
            run.stop_requested = asked
            raise

    def _waited_for(self, record: AnyRecord) -> str:
        """Why a container that was killed has no end yet."""
        if (mount := self._syncing.get(record.key)) is not None:
            return (
                f"{describe(record)} has ended, but what it wrote to {describe(mount)} is still being synced: "
                f"{self._jobs.store(mount)} does not answer"
            )
        pid = run_of(record).pid
        return (
            f"{describe(record)} was killed, but process {pid} has not ended in {self._operation_timeout:g}s; see what "
            f"it waits for in /proc/{pid}/stack"
        )

    # -------------------------------------------------------------------------------------------------- a start

    def _take_back(self, record: AnyRecord) -> None:
        """A start that the last server's end has cut off has not been, but for its number and a line in the log."""
        run = record.run
        if run is not None and run.before is not None:
            record.run = msgspec.structs.replace(run.before, attempt=run.attempt)
            journal.say(record, CUT_OFF)
            self._ledger.note(record)

    # --------------------------------------------------------------------------------------------------- an end

    def _on_ended(self, ended: Ended) -> None:
        """The supervisor says that a first process has ended. It may say so before we know that it began."""
        record = self._graph.find(Key("container", ended.id))
        if record is None or run_of(record).attempt != ended.attempt:
            return
        if not self._starts.hear(record, ended):
            self._begin_to_finish(record, ended)

    def _begin_to_finish(self, record: AnyRecord, ended: Ended) -> None:
        self._tasks.spawn(self._finish(record, ended.exit_code, ended.finished_at))

    def _on_log(self, news: LogTrouble) -> None:
        """The supervisor says that a log does not take what its container prints, or does so again."""
        record = self._graph.find(Key("container", news.id))
        if (
            record is not None
            and run_of(record).attempt == news.attempt
            and run_of(record).state in ("running", "stopping")
        ):
            self._say_of_log(record, news.errno)

    def _say_of_log(self, record: AnyRecord, trouble: int) -> None:
        """Say why lines of the log are lost, or take that back; what else is wrong with the container stays."""
        problem = endings.log_problem(run_of(record), trouble)
        if record.problem != problem and (record.problem is None or endings.is_log_problem(record.problem)):
            self._ledger.note(record, problem=problem)

    async def _finish(self, record: AnyRecord, exit_code: int | None, at: str | None = None) -> None:
        """The container has ended, `at` a time that the supervisor knows: its file systems are synced, then its state
        says so. The end of a start that was given up says nothing new, nor does one that was heard of."""
        run = run_of(record)
        if run.state not in ("running", "stopping") or record.key in self._syncing:
            return
        finished = at or now()
        unsynced = await self._sync(record)
        if endings.is_clean(record, run, exit_code):
            run.state, problem = "exited", unsynced
        else:
            bereft = bool(self._mender.lost(record))
            reasons = (endings.complaint(run, exit_code, bereft=bereft), unsynced)
            run.state, problem = "dead", "; ".join(filter(None, reasons))
        run.pid = run.start_time = None
        run.exit_code, run.finished_at = exit_code, finished
        run.started_at = min(run.started_at or finished, finished)  # it may have ended before we knew that it began
        self._ledger.note(record, problem=problem)
        self._end_of(record).set()

    async def _sync(self, record: AnyRecord) -> str | None:
        """Have what the container wrote reach its store; what went wrong, if anything did."""
        root = self._graph.find(record.edges()[0])
        for mount in self._written(root) if root else ():
            self._syncing[record.key] = mount
            try:
                job = Job("sync", mount.facts.mountpoint)
                await self._jobs.run(self._jobs.store(mount), job, self._stop_timeout)
            except Problem as problem:
                return f"what it wrote to {describe(mount)} may not have reached its store: {problem.message}"
            finally:
                del self._syncing[record.key]
        return None

    def _written(self, mount: AnyRecord) -> list[AnyRecord]:
        """The persistent mounts that the container could write to: of an overlay its upper, if it is in one."""
        definition = mount.definition
        if isinstance(definition, Tmpfs) or driver("mount", mount.kind).read_only(definition):
            return []
        if isinstance(definition, Overlay):
            upper = None if definition.upper is None else self._graph.find(mount.edges()[-1])
            return [] if upper is None else self._written(upper)
        on = [below for below in self._graph.below(mount.key) if below.key.collection == "attach"]
        if on and all(driver("attach", one.kind).read_only(one.definition) for one in on):
            return []
        return [mount]

    # ------------------------------------------------------------------------------------------------- adoption

    def _adopt(self, record: AnyRecord, life: Life) -> bool:
        """Take up what the supervisor knows of a container; False when it is none that we meant to run."""
        run = record.run
        if run is None or run.attempt != life.attempt or run.state in ("exited", "dead"):
            return run is not None and run.attempt == life.attempt and not life.running
        if run.state == "created":
            run.state, run.before, record.problem = "running", None, None
            run.started_at = max(time_of(life.start_time), run.created_at or "")
        run.pid, run.start_time = life.pid, life.start_time
        self._ledger.note(record)
        if life.running and life.log_trouble is not None:
            self._say_of_log(record, life.log_trouble)
        if not life.running:
            self._tasks.spawn(self._finish(record, life.exit_code, life.finished_at))
        elif run.stop_requested:
            self._tasks.linger(self._stop(record))
        return True

    async def _dismiss(self, life: Life) -> None:
        """End what the supervisor runs and no record means, so that what it stands on can go."""
        try:
            await self._supervisor.undo(life.id, life.attempt, self._operation_timeout)
        except Problem as problem:
            log.error("process %d belongs to no container, and does not end: %s", life.pid, problem.message)
            await self._starts.forget_later(life.id, life.attempt)

    def _end_of(self, record: AnyRecord) -> asyncio.Event:
        """What is set when the container's present run has ended."""
        return self._ends.setdefault(record.key, asyncio.Event())
