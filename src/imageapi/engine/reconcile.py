"""At start: what the last server intended, and what stands in the kernel, are made one.

What matches is adopted, what was half done is undone, what is gone is told to its users, and what carries our mark and
has no record is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from imageapi.drivers.base import LOCAL_STORE
from imageapi.engine.auditor import NEEDED, Auditor
from imageapi.engine.collect import Collector
from imageapi.engine.containers import Containers
from imageapi.engine.jobs import Jobs
from imageapi.engine.ledger import Ledger
from imageapi.engine.mending import Mender
from imageapi.engine.pool import Job
from imageapi.engine.tasks import Tasks
from imageapi.engine.watch import Watch
from imageapi.errors import Problem
from imageapi.records import AnyRecord, Phase
from imageapi.spec import Container
from imageapi.store import Store

log = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds that a start waits for what a dead store may hold up."""


class Reconciler:
    """The start of one engine."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        jobs: Jobs,
        containers: Containers,
        collector: Collector,
        auditor: Auditor,
        mender: Mender,
        tasks: Tasks,
        boot_id: str,
    ) -> None:
        self._ledger = ledger
        self._graph = ledger.graph
        self._store = store
        self._jobs = jobs
        self._containers = containers
        self._collector = collector
        self._auditor = auditor
        self._mender = mender
        self._tasks = tasks
        self._boot_id = boot_id

    async def reconcile(self, watch: Watch | None) -> bool:
        """Returns when every record says what is so; what must still be undone, and a store does not let go of now, is
        under way. Whether all could be looked at."""
        self._load()
        with contextlib.suppress(OSError):
            self._ledger.write_counters()  # over these it takes no room
        await self._containers.connect()
        for record in self._graph.all("attach"):
            self._mender.watch(record)
        looked = await self._auditor.look(watch, PATIENCE)
        await asyncio.wait({self._tasks.linger(self._collect())}, timeout=PATIENCE)
        await self._sweep()
        return looked

    def _load(self) -> None:
        """Enter all records. Those of an earlier boot have nothing in the kernel: they are only undone, since their
        directories may have outlived it."""
        self._graph.count_on(self._store.counters())
        contents = self._store.load()
        self._graph.set_aside(contents.hidden())
        for record in contents.records:
            unfinished = record.phase in (Phase.PLANNED, Phase.ACQUIRING)
            if unfinished or record.boot_id != self._boot_id:
                record.pinned = False
                record.phase = Phase.ACQUIRING
            elif record.phase is Phase.RELEASING:
                record.phase = Phase.LIVE
                record.pinned = False
            self._graph.add(record, hidden=unfinished)
        for record in self._graph.all():
            if not self._still_wrong(record):
                record.problem = None

    def _still_wrong(self, record: AnyRecord) -> bool:
        """Whether a problem noted by the last server cannot be found out again: why a container ended, or what has
        been taken from under an object."""
        if record.phase is not Phase.LIVE or record.problem is None:
            return False
        bereft = any(self._graph.find(key) is None for key in record.edges())
        if not isinstance(record.spec, Container):
            return bereft
        run = record.run and (record.run.before or record.run)
        return bereft or NEEDED not in record.problem or (run is not None and run.state == "dead")

    async def _collect(self) -> None:
        """Undo what was half done, and what nothing needs: the root of an unfinished create has no reference. What an
        object with a record that cannot be read stands on has none either."""
        unfinished = [record for record in self._graph.all() if record.phase is not Phase.LIVE]
        loose = [record for record in self._graph.all() if not (self._graph.held(record.key) or self._graph.aside)]
        keys = [record.key for record in (*unfinished, *loose)]
        await self._collector.collect(dict.fromkeys(keys))
        for record in unfinished:
            if self._graph.find(record.key) is record and record.phase is not Phase.RELEASING:
                self._ledger.expose(record, "its making was interrupted; delete it, and make it again")

    async def _sweep(self) -> None:
        try:
            removed = await self._jobs.run(LOCAL_STORE, Job("sweep"), PATIENCE)
        except Problem as problem:
            log.error("what is left without a record is not swept: %s", problem.message)
            return
        for what in removed:
            log.warning("removed %s, which had our mark and no record", what)
