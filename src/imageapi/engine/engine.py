"""What the service does, in five verbs; the one page that wires the engine's parts together."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

from imageapi.config import Config, Site
from imageapi.engine.apply import Applier
from imageapi.engine.audit import Found
from imageapi.engine.auditor import Auditor
from imageapi.engine.collect import Collector
from imageapi.engine.containers import Containers
from imageapi.engine.graph import Graph, Picture, describe
from imageapi.engine.jobs import RELEASES, Jobs
from imageapi.engine.ledger import Ledger
from imageapi.engine.mending import Mender
from imageapi.engine.pool import Job, NoWorker, Pool
from imageapi.engine.reconcile import Reconciler
from imageapi.engine.tasks import Tasks
from imageapi.engine.watch import Watch
from imageapi.errors import Conflict, Invalid, NotFound, Problem, TimedOut, Unsupported
from imageapi.records import AnyRecord, Key, Phase, snapshot
from imageapi.runtime import command
from imageapi.spec import Container, Finding, Object, Progress
from imageapi.store import Store

log = logging.getLogger(__name__)

LOOK_AGAIN = 0.05
"""Seconds between two looks whether the kernel has let go of the last object."""
STEPS = {"acquire": "making", **dict.fromkeys(RELEASES, "releasing")}
"""What a job is called that has not said how far it is."""
HUNG = "see which storage does not answer, and ask again"


class Engine:
    """The objects of one run directory. All of it lives in one event loop."""

    def __init__(self, config: Config, site: Site, pool: Pool, boot_id: str) -> None:
        store = Store(site.state_dir)
        self._config = config
        self._pool = pool
        self._tasks = Tasks()
        self._graph = Graph(config.first_id)
        self._ledger = Ledger(self._graph, store, site, boot_id)
        self._jobs = Jobs(pool, self._graph, config.operation_timeout)
        self._mender = Mender(self._ledger, self._jobs, self._tasks)
        self._containers = Containers(self._ledger, self._jobs, self._tasks, self._mender, pool, config)
        self._collector = Collector(self._ledger, self._jobs, self._containers, self._mender, self._tasks)
        self._applier = Applier(
            self._ledger,
            self._jobs,
            self._containers,
            self._collector,
            self._mender,
            self._tasks,
            config.operation_timeout,
        )
        self._auditor = Auditor(self._ledger, self._jobs, self._containers, self._mender, boot_id)
        self._reconciler = Reconciler(
            self._ledger,
            store,
            self._jobs,
            self._containers,
            self._collector,
            self._auditor,
            self._mender,
            self._tasks,
            boot_id,
        )

    async def start(self, watch: Watch | None = None) -> None:
        """Make records and kernel agree, and go on where the last server stopped. From now on `watch` tells when they
        may have come to disagree again."""
        looked = await self._reconciler.reconcile(watch)
        if watch is not None:
            self._tasks.linger(self._auditor.follow(watch, looked=looked))

    async def stop(self) -> None:
        """Let what is under way end, if anything still can; containers run on."""
        self._mender.close()
        await self._tasks.drain(0.0 if self._pool.lost else self._config.cleanup_timeout)
        await self._containers.leave()
        self._ledger.close()
        self._pool.close()

    async def shut_down(self) -> list[str]:
        """Stop all containers, as a request would, and release everything, since the host is going down; what the
        kernel has not let go, a sentence each."""
        await asyncio.gather(*(self._containers.end(record) for record in self._graph.all("container")))
        for record in self._graph.all():
            self._ledger.note(record, pinned=False)
        await self._collector.collect([record.key for record in self._graph.all()])
        deadline = time.monotonic() + self._config.cleanup_timeout
        while self._graph.all() and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_AGAIN)  # what is busy is tried again by itself
        left = self._graph.all()
        return [f"{describe(one)}: {one.problem}" for one in left if one.problem] or [describe(one) for one in left]

    # ------------------------------------------------------------------------------------------------ reading

    def summary(self) -> str:
        """What there is, for a line of status."""
        active = sum(self._containers.active(record) for record in self._graph.all("container"))
        mounts, attachments = (len(self._graph.all(collection)) for collection in ("mount", "attach"))
        return f"{active} containers run, on {mounts} mounts and {attachments} attachments"

    def picture(self, key: Key) -> Picture:
        """The object as it is now.

        Raises: errors.NotFound.
        """
        return self._graph.picture(key)

    def pictures(self, collection: str) -> list[Picture]:
        """The objects of a collection, in order of id."""
        return self._graph.pictures(collection)

    def named(self, name: str) -> Key:
        """The container of this name.

        Raises: errors.NotFound.
        """
        key = self._graph.named(name)
        if key is None:
            raise NotFound(f"there is no container named '{name}'")
        return self._graph.visible(key).key

    def progress(self) -> list[Progress]:
        """What is being made or released now, the oldest first."""
        return [
            _told(job, record, shown=self._graph.is_shown(record.key))
            for job in self._jobs.doing()
            if job.name in STEPS and (record := job.about)
        ]

    async def check(self) -> list[Finding]:
        """What is not as it should be on the host, and what could not be looked at.

        Raises: errors.Problem.
        """
        report = await self._auditor.check()
        hung = [Finding(problem=f"could not look at {name}: {why}", remedy=HUNG) for name, why in report.unseen.items()]
        return [*map(_finding, report.found), *hung]

    # ----------------------------------------------------------------------------------------------- changing

    async def create(self, thing: Object) -> Picture:
        """Make an object and all that it nests. Cancelling the caller undoes it.

        Raises: errors.Problem, and then nothing is left.
        """
        if isinstance(thing, Container):
            command.split(thing.command)  # one that could never run is refused before it is defined
        record = await self._applier.create(thing)
        return self._graph.picture(record.key)

    async def delete(self, key: Key, *, force: bool) -> Picture:
        """Delete an object and all that only it held; the object as it last was. Goes on when the caller is cancelled.

        Raises: errors.Problem, and then nothing has changed.
        """
        return await self._tasks.through(self._delete(key, force=force))

    async def request_state(self, key: Key, state: str) -> Picture:
        """Ask a container for `running` or `exited`. Goes on when the caller is cancelled.

        Raises: errors.Problem.
        """
        record = self._graph.visible(key)
        if not isinstance(record.spec, Container):
            raise Invalid(f"{record.key} is no container: it has no state")
        if state == "paused":
            raise Unsupported("'paused' is not there yet; ask for 'running' or 'exited'")
        if state not in ("running", "exited"):
            raise Invalid(f"'{state}' cannot be asked for; ask for 'running' or 'exited'")
        request = self._containers.start if state == "running" else self._containers.stop
        return await self._tasks.through(request(record))

    async def _delete(self, key: Key, *, force: bool) -> Picture:
        record = await self._deletable(key)
        holders = self._graph.holders(key)
        self._check_holders(record, holders, force=force)
        if isinstance(record.spec, Container):
            self._containers.check_deletable(record, force=force)
        before = record.phase, record.problem
        last = self._graph.still(key)
        self._ledger.leave(record)
        try:
            await self._collector.release(record, "delete")
        except Problem as problem:
            await self._keep(record, before, problem)
            raise
        last.records[key] = snapshot(record, phase=before[0], problem=record.problem or before[1])
        await self._collector.forget(record)
        return last

    async def _keep(self, record: AnyRecord, before: tuple[Phase, str | None], problem: Problem) -> None:
        """What is left of an object whose delete failed: all of it, as it was; or part of it, and that still goes."""
        begun = not isinstance(problem, NoWorker)
        if begun and (isinstance(problem, TimedOut) or not await self._stands(record)):
            self._ledger.note(record, pinned=False)
            self._collector.put_off(record, problem)
        else:
            self._ledger.note(record, phase=before[0], problem=record.problem or before[1])
            self._mender.resume(record)

    async def _stands(self, record: AnyRecord) -> bool:
        """Whether the kernel still has the whole object."""
        if isinstance(record.spec, Container):
            return True
        try:
            return await self._jobs.drive("observe", record) is not None
        except Problem as unknown:
            log.warning("%s cannot be looked at: %s", describe(record), unknown.message)
            return False

    async def _deletable(self, key: Key) -> AnyRecord:
        """The record, once nobody else is deleting it.

        Raises: errors.NotFound; errors.Conflict while the kernel keeps it.
        """
        self._graph.visible(key)
        record = await self._ledger.rest(key)
        if record is None:
            raise NotFound(f"{key} has just been deleted")
        if record.phase is Phase.RELEASING:
            raise Conflict(f"{describe(record)}: {record.problem}; it is tried again by itself")
        return record

    def _check_holders(self, record: AnyRecord, holders: list[AnyRecord], *, force: bool) -> None:
        """Refuse to delete what something stands on; force overrides only those that do not use it."""
        using = [holder for holder in holders if self._uses(holder)] if force else holders
        if not using:
            return
        names = [describe(holder) for holder in using]
        hint = "delete those first" if record.pinned else "it goes with the last of those"
        raise Conflict(f"{describe(record)} is held by {', '.join(names)}; {hint}", holders=names)

    def _uses(self, holder: AnyRecord) -> bool:
        """Whether the holder stands on the object in the kernel, and would break without it."""
        if isinstance(holder.spec, Container):
            return self._containers.active(holder)
        return holder.phase is not Phase.LIVE or holder.problem is None


def _finding(found: Found) -> Finding:
    collection, number = found.about or (None, None)
    return Finding(collection=collection, id=number, problem=found.problem, remedy=found.remedy)


def _told(job: Job, record: AnyRecord, *, shown: bool) -> Progress:
    """A job as it is shown. The id of what is not made yet is not: it may become another's."""
    said = job.progress
    return Progress(
        collection=record.key.collection,
        id=record.id if shown else None,
        kind=record.kind,
        step=said.step if said else STEPS[job.name],
        done=said.done if said else None,
        total=said.total if said else None,
        since=datetime.fromtimestamp(job.since, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )
