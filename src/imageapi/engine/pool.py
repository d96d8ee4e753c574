"""Worker processes, as the event loop sees them: jobs go out together, and a reply comes back for each, or does not.

A job that hangs keeps its worker, and one of its store's places, until it returns; other stores are not touched by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from imageapi import errors
from imageapi.drivers.progress import Progress
from imageapi.engine import zygote
from imageapi.engine.worker import Reply
from imageapi.linux import memory, packet
from imageapi.records import AnyRecord, Record

log = logging.getLogger(__name__)

PER_STORE = 8
"""How many chains of jobs one store may have under way: what a dead one can cost in processes."""
APART = "this host's own state"
"""The store of jobs that nobody waits for: each has a worker of its own, which ends with it. Those that wait are there
for requests."""
IDLE = 4
"""How many workers wait for the next jobs; more are started when needed, and end when done."""
LOGGED_EVERY = 10.0
"""Seconds between two lines of the log about one job."""
PATIENCE = 2.0
"""For how many seconds they wait: an idle one costs 2 MB, and a new one 1 ms."""


ENDED = "the process that workers are forked from has ended, and the server with it; ask the next one again"


class NoWorker(errors.Exhausted):
    """The host has no process for a job, which has had no effect."""


def _no_worker(error: OSError, job: Job) -> NoWorker:
    problem = errors.from_oserror(error, f"starting a worker process to {job.name}")
    message = ENDED if isinstance(error, ConnectionError) else problem.message
    return NoWorker(message, **problem.fields)


class Job:
    """One call in a worker, and its `result`, which is cancelled when it will not be made."""

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name = name
        self.arguments = arguments
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.progress: Progress | None = None
        """What it has last said of how far it is."""
        self.moved = 0.0
        """When that was, in seconds of the monotonic clock."""
        self.since = time.time()
        """When it was asked for, in seconds since the epoch."""
        self._logged = time.monotonic()

    @property
    def about(self) -> AnyRecord | None:
        """The record that the job is done for."""
        return next((argument for argument in self.arguments if isinstance(argument, Record)), None)

    def begun(self) -> bool:
        """Whether it may have had an effect."""
        result = self.result
        return not (result.cancelled() or (result.done() and isinstance(result.exception(), NoWorker)))

    def hear(self, progress: Progress) -> None:
        """It says how far it is."""
        self.progress, self.moved = progress, time.monotonic()
        if self.moved - self._logged > LOGGED_EVERY and self.about is not None:
            self._logged = self.moved
            log.info("%s of %s: %s", self.name, self.about.key, progress)


class Chain:
    """Jobs of one store that one worker does in turn, each begun without waiting for us. One that fails ends it: what
    follows is not done."""

    def __init__(self, store: str, jobs: Sequence[Job]) -> None:
        self.store = store
        self.jobs = deque(jobs)
        """Those without a reply yet, the one under way first."""
        self.worker: _Worker | None = None
        """None until one has begun: before that it can have had no effect."""

    def hear(self, message: Reply | Progress) -> None:
        """Take what the worker says of the job under way."""
        if isinstance(message, Progress):
            self.jobs[0].hear(message)
        else:
            self._settle(message)

    def _settle(self, reply: Reply) -> None:
        if not reply.begun and reply.problem is None:
            self.cancel_from(0)
            return
        job = self.jobs.popleft()
        try:
            job.result.set_result(_result(job, reply))
        except errors.Problem as problem:
            self.fail(job, problem)

    def fail(self, job: Job, problem: Exception) -> None:
        """A job has failed, and so none of those behind it is done."""
        job.result.set_exception(problem)
        job.result.exception()  # it may be that nobody asks
        self.cancel_from(0)

    def cancel_from(self, place: int) -> None:
        """None of the jobs from `place` on is done."""
        while len(self.jobs) > place:
            self.jobs.pop().result.cancel()


def _result(job: Job, reply: Reply) -> Any:
    if reply.problem:
        problem = errors.from_dict(reply.problem)
        raise problem if reply.begun else NoWorker(problem.message, **problem.fields)
    if reply.bug:
        log.error("a bug in %s %s:\n%s", job.name, job.arguments, reply.bug)
        raise errors.Problem(f"{job.name} failed by a bug of this server; its log has the trace")
    return reply.result


class _Worker:
    """One worker process: it has ended when its end of the socket is closed. `free` is called when it has done all it
    was given, or has ended, and `lost` tells why it has ended in the middle of a job."""

    def __init__(
        self, channel: socket.socket, free: Callable[[_Worker, Chain], None], lost: Callable[[Job], errors.Problem]
    ) -> None:
        self._channel = channel
        self._free = free
        self._lost = lost
        self._chain: Chain | None = None
        self._leaving = False
        self._retirement: asyncio.TimerHandle | None = None
        self.ended = False
        asyncio.get_running_loop().add_reader(channel, self._hear)

    def begin(self, chain: Chain) -> None:
        """Have the jobs done. A process that could not be had has left word of why, which is read as ever.

        Raises: OSError, when there is nothing left to send the jobs with.
        """
        if self._retirement is not None:
            self._retirement.cancel()
        jobs = [(job.name, job.arguments) for job in chain.jobs]
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                packet.send(self._channel, pickle.dumps(jobs, pickle.HIGHEST_PROTOCOL))
        except OSError:
            self.dismiss()
            raise
        self._chain, chain.worker = chain, self

    def give_up(self) -> None:
        """Have it end after the job that it is doing now; those behind that are not done.

        It looks for our end before it begins another job. So when there is no reply now that we have hung up, there
        is none after the one that is due.
        """
        self._leaving = True
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)
        while self._hear():
            pass
        if self._chain is not None:
            self._chain.cancel_from(1)

    def _hear(self) -> bool:
        """Take one message; whether there was one."""
        try:
            message = self._receive()
        except BlockingIOError:
            return False
        except OSError:
            message = b""
        if message and self._chain is not None:
            self._take(self._chain, pickle.loads(message))
        else:
            self.dismiss()
        self._look()
        return not self.ended

    def _take(self, chain: Chain, message: Reply | Progress) -> None:
        if isinstance(message, Reply) and not message.begun:
            self._leaving = True  # it declines, or has never been there
        chain.hear(message)

    def _receive(self) -> bytes | memoryview:
        """That it ended with something of ours unread (ECONNRESET) is told before the word that it has left."""
        try:
            return packet.receive(self._channel, _BUFFER)
        except ConnectionResetError:
            return packet.receive(self._channel, _BUFFER)

    def _look(self) -> None:
        chain = self._chain
        if chain is None or (chain.jobs and not self.ended):
            return
        self._chain = None
        if chain.jobs:
            job = chain.jobs.popleft()
            chain.fail(job, self._lost(job))
        self._free(self, chain)

    def waits(self) -> bool:
        """Whether the process lives, and waits for its next jobs."""
        if self.ended or self._leaving:
            return False
        try:
            self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def rest(self) -> None:
        """It has nothing to do, and ends unless that changes."""
        self._retirement = asyncio.get_running_loop().call_later(PATIENCE, self.dismiss)

    def dismiss(self) -> None:
        """Let it end; it may have."""
        if not self.ended:
            self.ended = True
            asyncio.get_running_loop().remove_reader(self._channel)
            self._channel.close()


_BUFFER = packet.buffer()
"""For all that is read in the one event loop: one message, used before the next is read."""


class Pool:
    """The workers of one server, forked by the zygote at the other end of `control`. `on_lost` is called when that has
    ended: nothing can be done any more, since the server itself never forks."""

    def __init__(self, control: socket.socket, on_lost: Callable[[], None]) -> None:
        self._control = control
        self._on_lost = on_lost
        self.lost = False
        self._oom_kills = memory.oom_kills()
        asyncio.get_running_loop().add_reader(control, self._hang_up)
        self._loaded = set(zygote.COMMON)
        self._idle: list[_Worker] = []
        self._busy: defaultdict[str, set[Chain]] = defaultdict(set)
        self._queues: defaultdict[str, deque[Chain]] = defaultdict(deque)

    def submit(self, chain: Chain) -> None:
        """Have the jobs done as soon as their store has a place."""
        self._load_for(chain)
        self._queues[chain.store].append(chain)
        self._go_on(chain.store)

    def _load_for(self, chain: Chain) -> None:
        """A kind that is used for the first time is likely to be used again."""
        for kind in {(job.about.key.collection, job.about.kind) for job in chain.jobs if job.about} - self._loaded:
            self._loaded.add(kind)
            with contextlib.suppress(ConnectionError):  # then no worker can be had, which is told
                self._control.send(zygote.loading(*kind))

    def give_up(self, chain: Chain) -> None:
        """Have no job begun any more. The one under way, if there is one, still ends in its own time."""
        if chain.worker is not None:
            chain.worker.give_up()
        elif chain in self._queues.get(chain.store, ()):
            self._queues[chain.store].remove(chain)
            chain.cancel_from(0)
            self._tidy(chain.store)

    def start_supervisor(self) -> None:
        """Have the supervisor forked; it ends at once where another one lives.

        Raises: errors.Problem, when the zygote has ended.
        """
        try:
            self._control.send(zygote.SUPERVISOR)
        except ConnectionError:
            raise errors.Problem(ENDED) from None

    def close(self) -> None:
        """Let the zygote and its idle workers end."""
        for worker in self._idle:
            worker.dismiss()
        self._idle.clear()
        self._stop_listening()
        self._control.close()

    def _hang_up(self) -> None:
        """The zygote says nothing, ever: it has ended."""
        self._stop_listening()
        self.lost = True
        self._on_lost()

    def _stop_listening(self) -> None:
        asyncio.get_running_loop().remove_reader(self._control)

    def _go_on(self, store: str) -> None:
        busy, queue = self._busy[store], self._queues[store]
        while queue and len(busy) < PER_STORE:
            chain = queue.popleft()
            try:
                (self._new_worker() if store == APART else self._take_worker()).begin(chain)
            except OSError as error:
                job = chain.jobs.popleft()
                chain.fail(job, _no_worker(error, job))
            else:
                busy.add(chain)
        self._tidy(store)

    def _tidy(self, store: str) -> None:
        """Keep nothing of a store of which nothing is done: there may be a new one with each request."""
        for table in (self._busy, self._queues):
            if store in table and not table[store]:
                del table[store]

    def _take_worker(self) -> _Worker:
        """One that waits, or a new one. Raises: OSError, when there can be none."""
        while self._idle:
            worker = self._idle.pop()
            if worker.waits():
                return worker
            worker.dismiss()
        return self._new_worker()

    def _new_worker(self) -> _Worker:
        with contextlib.ExitStack() as undo:
            ours, theirs = map(undo.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            socket.send_fds(self._control, [zygote.WORKER], [theirs.fileno()])
            ours.setblocking(False)
            undo.pop_all()
        theirs.close()
        return _Worker(ours, self._free, self._lost)

    def _lost(self, job: Job) -> errors.Problem:
        """Why a worker has ended in the middle of a job, as far as that can be known: it is not our child."""
        before, self._oom_kills = self._oom_kills, memory.oom_kills()
        if self._oom_kills > before:
            return errors.Exhausted(
                f"{job.name}: the host ran out of memory, and the kernel ended the process that did this (see dmesg); "
                "make room, then ask again"
            )
        return errors.Problem(f"{job.name}: the process that did this was killed in the middle of it; ask again")

    def _free(self, worker: _Worker, chain: Chain) -> None:
        """A worker has done its jobs, or has ended over them."""
        self._busy[chain.store].discard(chain)
        self._idle = [one for one in self._idle if not one.ended]
        if chain.store != APART and len(self._idle) < IDLE and worker.waits():
            self._idle.append(worker)
            worker.rest()
        else:
            worker.dismiss()
        self._go_on(chain.store)
