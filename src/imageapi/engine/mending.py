"""Objects that a helper serves: its end is noticed at once, and they are mended without being asked.

A helper's pidfd is watched, so that nobody has to look. Each image of a helper that has ended shows its problem until
it is mended, as do the objects right on it; one store's are mended one after another, and what fails is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator

from imageapi.drivers.base import LOCAL_STORE
from imageapi.engine.graph import describe
from imageapi.engine.jobs import Jobs
from imageapi.engine.ledger import Ledger
from imageapi.engine.pool import Job
from imageapi.engine.tasks import Tasks
from imageapi.errors import Conflict, Problem
from imageapi.linux import pidfd
from imageapi.records import AnyRecord, Facts, Helper, Key, Phase

log = logging.getLogger(__name__)

FIRST_RETRY = 0.1
LAST_RETRY = 5.0
"""Seconds between two tries to mend something of one store: doubled each time up to the last."""
PATIENCE = 2.0
"""Seconds for a process to end, or a mount to go, before the store below is taken for silent."""
SEVERED = "its store did not answer, and it was cut off from it to end what used it; it is being mended"
ENDED = "its storage helper has ended; it is being mended"


class Mender:
    """The mender of one engine."""

    def __init__(self, ledger: Ledger, jobs: Jobs, tasks: Tasks) -> None:
        self._ledger = ledger
        self._graph = ledger.graph
        self._jobs = jobs
        self._tasks = tasks
        self._watched: dict[Helper, tuple[int, set[Key]]] = {}
        self._lost: dict[str, deque[AnyRecord]] = {}
        self._menders: dict[str, asyncio.Task[None]] = {}
        self._told: dict[Key, str] = {}
        self._hopeless: dict[Key, Helper | None] = {}
        self._aside: dict[Key, str] = {}
        """What has been lost of objects that are on their way out."""
        self._ending: Counter[Key] = Counter()
        self._severing: set[Key] = set()
        self._closed = False

    def close(self) -> None:
        """Watch nothing any more."""
        self._closed = True
        for helper in list(self._watched):
            self._unwatch(helper)

    # ------------------------------------------------------------------------------------------- what is noticed

    def watch(self, record: AnyRecord) -> bool:
        """Notice when the object's helper ends, if it has one; False when it has ended already."""
        helper = record.facts.helper
        if helper is None or record.phase is not Phase.LIVE or self._closed:
            return True
        try:
            lives = helper in self._watched or self._begin_to_watch(helper)
        except OSError as error:
            log.warning("the end of the storage helper of %s would not be noticed now: %s", describe(record), error)
            asyncio.get_running_loop().call_later(LAST_RETRY, self.watch, record)
            return True
        if lives:
            self._watched[helper][1].add(record.key)
        else:
            self.lose(record)
        return lives

    def _begin_to_watch(self, helper: Helper) -> bool:
        """False when it has ended. Raises: OSError, when the host does not let us know."""
        if (descriptor := _opened(helper)) is None:
            return False
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, descriptor)
            asyncio.get_running_loop().add_reader(descriptor, self._ended, helper)
            undo.pop_all()
        self._watched[helper] = descriptor, set()
        return True

    def _ended(self, helper: Helper) -> None:
        """Those whose helper it still is have lost it; a helper also ends when it is not needed any more."""
        for key in self._unwatch(helper):
            record = self._graph.find(key)
            if record is not None and record.facts.helper == helper:
                self.lose(record)

    def _unwatch(self, helper: Helper) -> set[Key]:
        descriptor, keys = self._watched.pop(helper)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        return keys

    def forget(self, record: AnyRecord) -> None:
        """The object is gone: its id may become another's."""
        for kept in (self._told, self._hopeless, self._aside):
            kept.pop(record.key, None)
        helper = record.facts.helper
        if helper is not None and helper in self._watched:
            self._watched[helper][1].discard(record.key)
            if not self._watched[helper][1]:
                self._unwatch(helper)

    # ------------------------------------------------------------------------------------------------- relieving

    @contextlib.contextmanager
    def relieving(self, *records: AnyRecord) -> Iterator[None]:
        """What is done within ends objects, and may wait for a store that is silent: see `relieve`, which comes each
        `PATIENCE`, since it may have to wait until others that use the store are being ended, too."""
        relief = _Repeated(PATIENCE, lambda: self.relieve(*records))
        keys = [record.key for record in records]
        self._ending.update(keys)
        try:
            yield
        finally:
            relief.cancel()
            self._ending.subtract(keys)
            for key in keys:
                if not self._ending[key]:
                    del self._ending[key]

    def relieve(self, *records: AnyRecord) -> None:
        """Objects do not end. A process that reads from a store that is silent cannot be killed, nor its file system
        unmounted: so of such a store what nothing else uses is severed, and they get an error instead."""
        for record in {below.key: below for below in self._below(records)}.values():
            if record.facts.helper is not None and record.key not in self._severing and not self._is_used(record):
                self._severing.add(record.key)
                self._tasks.linger(self._sever(record))

    # ------------------------------------------------------------------------------------------------ recovering

    async def recover(self, record: AnyRecord) -> bool:
        """Whether something below the object has lost its helper, so that what has failed may be tried again now."""
        lost = self.lost(record)
        await self.mended(lost)
        return bool(lost)

    def lost(self, *records: AnyRecord) -> set[str]:
        """The stores of those, among the objects and all below them, whose helper has ended, and which are not as
        before yet; names, that is."""
        below = {one.key: one for one in self._below(records)}
        return {self._jobs.store(one) for one in below.values() if self.is_lost(one)}

    def is_lost(self, record: AnyRecord) -> bool:
        """Whether the object has lost its helper, which may be found here before its end has been told."""
        helper = record.facts.helper
        if helper is None:
            return False
        if not _lives(helper):
            self.lose(record)
            return True
        return record.key in self._told or self._waits(record)

    async def mended(self, stores: Collection[str]) -> None:
        """Wait until all that was lost of stores is mended, at most for `PATIENCE`."""
        menders = [self._menders[store] for store in stores if store in self._menders]
        if menders:
            await asyncio.wait(menders, timeout=PATIENCE)

    def _below(self, records: Collection[AnyRecord]) -> Iterator[AnyRecord]:
        kept = [record for record in records if self._graph.find(record.key) is record]
        yield from kept
        yield from self._graph.below(*(record.key for record in kept))

    def _is_used(self, record: AnyRecord) -> bool:
        """Whether a container that runs stands on the object, and is not being ended or deleted."""
        active = (
            box
            for box in self._graph.all("container")
            if box.run is not None
            and box.run.state in ("running", "stopping")
            and box.phase is not Phase.RELEASING
            and box.key not in self._ending
        )
        return any(record is below for box in active for below in self._graph.below(box.key))

    async def _sever(self, record: AnyRecord) -> None:
        """It needs nothing that could hang, and so no place among those of the store. What is done to the object
        meanwhile, and hangs, goes on."""
        try:
            severed = await self._jobs.beside(LOCAL_STORE, Job("sever", record))
        finally:
            self._severing.discard(record.key)
        if severed:
            log.warning("%s was cut off from its store, which does not answer", describe(record))
            self.lose(record, SEVERED)

    # --------------------------------------------------------------------------------------------------- mending

    def lose(self, record: AnyRecord, problem: str = ENDED) -> None:
        """The object does not work any more: it says so, and is mended. One that is just being made is its create's to
        undo, or to have watched when it is shown, and one on its way out is mended if it stays (`resume`); of one that
        is known to be lost more has been said by now."""
        if record.phase is Phase.RELEASING and self._graph.find(record.key) is record:
            self._aside[record.key] = problem
        if record.phase is not Phase.LIVE or not self._graph.is_shown(record.key) or self._is_known(record):
            return
        log.warning("%s: %s", describe(record), problem)
        self._tell(record, problem)
        store = self._jobs.store(record)
        if store not in self._lost:
            self._lost[store] = deque()
            self._menders[store] = self._tasks.linger(self._mend_all(store))
        self._lost[store].append(record)

    def resume(self, record: AnyRecord) -> None:
        """An object that was on its way out stays, and is watched, or mended, as before."""
        if (problem := self._aside.pop(record.key, None)) is not None:
            self.lose(record, problem)
        else:
            self.watch(record)

    def _is_known(self, record: AnyRecord) -> bool:
        """Whether the object waits to be mended, or has been found never to be."""
        hopeless = record.key in self._hopeless and self._hopeless[record.key] == record.facts.helper
        return hopeless or self._waits(record)

    def _waits(self, record: AnyRecord) -> bool:
        return any(record is one for lost in self._lost.values() for one in lost)

    async def _mend_all(self, store: str) -> None:
        """Mend what is lost of one store, in turn, until nothing is. What fails waits until the others had theirs."""
        lost, delay = self._lost[store], FIRST_RETRY
        try:
            while lost:
                if await self._mend(lost[0]):
                    lost.popleft()
                    delay = FIRST_RETRY
                else:
                    lost.rotate(-1)
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, LAST_RETRY)
        finally:
            del self._lost[store], self._menders[store]

    async def _mend(self, record: AnyRecord) -> bool:
        """Whether nothing is left to be done for the object."""
        try:
            if self._is_kept(record):
                await self._jobs.settle(record)
            if not self._is_kept(record):
                self._put_aside(record)
                return True
            facts, complaint = await self._jobs.drive("mend", record)
        except Problem as problem:
            log.warning("%s is not mended: %s", describe(record), problem.message)
            self._tell(record, problem.message)
            if never := isinstance(problem, Conflict):
                self._hopeless[record.key] = record.facts.helper
            return never
        if not self._is_kept(record):
            self._put_aside(record)
            return True
        return self._mended(record, facts, complaint)

    def _put_aside(self, record: AnyRecord) -> None:
        """It is deleted, or on its way out, from where it may come back."""
        if self._graph.find(record.key) is record:
            self._aside.setdefault(record.key, self._told.get(record.key, ENDED))

    def _is_kept(self, record: AnyRecord) -> bool:
        return self._graph.find(record.key) is record and record.phase is Phase.LIVE

    def _mended(self, record: AnyRecord, facts: Facts, complaint: str | None) -> bool:
        """Whether that holds: the new helper may have ended, too."""
        self._ledger.note(record, facts=facts)
        if not self.watch(record):
            return False
        log.warning("%s is mended%s", describe(record), f", but {complaint}" if complaint else "")
        if complaint is not None:
            self._tell(record, complaint)
            return True
        for one in (record, *self._graph.holders(record.key)):
            if (told := self._told.pop(one.key, None)) is not None and one.problem == told:
                self._ledger.note(one, problem=None)
        return True

    def _tell(self, record: AnyRecord, problem: str) -> None:
        """Say what is wrong with an object, and with those right on it that have no other problem. One that is just
        being made is its create's to speak of."""
        users = f"{describe(record)}, which it needs, does not work: {problem}"
        for one, text in ((record, problem), *((holder, users) for holder in self._graph.holders(record.key))):
            if one.problem in (None, self._told.get(one.key)) and self._graph.is_shown(one.key):
                self._told[one.key] = text
                self._ledger.fault([one.key], text)


