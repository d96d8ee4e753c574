"""At start: what the last server intended, and what stands in the kernel, are made one.

What matches is adopted, what was half done is undone, what is gone is told to its users, and what carries our mark and
has no record is removed.
"""

from __future__ import annotations

import asyncio
import logging

from imageapi.drivers.base import LOCAL_STORE
from imageapi.engine.collect import Collector
from imageapi.engine.containers import Containers
from imageapi.engine.graph import describe
from imageapi.engine.jobs import Jobs
from imageapi.engine.ledger import Ledger
from imageapi.engine.pool import Job
from imageapi.errors import Problem
from imageapi.records import AnyRecord, Phase
from imageapi.spec import Container
from imageapi.store import Store

log = logging.getLogger(__name__)


class Reconciler:
    """The start of one engine."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        jobs: Jobs,
        containers: Containers,
        collector: Collector,
        boot_id: str,
    ) -> None:
        self._ledger = ledger
        self._graph = ledger.graph
        self._store = store
        self._jobs = jobs
        self._containers = containers
        self._collector = collector
        self._boot_id = boot_id

    async def reconcile(self) -> None:
        """Returns when every record says what is so; what must still be undone is under way."""
        self._load()
        await self._containers.connect()
        await self._observe()
        await self._collect()
        await self._sweep()

    def _load(self) -> None:
        """Enter all records. Those of an earlier boot have nothing in the kernel: they are only undone, since their
        directories may have outlived it."""
        self._graph.count_on(self._store.counters())
        for record in self._store.load():
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
        if record.phase is not Phase.LIVE:
            return False
        return isinstance(record.spec, Container) or any(self._graph.find(key) is None for key in record.edges())

    async def _observe(self) -> None:
        live = [
            record
            for record in self._graph.all()
            if record.phase is Phase.LIVE and not isinstance(record.spec, Container)
        ]
        await asyncio.gather(*(self._check(record) for record in live))

    async def _check(self, record: AnyRecord) -> None:
        """Say of an object what has become of it while no server ran."""
        try:
            facts = await self._jobs.drive("observe", record)
        except Problem as problem:
            self._ledger.fault([record.key], f"it could not be looked at: {problem.message}")
            return
        if facts is None:
            self._ledger.fault([record.key], "it is gone from the kernel; delete it, and make it again")
            users = (user.key for user in self._graph.holders(record.key) if user.problem is None)
            self._ledger.fault(users, f"{describe(record)}, which it needs, is gone from the kernel")
            log.warning("%s is gone from the kernel", describe(record))

    async def _collect(self) -> None:
        """Undo what was half done, and what nothing needs: the root of an unfinished create has no reference."""
        unfinished = [record for record in self._graph.all() if record.phase is not Phase.LIVE]
        loose = [record for record in self._graph.all() if not self._graph.held(record.key)]
        keys = [record.key for record in (*unfinished, *loose)]
        await self._collector.collect(dict.fromkeys(keys))
        for record in unfinished:
            if self._graph.find(record.key) is record and record.phase is not Phase.RELEASING:
                self._ledger.fault([record.key], "its making was interrupted; delete it, and make it again")

    async def _sweep(self) -> None:
        records = self._graph.all()
        keys = {record.key for record in records}
        tokens = {record.token for record in records}
        try:
            removed = await self._jobs.run(LOCAL_STORE, Job("sweep", keys, tokens))
        except Problem as problem:
            log.error("what is left without a record is not swept: %s", problem.message)
            return
        for what in removed:
            log.warning("removed %s, which had our mark and no record", what)
