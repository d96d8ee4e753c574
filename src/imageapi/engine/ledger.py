"""The graph and its files, changed together: the one place where a record changes.

Whoever waits for an object to come to rest (to live, to be gone, or to wait for the kernel) waits here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from imageapi import errors
from imageapi.config import Site
from imageapi.engine.graph import Graph
from imageapi.engine.plan import Plan
from imageapi.records import AnyRecord, Key, Phase
from imageapi.store import Store

log = logging.getLogger(__name__)

MOVING = (Phase.PLANNED, Phase.ACQUIRING, Phase.RELEASING)
REWRITE = 0.5
"""Seconds until what could not be written is tried again."""


def resting(record: AnyRecord | None) -> bool:
    """Whether nothing is being done to an object: it lives, is gone, or waits for the kernel with its problem."""
    return record is None or record.phase not in MOVING or record.problem is not None


class Ledger:
    """The records of one server, in memory and on disk. What the disk does not take (it is full, or read-only) is
    written when it does: the two part only for that long."""

    def __init__(self, graph: Graph, store: Store, site: Site, boot_id: str) -> None:
        self.graph = graph
        self.site = site
        self._store = store
        self._boot_id = boot_id
        self._waiting: defaultdict[Key, list[asyncio.Future[None]]] = defaultdict(list)
        self._unwritten: set[Key] = set()
        self._rewriting: asyncio.TimerHandle | None = None

    def draw_token(self) -> int:
        """A number that no other object's directories carry."""
        while self.graph.token_taken(token := int.from_bytes(os.urandom(8), "big") % 10**9):
            pass
        return token

    def claim(self, plan: Plan) -> None:
        """Enter a plan: names are taken and edges hold from now on, though nothing is shown yet.

        Raises: errors.Problem, when the records cannot be written.
        """
        for record in plan.steps:
            record.boot_id = self._boot_id
        try:
            self._store.save_all(plan.steps)
        except OSError as error:
            raise errors.from_oserror(error, "writing the records of the request") from error
        for record in plan.steps:
            self.graph.add(record, hidden=True)
        self.graph.begin(plan.root.key)

    def publish(self, plan: Plan) -> None:
        """The create has succeeded: the root has its own reference, and it is shown with all it stands on, also what
        another request is making and this one shares."""
        if plan.root.run is not None:
            plan.root.run.untold = False
        self.change(plan.root, pinned=True)
        self.graph.end(plan.root.key)
        for record in (plan.root, *self.graph.below(plan.root.key)):
            self.graph.show(record.key)

    def abandon(self, plan: Plan) -> None:
        """The create has come to nothing: it needs its root no more."""
        plan.root.pinned = False
        if plan.root.run is not None:
            plan.root.run.untold = True
        self.graph.end(plan.root.key)

    def change(self, record: AnyRecord, **changes: Any) -> None:
        """Set fields of a record and write it. One that was dropped meanwhile is not written again: it would be taken
        for an object at the next start.

        Raises: errors.Problem when it cannot be written now; it is changed in memory all the same.
        """
        for name, value in changes.items():
            setattr(record, name, value)
        if self.graph.find(record.key) is not record:
            return
        try:
            self._store.save(record)
        except OSError as error:
            self._write_later(record.key)
            raise errors.from_oserror(error, f"writing the record of {record.key}") from error
        finally:
            self._wake(record.key)

    def note(self, record: AnyRecord, **changes: Any) -> None:
        """The same for what has happened already and cannot be taken back. Should the server end before the record
        can be written, the next one learns from the kernel what it would have said."""
        try:
            self.change(record, **changes)
        except errors.Problem as problem:
            log.error("%s", problem.message)

    def leave(self, record: AnyRecord) -> None:
        """An object is on its way out. That needs no room, but a disk that can be written.

        Raises: errors.Exhausted, when it is read-only: nothing has changed then.
        """
        before = record.phase, record.problem
        try:
            self.change(record, phase=Phase.RELEASING, problem=None)
        except errors.Problem as problem:
            if problem.fields.get("errno") == "EROFS":
                record.phase, record.problem = before
                raise
            log.error("%s", problem.message)

    def spare(self, record: AnyRecord) -> None:
        """An object that was on its way out stays: on disk it lives all the time."""
        record.phase = Phase.LIVE
        self._wake(record.key)

    def drop(self, key: Key) -> None:
        """Forget an object that is gone from the kernel. The ids to come are written before its own is gone."""
        self.graph.remove(key)
        try:
            self.write_counters()
            self._store.remove(key)
        except OSError as error:
            log.error("the record of %s is not removed yet: %s", key, error)
            self._write_later(key)
        self._wake(key)

    def write_counters(self, *, anew: bool = False) -> None:
        """Write the ids to come, also if that was done, where it is to be done `anew`. Raises: OSError."""
        self._store.save_counters(self.graph.counters(), anew=anew)

    def _write_later(self, key: Key) -> None:
        self._unwritten.add(key)
        if self._rewriting is None:
            self._rewriting = asyncio.get_running_loop().call_later(REWRITE, self._write_again)

    def _write_again(self) -> None:
        """Write what could not be, as it is now: an object that is gone has no record."""
        self._rewriting = None
        for key in list(self._unwritten):
            try:
                self._write(key)
            except OSError:
                self._write_later(key)
                return
            self._unwritten.discard(key)
        log.warning("all records are written again")

    def _write(self, key: Key) -> None:
        record = self.graph.find(key)
        if record is not None:
            self._store.save(record)
        else:
            self.write_counters()
            self._store.remove(key)

    def close(self) -> None:
        """Write for the last time what could not be."""
        if self._rewriting is not None:
            self._rewriting.cancel()
            self._write_again()
            if self._rewriting is not None:
                self._rewriting.cancel()

    def fault(self, keys: Iterable[Key], problem: str) -> None:
        """Tell of each object what is wrong with it. One whose create is under way is not shown for that."""
        for key in keys:
            if record := self.graph.find(key):
                self.note(record, problem=errors.legible(problem))

    def expose(self, record: AnyRecord, problem: str) -> None:
        """Show an object with what is wrong with it, also when its create has come to nothing."""
        self.graph.show(record.key)
        self.note(record, problem=problem)

    async def rest(self, key: Key) -> AnyRecord | None:
        """Wait until nothing is being done to the object; its record, or None when it is gone."""
        while not resting(record := self.graph.find(key)):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[key].append(waiter)
            await waiter
        return record

    def _wake(self, key: Key) -> None:
        for waiter in self._waiting.pop(key, ()):
            if not waiter.done():
                waiter.set_result(None)