class _Repeated:
    """What is done each `pause` seconds from now on, until `cancel`."""

    def __init__(self, pause: float, action: Callable[[], None]) -> None:
        self._pause = pause
        self._action = action
        self._next = asyncio.get_running_loop().call_later(pause, self._act)

    def _act(self) -> None:
        self._next = asyncio.get_running_loop().call_later(self._pause, self._act)
        self._action()

    def cancel(self) -> None:
        self._next.cancel()


def _lives(helper: Helper) -> bool:
    """Whether it is not known to have ended. A pidfd is readable as soon as its process has."""
    try:
        descriptor = _opened(helper)
    except OSError as error:
        log.warning("whether process %d, a storage helper, lives is not known: %s", helper.pid, error)
        return True
    if descriptor is None:
        return False
    try:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        return not ended.poll(0)
    finally:
        os.close(descriptor)


def _opened(helper: Helper) -> int | None:
    """A pidfd of it; None when it has ended.

    Raises: OSError, when the host has no descriptor or no memory left for that.
    """
    with contextlib.ExitStack() as undo:
        try:
            descriptor = pidfd.pidfd_open(helper.pid)
        except ProcessLookupError:
            return None
        undo.callback(os.close, descriptor)
        if pidfd.start_time(helper.pid) != helper.start_time:
            return None
        undo.pop_all()
    return descriptor
