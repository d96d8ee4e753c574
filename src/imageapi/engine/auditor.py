"""What somebody else does to our objects is seen, said of them and of all that stands on them, and taken back when it
is over. The same is done at the start, for all that has happened while no server ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator

from imageapi.engine import rundir
from imageapi.engine.audit import Finding, Found, Look, Report
from imageapi.engine.containers import Containers
from imageapi.engine.graph import describe
from imageapi.engine.jobs import Jobs
from imageapi.engine.ledger import Ledger
from imageapi.engine.mending import Mender
from imageapi.engine.pool import APART, Job
from imageapi.engine.watch import Watch
from imageapi.errors import Problem
from imageapi.records import AnyRecord, Key, Phase

log = logging.getLogger(__name__)

NEEDED = ", which it needs, "
"""What is in every sentence about the loss of something else."""
SETTLE = 0.5
"""Seconds from a sign of a change, and from the last of what we do ourselves, to the look: most signs are our own."""
BUSIEST = 3.0
"""Seconds that a look is put off by what we do ourselves, at the most."""
SHARE = 10
"""A look that took long is followed by a pause of so many times that, but for no longer than LONGEST_PAUSE."""
LONGEST_PAUSE = 3.0
"""Seconds: on a host with too much to do a look takes long as well, and what has changed is to be told all the same."""
AGAIN = 30.0
"""Seconds until the next look after one that failed."""
LONGEST = 25.0
"""Seconds for a look, or a report, however few a request has."""


class Auditor:
    """The looks of one engine."""

    def __init__(self, ledger: Ledger, jobs: Jobs, containers: Containers, mender: Mender, boot_id: str) -> None:
        self._ledger = ledger
        self._graph = ledger.graph
        self._jobs = jobs
        self._containers = containers
        self._mender = mender
        self._boot_id = boot_id
        self._told: dict[Key, str] = {}
        """What was last said of each object, so that it can be taken back."""
        self._restored = False
        """Whether directories were made again whose files are still missing."""

    async def follow(self, watch: Watch, *, looked: bool) -> None:
        """Look whenever the host has changed, for ever. The first look may have been `looked` already."""
        pause = SETTLE if looked else await self._look_at_last(watch)
        while True:
            await watch.changed()
            await self._settle(pause)
            pause = await self._look_at_last(watch)

    async def _settle(self, pause: float) -> None:
        end = time.monotonic() + max(pause, BUSIEST)
        await asyncio.sleep(pause)
        while (now := time.monotonic()) < min(end, until := self._jobs.ended + SETTLE):
            await asyncio.sleep(min(end, until) - now)

    async def _look_at_last(self, watch: Watch) -> float:
        """Look, however often that fails; the seconds until the next time."""
        while True:
            begun = time.monotonic()
            if await self.look(watch):
                return min(max(SETTLE, SHARE * (time.monotonic() - begun)), LONGEST_PAUSE)
            await asyncio.sleep(AGAIN)

    async def look(self, watch: Watch | None, patience: float = LONGEST) -> bool:
        """Compare all records with the host, and say what is wrong; whether that could be done, within `patience`
        seconds."""
        if watch is not None:
            watch.arm()
        self._restored |= self._restore_directories()
        try:
            job = Job("audit", self._boot_id, watch.instance if watch else -1)
            seen: Look = await self._jobs.run(APART, job, patience)
        except Problem as problem:
            log.error("what has become of the objects could not be looked at: %s", problem.message)
            return False
        if watch is not None:
            watch.keep(seen.watches)
        self._write_again(seen.written)
        if self._restored:
            await self._restore_files()
            self._restored = False
        self._say(dict(self._verdicts(seen.findings)))
        return True

    def _write_again(self, written: set[Key]) -> None:
        """The records that somebody has removed, so that the next server knows of the objects."""
        for record in self._graph.all():
            if record.phase is Phase.LIVE and record.key not in written:
                self._ledger.note(record)

    def _restore_directories(self) -> bool:
        """Make again what somebody has removed of the run directory; whether anything was. No worker does this: it may
        come to it after our end, when whoever has stopped us may have removed the directory for good."""
        with contextlib.suppress(OSError):
            return rundir.restore(self._ledger.site)
        return False

    async def _restore_files(self) -> None:
        """What lies beside the records, when a part of the run directory was missing."""
        log.warning("a part of %s was removed by somebody, and has been made again", self._ledger.site.run_dir)
        with contextlib.suppress(Problem, OSError):
            rundir.sign(self._ledger.site.run_dir)
            self._ledger.write_counters(anew=True)
            await self._containers.restore()

    async def check(self) -> Report:
        """The leak report, without what is being done just now. Raises: errors.Problem."""
        report: Report = await self._jobs.run(APART, Job("check", self._boot_id), LONGEST)
        return report._replace(found=[one for one in report.found if self._is_left(one)])

    def _is_left(self, one: Found) -> bool:
        if isinstance(one.of, Key) and self._graph.find(one.of) is not None:
            return False
        if isinstance(one.of, int) and self._graph.token_taken(one.of):
            return False
        record = None if one.about is None else self._graph.find(one.about)
        return one.about is None or (record is not None and (record.phase is Phase.LIVE or record.problem is not None))

    def _verdicts(self, findings: list[Finding]) -> Iterator[tuple[Key, str]]:
        """What is to be said of which object: first of those that something is wrong with, then of those above."""
        standing = [(record, found.wrong) for found in findings if (record := self._standing(found))]
        for record, wrong in standing:
            if wrong.loss is not None:
                loss = f"{describe(record)}{NEEDED}{wrong.loss}"
                yield from ((user.key, loss) for user in self._users(record))
        yield from ((record.key, wrong.problem) for record, wrong in standing)

    def _standing(self, found: Finding) -> AnyRecord | None:
        """The record, unless something is, or was, done to the object by ourselves since it was looked at, or it is to
        be mended, of which the mender speaks."""
        record = self._graph.find(found.key)
        if record is None or record.token != found.token or record.phase is not Phase.LIVE:
            return None
        return None if self._jobs.under_way(found.key) or self._mender.is_lost(record) else record

    def _users(self, record: AnyRecord) -> list[AnyRecord]:
        """All that stands on the object, all the way up."""
        found = {record.key: record}
        waiting = [record]
        for one in waiting:
            users = [user for user in self._graph.holders(one.key) if user.key not in found]
            waiting += users
            found |= {user.key: user for user in users}
        return [user for user in waiting[1:] if user.phase is Phase.LIVE]

    def _say(self, verdicts: dict[Key, str]) -> None:
        for key in [*verdicts, *(self._told.keys() - verdicts.keys())]:
            if record := self._graph.find(key):
                self._change(record, verdicts.get(key))
        self._told = verdicts

    def _change(self, record: AnyRecord, verdict: str | None) -> None:
        """Say of an object what is wrong with it now. What it is said to have for another reason stays."""
        if record.problem == verdict or record.problem not in (None, self._told.get(record.key)):
            return
        if verdict is None:
            log.info("%s is as it should be again", describe(record))
            self._ledger.note(record, problem=None)
        elif record.facts.helper is not None:
            self._mender.lose(record, verdict)
        else:
            log.warning("%s: %s", describe(record), verdict)
            self._ledger.fault([record.key], verdict)
