"""Worker processes, as the event loop sees them: a job goes out, a reply comes back, or does not.

A job that hangs keeps its worker, and one of its store's places, until it returns; other stores are not touched by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import socket
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from imageapi import errors
from imageapi.engine import zygote
from imageapi.engine.worker import MESSAGE, Descriptor, Reply

log = logging.getLogger(__name__)

SO_SNDBUFFORCE = 32
"""SO_SNDBUF without its limit, for who has CAP_NET_ADMIN (socket(7)); the socket module does not have it."""
PER_STORE = 8
"""How many jobs one store may have under way: what a dead one can cost in processes."""
IDLE = 4
"""How many workers wait for the next job; more are started when needed, and end when done."""


class _Worker:
    """One worker process: it has ended when its end of the socket is closed."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    async def perform(self, job: bytes) -> tuple[Reply, list[int]]:
        """Raises: ConnectionError, when the process has ended."""
        self._channel.send(job)
        await self._readable()
        data, descriptors, _, _ = socket.recv_fds(self._channel, MESSAGE, 1)
        if not data:
            raise ConnectionResetError("the worker process ended in the middle of its job")
        reply: Reply = pickle.loads(data)
        return reply, descriptors

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._channel, self._arrive, arrived)
        try:
            await arrived
        finally:
            loop.remove_reader(self._channel)

    @staticmethod
    def _arrive(arrived: asyncio.Future[None]) -> None:
        if not arrived.done():
            arrived.set_result(None)

    def waits(self) -> bool:
        """Whether the process lives, and waits for its next job."""
        try:
            self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def dismiss(self) -> None:
        self._channel.close()


class Job:
    """One call under way. `started` tells whether a worker has it: only then can it have had an effect."""

    def __init__(self, store: str, name: str, *arguments: Any) -> None:
        self.store = store
        self.name = name
        self.arguments = arguments
        self.started = False


class Pool:
    """The workers of one server, forked by the zygote at the other end of `control`. `on_lost` is called when that has
    ended: nothing can be done any more, since the server itself never forks."""

    def __init__(self, control: socket.socket, on_lost: Callable[[], None]) -> None:
        self._control = control
        self._on_lost = on_lost
        self.lost = False
        asyncio.get_running_loop().add_reader(control, self._hang_up)
        self._idle: list[_Worker] = []
        self._places: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(PER_STORE))

    async def perform(self, job: Job) -> Any:
        """The job's result; a descriptor is the caller's to close.

        Raises: errors.Problem as the job raised it.
        """
        async with self._places[job.store]:
            worker = self._take_worker(job)
            job.started = True
            try:
                reply, descriptors = await worker.perform(pickle.dumps((job.name, job.arguments)))
            except BaseException as error:
                worker.dismiss()
                if isinstance(error, ConnectionError):
                    raise errors.Problem(f"{job.name}: {error}; ask again") from error
                raise
            self._give_back(worker)
            return self._result(job, reply, descriptors)

    def start_supervisor(self) -> None:
        """Have the supervisor forked; it ends at once where another one lives."""
        self._control.send(zygote.SUPERVISOR)

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

    def _take_worker(self, job: Job) -> _Worker:
        """One that waits, or a new one. Raises: errors.Problem, when there can be none."""
        while self._idle:
            worker = self._idle.pop()
            if worker.waits():
                return worker
            worker.dismiss()
        try:
            return self._new_worker()
        except OSError as error:
            raise errors.from_oserror(error, f"starting a worker process to {job.name}") from error

    def _new_worker(self) -> _Worker:
        with contextlib.ExitStack() as undo:
            ours, theirs = map(undo.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * MESSAGE)
            socket.send_fds(self._control, [zygote.WORKER], [theirs.fileno()])
            ours.setblocking(False)
            undo.pop_all()
        theirs.close()
        return _Worker(ours)

    def _give_back(self, worker: _Worker) -> None:
        if len(self._idle) < IDLE:
            self._idle.append(worker)
        else:
            worker.dismiss()

    @staticmethod
    def _result(job: Job, reply: Reply, descriptors: list[int]) -> Any:
        if reply.problem:
            raise errors.from_dict(reply.problem)
        if reply.bug:
            log.error("a bug in %s %s:\n%s", job.name, job.arguments, reply.bug)
            raise errors.Problem(f"{job.name} failed by a bug of this server; its log has the trace")
        return Descriptor(descriptors[0]) if descriptors else reply.result
