"""The server's end of the supervisor: calls with a deadline, and the news of containers that have ended.

When the supervisor dies, another is launched and asked what it found; the containers that ended meanwhile are news
like any other. A start that was under way fails, when what may have come of it has ended. Every other call is
made again, since it can be made twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from imageapi import errors
from imageapi.config import Site
from imageapi.linux import pidfd
from imageapi.runtime import protocol, successor
from imageapi.runtime.clock import now
from imageapi.runtime.protocol import (
    Answer,
    Call,
    Done,
    Ended,
    Failed,
    Forget,
    Hello,
    Kill,
    Life,
    List,
    Lives,
    LogTrouble,
    Quit,
    Request,
    Signal,
    Start,
    Started,
    Welcome,
)

log = logging.getLogger(__name__)

CALL_TIMEOUT = 5.0
"""Seconds for a call that the supervisor answers at once, a new supervisor's appearance included."""
APPEARANCE = 30.0
"""Seconds for the first, unless it is seen before that nothing comes of it."""
MARGIN = 3.0
"""Seconds that a start's answer may take beyond the start's own timeout."""
UNSENT = (errno.ENOBUFS, errno.ENOMEM, errno.EMSGSIZE, errno.ETOOMANYREFS)
"""What a call fails with that could not be sent, though the supervisor is there."""
PAUSE = 0.002
"""Seconds between two looks whether a launched supervisor listens."""
RELAUNCH = 0.1
"""Seconds until it is launched again."""

A = TypeVar("A", Welcome, Started, Lives, Done)


class _Lost(Exception):
    """The supervisor hung up before it answered."""


