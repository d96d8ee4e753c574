"""One connection: requests are read off it one after the other, each is answered in its turn, and what is refused
before there is a request is refused in our own words, in JSON. A slow client is allowed so much and no more.

The parser is Node's, by way of httptools.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import httptools

from imageapi.api.exchange import Exchange
from imageapi.api.problems import raw
from imageapi.api.request import App
from imageapi.config import Config
from imageapi.errors import Exhausted, HeadersTooLarge, Malformed, Problem, TooSlow

LINGER = 5.0
"""Seconds for which a connection is read on once its last answer is sent, so that the client can read the answer."""
REST = 2.0
"""Seconds without a request, after which the server is at rest."""
RESERVE = 256
"""Descriptors that are not for connections, at most half of all: what is asked for over them needs some, too."""
REFUSED = 8
"""The part of that reserve, an eighth, for connections that are only told so; more of them wait in the kernel."""
LAST_WORDS = 1.0
"""Seconds at the end of the server for requests that were cancelled to say so, and for clients to hear it."""


class Kind:
    """Connections over one scheme: `open` of them, of which there may be `most`. Those that are `mute` cannot be told
    anything at their beginning."""

    def __init__(self, scheme: str, limits: Config, room: int, *, mute: bool = False) -> None:
        """`room` is how many there can be at all."""
        self.scheme = scheme
        self.limits = limits
        self.most = min(limits.listen_limit or room, room)
        self.mute = mute
        self.open = 0


class Connections:
    """The connections of one server, and the requests that are being answered. `at_rest` is called once when there has
    been no request for REST seconds."""

    def __init__(self, app: App, config: Config, at_rest: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self._at_rest = at_rest
        self._begun = 0
        self._resting: asyncio.TimerHandle | None = None
        self.loop = asyncio.get_running_loop()  # asked once: in Python 3.11 that is a system call
        self._app = app
        self._open: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._room = room = descriptors - min(RESERVE, descriptors // 2)
        self._allowed = f"what LimitNOFILE={descriptors} allows"
        self._plain = Kind("http", config, room)
        # A handshake is begun by whoever reaches the port: they do not take the room of the Unix socket.
        self._secured = Kind("https", config.over_tls(), room // 2, mute=True)
        self._full = room + (descriptors - room) // REFUSED
        self.crowded, self.roomy = asyncio.Event(), asyncio.Event()
        """No further connection is to be let in, or one may be again; there may be more, from before that is heard."""
        self.roomy.set()

    def new(self) -> Connection:
        return Connection(self, self._plain)

    def new_over_tls(self) -> Connection:
        return Connection(self, self._secured)

    def enter(self, connection: Connection, kind: Kind) -> None:
        """One has been made."""
        self._open.add(connection)
        kind.open += 1
        if len(self._open) == self._full:
            self.crowded.set()
            self.roomy.clear()

    def too_many(self, kind: Kind) -> str | None:
        """How many are open, and why no more may be; None while more may."""
        if len(self._open) > self._room:
            return f"{self._room} connections are open, which is {self._allowed}; close one"
        if kind.open > kind.most:
            return f"{kind.most} connections are open, which is the --listen-limit; close one"
        return None

    def leave(self, connection: Connection, kind: Kind) -> None:
        self._open.discard(connection)
        kind.open -= 1
        if len(self._open) < self._full and self.crowded.is_set():
            self.crowded.clear()
            self.roomy.set()
        self._look()

    def start(self, exchange: Exchange) -> None:
        self._begun += 1
        if self._resting is None:
            self._rest_after(self._begun)
        task = self.loop.create_task(exchange.run(self._app))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _rest_after(self, begun: int) -> None:
        """One timer for all requests: it is set anew only when it is due."""
        self._resting = self.loop.call_later(REST, self._rest, begun)

    def _rest(self, begun: int) -> None:
        if begun != self._begun or self._tasks:
            self._rest_after(self._begun)
        else:
            self._resting = None
            self._at_rest()

    def _look(self) -> None:
        if not self._open:
            self._empty.set()

    async def finish(self, patience: float) -> None:
        """Wait for the answers that are due, cancel what takes more than `patience` seconds, and close all. A loop that
        is closed while it still has connections fails (EBUSY, of uv_loop_close)."""
        for connection in list(self._open):
            connection.shutdown()
        await self._answered(patience)
        for task in list(self._tasks):
            task.cancel()
        await self._answered(LAST_WORDS)
        for end in (Connection.end, Connection.abort):
            for connection in list(self._open):
                end(connection)
            self._look()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), LAST_WORDS)

    async def _answered(self, seconds: float) -> None:
        """Wait for all requests under way, also those that a connection had waiting behind another."""
        deadline = self.loop.time() + seconds
        while self._tasks and (left := deadline - self.loop.time()) > 0:
            await asyncio.wait(set(self._tasks), timeout=left)


def _unquoted(path: str) -> str:
    from urllib.parse import unquote  # see request

    return unquote(path)


class Part(Enum):
    """What of a request is being read."""

    HEAD = auto()
    BODY = auto()
    NONE = auto()


class Connection(asyncio.Protocol):
    """The requests of one client. `_due` are those that are not answered yet, of which the first is being so."""

    def __init__(self, all: Connections, kind: Kind) -> None:
        self._all = all
        self._kind = kind
        self._limits = kind.limits
        self._loop = all.loop
        self._parser = httptools.HttpRequestParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._part = Part.HEAD
        self._due: deque[Exchange] = deque()
        self._current: Exchange | None = None
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._chunk = 0
        self._head_size = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------ begin and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = Lingering(transport, self._loop)
        name = transport.get_extra_info("sockname")
        self._server = name[:2] if isinstance(name, tuple) else None
        self._all.enter(self, self._kind)
        if (why := self._all.too_many(self._kind)) is None:
            self._expect_request()
        elif self._kind.mute:
            self._transport.abort()
        else:
            self._refuse(Exhausted(why))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.resume_writing()
        for exchange in self._due:
            exchange.leave()
        del self._parser, self._current  # both hold this connection
        self._all.leave(self, self._kind)

    def eof_received(self) -> None:
        """The transport closes when all is sent. Also for the little that it does not call too much, the client has
        the write timeout."""
        if self._transport.get_write_buffer_size():
            self._transport.set_write_buffer_limits(0)

    def hung_up(self) -> None:
        """The client has ended it, or broken it, in the middle of a stream that may go on: what is due is for nobody,
        and the last that was said can still be read."""
        for exchange in self._due:
            exchange.leave()
        self._transport.close()

    def shutdown(self) -> None:
        """Close when all that is due is answered."""
        if self._due:
            self._due[-1].keep_alive = False
        else:
            self._transport.close()

    def end(self) -> None:
        """Close once all that was said is on its way, without waiting for the client."""
        self._transport.end()

    def abort(self) -> None:
        self._transport.abort()

    # ------------------------------------------------------------------------------------------ a request

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._chunk = len(data)
        self._head_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # it is served as if it had not asked for one
        except httptools.HttpParserError as error:
            self._refuse(Malformed(f"this is no HTTP/1.1 request: {error}"))
        if self._part is Part.HEAD:
            self._check_head(self._head_size)

    def on_message_begin(self) -> None:
        self._url, self._headers = b"", []
        self._part = Part.HEAD
        self._head_size = self._chunk  # what came with its first byte may be another's: a bound, not a measure
        self._expect_request()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._check_head(len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers))
        if self._transport.is_closing():
            return
        try:
            scope = self._scope()
        except httptools.HttpParserInvalidURLError:
            self._refuse(Malformed("the target of the request is no path, as /imageapi/v1/container is"))
            return
        keep_alive = self._parser.get_http_version() != "1.0" and self._parser.should_keep_alive()
        self._current = Exchange(scope, self, self._answered, keep_alive=keep_alive)
        self._part = Part.BODY
        self._due.append(self._current)
        if len(self._due) == 1:
            self._all.start(self._current)
        else:
            self.pause_reading()

    def _scope(self) -> dict[str, Any]:
        url = httptools.parse_url(self._url)
        raw = url.path or b"/"  # RFC 9112, 3.2.2
        path = raw.decode("ascii")
        return {
            "type": "http",
            "scheme": self._kind.scheme,
            "server": self._server,
            "method": self._parser.get_method().decode("ascii"),
            "path": _unquoted(path) if "%" in path else path,
            "raw_path": raw,
            "query_string": url.query or b"",
            "headers": self._headers,
        }

    def on_body(self, body: bytes) -> None:
        if self._current is not None:
            self._current.feed(body)

    def on_message_complete(self) -> None:
        self._part = Part.NONE
        if self._current is not None:
            self._current.end()
        self._rest()

    def _check_head(self, size: int) -> None:
        if size > self._limits.max_header_size:
            self._refuse(HeadersTooLarge(f"the header is larger than {self._limits.max_header_size} bytes"))

    # ------------------------------------------------------------------------------------------- its answer

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _answered(self) -> None:
        if not self._due.popleft().keep_alive:
            self._transport.close()
        if self._transport.is_closing():
            return
        self.resume_reading()
        if self._due:
            self._all.start(self._due[0])
        elif self._part is Part.NONE:
            self._rest()

    def pause_reading(self) -> None:
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    # ------------------------------------------------------------------------------------- slow clients

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        """For what the client does next there is this time, and no other."""
        self._stop_waiting()
        self._timer = self._loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expect_request(self) -> None:
        """From now a whole request, its body included, must come within the read timeout."""
        self._wait(self._limits.read_timeout, self._request_is_late)

    def _request_is_late(self) -> None:
        if len(self._due) > 1:
            self._expect_request()  # it is we who do not read on, before the requests ahead of it are answered
        else:
            self._refuse(TooSlow(f"the request did not come whole within {self._limits.read_timeout:g}s"))

    def _rest(self) -> None:
        """No request is being read. With none to be answered either, the connection is idle."""
        if self._due:
            self._stop_waiting()
        else:
            self._wait(self._limits.keep_alive, self._transport.close)

    def pause_writing(self) -> None:
        self._writable.clear()
        self._writing = self._loop.call_later(self._limits.write_timeout, self.abort)

    def resume_writing(self) -> None:
        self._writable.set()
        if self._writing is not None:
            self._writing.cancel()
        self._transport.written()

    async def drained(self) -> None:
        """Wait until the client has taken what was written."""
        await self._writable.wait()

    # ------------------------------------------------------------------------------------------ refusals

    def _refuse(self, problem: Problem) -> None:
        """Answer what is no request, or only half of one, and close. While the answer to an earlier request is due,
        nothing can be said: the connection closes after that one."""
        self._stop_waiting()
        if self._transport.is_closing():
            return
        current = self._current if self._part is Part.BODY else None
        if earlier := [one for one in self._due if one is not current]:
            earlier[-1].keep_alive = False
            return
        if current is None or not current.complete:
            self._transport.write(raw(problem))
        self._transport.close()
        if current is not None:
            current.leave()


class Lingering:
    """A transport whose `close` ends what we say and goes on listening for a while.

    Closing a TCP connection while something of the client's is unread resets it, and the reset can overtake the last
    answer (RFC 9112, 9.6).
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._ending = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._ending or self._transport.is_closing()

    def close(self) -> None:
        """End when all is sent, which the protocol hears then, and no sooner."""
        if self.is_closing():
            return
        self._ending = True
        unsent = 0
        with contextlib.suppress(OSError, RuntimeError):  # the client has gone already
            self._transport.write_eof()
            self._transport.resume_reading()
            self._transport.set_write_buffer_limits(0)
            unsent = self._transport.get_write_buffer_size()
        if not unsent:
            self._linger()

    def written(self) -> None:
        """The client's system has taken what was said."""
        if self._ending and not self._transport.is_closing():
            self._linger()

    def _linger(self) -> None:
        self._loop.call_later(LINGER, self._transport.abort)

    def end(self) -> None:
        self._ending = True
        self._transport.close()