class _Connection:
    """One connection. `on_news` gets what nobody asked for; `on_lost` is called when the other end has gone."""

    def __init__(self, channel: socket.socket, on_news: Callable[[Answer], None], on_lost: Callable[[], None]) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._on_news = on_news
        self._on_lost = on_lost
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._loop.add_reader(channel, self._hear)

    async def ask(self, request: Request, descriptors: Sequence[int] = ()) -> Answer:
        """The answer to a request. Raises: _Lost."""
        if self._channel.fileno() < 0:
            raise _Lost
        self._number += 1
        number = self._number
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._waiting[number] = answer
        try:
            await self._send(protocol.encode(Call(number, request)), descriptors)
            return await answer
        finally:
            del self._waiting[number]

    async def _send(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Returns also when the other end has gone: `_hear` finds that out, after what came before it, and says so.
        Who tried again at once would keep it from that."""
        while True:
            try:
                socket.send_fds(self._channel, [data], list(descriptors))
                return
            except BlockingIOError:
                await self._writable()
            except OSError as error:
                if error.errno in UNSENT:
                    raise errors.from_oserror(error, "asking the supervisor") from error
                return

    async def _writable(self) -> None:
        ready = asyncio.Event()
        self._loop.add_writer(self._channel, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_writer(self._channel)

    def _hear(self) -> None:
        try:
            data = self._channel.recv(protocol.MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            self._on_lost()
            return
        reply = protocol.decode_reply(data)
        waiting = self._waiting.get(reply.number)
        if reply.number == 0:
            self._on_news(reply.body)
        elif waiting is not None and not waiting.done():
            waiting.set_result(reply.body)

    def close(self) -> None:
        """Hang up; who still waits for an answer gets none."""
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel)
            self._channel.close()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_Lost())


class Supervisor:
    """The supervisor of a site. `launch` has one started, and does nothing where one lives; `on_ended` is called in the
    event loop for each life that ends while we watch, and for those that ended while no supervisor did. `on_log` is
    called when a log does not take what a container prints, or does so again."""

    def __init__(
        self,
        site: Site,
        *,
        launch: Callable[[], None],
        on_ended: Callable[[Ended], None],
        on_log: Callable[[LogTrouble], None] = lambda _: None,
    ) -> None:
        self._site = site
        self._hello = Hello(log_limit=site.log_limit)
        self._launch = launch
        self._on_ended = on_ended
        self._on_log = on_log
        self._connection: asyncio.Task[_Connection] | None = None
        self._running: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._launched = float("-inf")
        self.pid: int | None = None
        self._found = 0
        """The process that listened at the last attempt; 0 before any."""
        self._old = 0
        """How much of its log is of before, in bytes."""
        with contextlib.suppress(OSError):
            self._old = os.path.getsize(self._log_path())

    async def connect(self) -> list[Life]:
        """Find the supervisor, or have it launched; all lives it knows. On a host that has too much to do that may take
        longer than a call.

        Raises: errors.Problem.
        """
        end = asyncio.get_running_loop().time() + APPEARANCE
        while True:
            try:
                lives = await self.list()
                break
            except errors.TimedOut:
                if self._complaint() or asyncio.get_running_loop().time() > end:
                    raise
        self._running = {life.id: life.attempt for life in lives if life.running}
        return lives

    async def greet(self) -> None:
        """Say hello again: it sees then to what is on disk of it. Raises: errors.Problem."""
        await self._call(self._hello, Welcome)

    def close(self) -> None:
        """Leave the supervisor to itself."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if connection.done() and not connection.cancelled() and connection.exception() is None:
            connection.result().close()
        connection.cancel()

    # ---------------------------------------------------------------------------------------------------- verbs

    async def start(self, order: Start, directory: str) -> Started:
        """Have `order` executed; what is mounted at its root is in `directory`.

        Raises: errors.Problem, and then nothing runs; errors.TimedOut, when the process has still to come back from
        the kernel: its end is news.
        """
        try:
            with _descriptors("/proc/self/ns/mnt", directory) as place:
                started = _expect(await self._ask(order, order.timeout + MARGIN, place), Started)
        except OSError as error:
            raise errors.from_oserror(error, "asking the supervisor for the start") from error
        except _Lost:
            await self.undo(order.id, order.attempt, CALL_TIMEOUT)
            raise errors.Problem("the supervisor ended while it started the container; ask again") from None
        self._running[order.id] = order.attempt
        return started

    async def signal(self, container: int, attempt: int, number: int) -> None:
        """Send the first process a signal; one that has ended needs none. Raises: errors.Problem."""
        await self._call(Signal(container, attempt, number), Done)

    async def kill(self, container: int, attempt: int) -> None:
        """End all processes; that they have ended is news. Raises: errors.Problem."""
        await self._call(Kill(container, attempt), Done)

    async def forget(self, container: int, attempt: int) -> None:
        """Have the record of an end dropped; nothing to drop is no error. Raises: errors.Problem."""
        await self._call(Forget(container, attempt), Done)

    async def undo(self, container: int, attempt: int, timeout: float) -> None:
        """End what has come of a start, and have it forgotten; nothing to end is no error.

        Raises: errors.TimedOut, when it has not ended in `timeout` seconds; errors.Problem.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._undo(container, attempt)
        except errors.NotFound:
            pass
        except TimeoutError:
            raise errors.TimedOut(
                f"start {attempt} of container {container} was killed, but has not ended in {timeout:g}s"
            ) from None

    async def _undo(self, container: int, attempt: int) -> None:
        """Ask until it has ended: the news of an end may have gone to a connection that was lost."""
        await self.kill(container, attempt)
        while True:
            try:
                await self.forget(container, attempt)
                return
            except errors.Conflict:
                await asyncio.sleep(PAUSE)

    async def list(self) -> list[Life]:
        """All lives it knows, in order of id. Raises: errors.Problem."""
        lives: list[Life] = []
        while True:
            page = await self._call(List(above=lives[-1].id if lives else -1), Lives)
            lives += page.lives
            if not page.more:
                return lives

    async def quit(self) -> None:
        """Have it end, and leave nothing in the kernel. Raises: errors.Conflict, while containers run."""
        self._closed = True
        try:
            await self._call(Quit(), Done)
        except errors.Problem:
            self._closed = False
            raise

    # ---------------------------------------------------------------------------------------------------- calls

    async def _call(self, request: Request, kind: type[A]) -> A:
        """The answer to a request that can be made twice: a supervisor that dies over it is asked again, for as long
        as one call may take."""
        deadline = asyncio.get_running_loop().time() + CALL_TIMEOUT
        while (left := deadline - asyncio.get_running_loop().time()) > 0:
            with contextlib.suppress(_Lost):
                return _expect(await self._ask(request, left), kind)
        raise errors.TimedOut(self._silence(request, CALL_TIMEOUT))

    async def _ask(self, request: Request, timeout: float, descriptors: Sequence[int] = ()) -> Answer:
        try:
            async with asyncio.timeout(timeout):
                connection = await asyncio.shield(self._connected())
                return await connection.ask(request, descriptors)
        except TimeoutError:
            raise errors.TimedOut(self._silence(request, timeout)) from None

    def _silence(self, request: Request, timeout: float) -> str:
        """What to say of a supervisor that does not answer."""
        said = f"the supervisor did not answer '{type(request).__name__.lower()}' in {timeout:g}s"
        return self._complaint() or f"{said}; see {self._log_path()}"

    def _complaint(self) -> str | None:
        """Why it does not answer, as far as its state or the last line of its log tells."""
        process = pidfd.look(self._found) if self._found else None
        if process is not None and process.state in "Tt":
            return f"the supervisor, process {self._found}, is stopped; let it go on: kill -CONT {self._found}"
        path = self._log_path()
        last = self._said().strip().rpartition("\n")[2]
        return f"the supervisor does not work: {last}; see {path}" if last else None

    def _said(self) -> str:
        """What is in its log since this server has begun: what came of earlier ones explains nothing."""
        with contextlib.suppress(OSError), open(self._log_path(), "rb") as log:
            log.seek(self._old if self._old <= os.fstat(log.fileno()).st_size else 0)  # it begins anew when it is long
            return log.read().decode(errors="replace")
        return ""

    def _log_path(self) -> str:
        return f"{self._site.supervisor_dir}/{protocol.LOG}"

    def _connected(self) -> asyncio.Task[_Connection]:
        """The connection, or the attempt to have one."""
        task = self._connection
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._connection = asyncio.create_task(self._connect())
        return task

    async def _connect(self) -> _Connection:
        """A connection with a supervisor of this package; one of another is upgraded first.

        Raises: errors.Problem, when it cannot be; _Lost.
        """
        connection, welcome = await self._greet()
        if not _is_ours(welcome):
            await self._upgrade(connection)
            connection, after = await self._greet()
            if not _is_ours(after):
                connection.close()
                raise errors.Unsupported(_stubborn(after))
            log.info("the supervisor %d was of release %s, and has been upgraded", after.pid, welcome.release)
            welcome = after
        self.pid = welcome.pid
        return connection

    async def _greet(self) -> tuple[_Connection, Welcome]:
        channel = await self._find()
        self._found = _listens(channel)
        connection = _Connection(channel, self._hear, self._lost)
        try:
            return connection, _expect(await connection.ask(self._hello), Welcome)
        except BaseException:
            connection.close()
            raise

    async def _upgrade(self, connection: _Connection) -> None:
        """Have the supervisor become one of this package; it hangs up when it does. Containers that it is just
        starting are waited for.

        Raises: errors.Problem.
        """
        try:
            while True:
                with contextlib.suppress(errors.Conflict):
                    _expect(await connection.ask(successor.order(self._site)), Done)
                await asyncio.sleep(PAUSE)
        except _Lost:
            return
        finally:
            connection.close()

    async def _find(self) -> socket.socket:
        """The supervisor's end, once it listens; it is launched until it does. Raises: errors.Exhausted."""
        loop = asyncio.get_running_loop()
        while True:
            channel = _channel()
            try:
                self._reach(channel)
                return channel
            except OSError:
                channel.close()
            if loop.time() - self._launched >= RELAUNCH:
                self._launch()
                self._launched = loop.time()
            await asyncio.sleep(PAUSE)

    def _reach(self, channel: socket.socket) -> None:
        """Connect by a descriptor of the directory: the path may be longer than a socket's address (unix(7))."""
        directory = os.open(self._site.supervisor_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            channel.connect(f"/proc/self/fd/{directory}/{protocol.SOCKET}")
        finally:
            os.close(directory)

    # ----------------------------------------------------------------------------------------------------- news

    def _hear(self, news: Answer) -> None:
        if isinstance(news, LogTrouble):
            self._on_log(news)
        if not isinstance(news, Ended):
            return
        if self._running.get(news.id) == news.attempt:
            del self._running[news.id]
        self._on_ended(news)

    def _lost(self) -> None:
        if self._connection is None or not self._connection.done():
            return  # whoever tries to connect sees it for himself
        self._connection = self.pid = None
        if not self._closed:
            log.warning("the supervisor has gone; another takes its place")
            self._spawn(self._resume())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _resume(self) -> None:
        """Ask a new supervisor what became of the containers."""
        while True:
            running = dict(self._running)  # what is started while the pages of a list come in may be on none of them
            try:
                lives = {life.id: life for life in await self.list()}
                break
            except errors.Problem as problem:
                log.error("there is no supervisor: %s", problem.message)
                await asyncio.sleep(RELAUNCH)
        for container, attempt in running.items():
            if self._running.get(container) == attempt and (news := _news(container, attempt, lives.get(container))):
                self._hear(news)


def _channel() -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise errors.from_oserror(error, "reaching the supervisor") from error


@contextlib.contextmanager
def _descriptors(*paths: str) -> Iterator[Sequence[int]]:
    """The files at these paths, open while they are sent."""
    opened: list[int] = []
    try:
        for path in paths:
            opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _listens(channel: socket.socket) -> int:
    """The process at the other end of a connection (unix(7), SO_PEERCRED)."""
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def _is_ours(welcome: Welcome) -> bool:
    return (welcome.version, welcome.release) == (protocol.VERSION, protocol.RELEASE)


def _stubborn(welcome: Welcome) -> str:
    return (
        f"the supervisor of this run directory is of release {welcome.release} and this server of {protocol.RELEASE}, "
        f"and it could not be upgraded; kill it, process {welcome.pid}: the server's own takes up its containers"
    )


def _expect(answer: Answer, kind: type[A]) -> A:
    """The answer, if it is of this kind. Raises: errors.Problem, when it is a failure."""
    if isinstance(answer, Failed):
        raise errors.from_dict(answer.problem)
    if not isinstance(answer, kind):
        raise errors.Problem(f"the supervisor answered {type(answer).__name__} where {kind.__name__} was expected")
    return answer


def _news(container: int, attempt: int, life: Life | None) -> Answer | None:
    """What became of a life of which a new supervisor knows how its log does, or the end, or nothing; None of one that
    lives, and has printed nothing since."""
    if life is not None and life.attempt == attempt and life.running:
        return None if life.log_trouble is None else LogTrouble(container, attempt, life.log_trouble)
    if life is not None and life.attempt == attempt and life.finished_at is not None:
        return Ended(container, attempt, life.exit_code, life.finished_at)
    return Ended(container, attempt, None, now())
