"""One connection: what of HTTP is refused before there is a request, and what a slow client is allowed.

uvicorn's protocol answers such things in plain text or not at all; here each is a JSON answer with our own words.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from imageapi.api.problems import raw
from imageapi.api.request import App
from imageapi.config import Config
from imageapi.errors import Exhausted, HeadersTooLarge, Malformed, Problem, TooSlow

LINGER = 5.0
"""Seconds for which a connection whose last answer is sent is read on, so that the client can read the answer."""
LAST_WORDS = 1.0
"""Seconds at the end of the server for requests that were cancelled to say so, and for clients to hear it."""


class Connections:
    """The connections of one server."""

    def __init__(self, app: App, config: Config) -> None:
        self._config = config
        self._state = ServerState()
        self._empty = asyncio.Event()
        self._uvicorn = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level="error",  # what it warns of are clients that we answer
            proxy_headers=False,
            timeout_keep_alive=max(1, round(config.keep_alive)),
        )
        self._uvicorn.load()

    def new(self) -> Connection:
        return Connection(self._uvicorn, self._state, {}, limits=self._config, lost=self._look)

    def _open(self) -> list[Connection]:
        return cast("list[Connection]", list(self._state.connections))

    def _look(self) -> None:
        if not self._state.connections:
            self._empty.set()

    async def finish(self) -> None:
        """Wait for the answers that are due, cancel what takes too long, and close all. A loop that is closed while it
        still has connections fails (EBUSY, of uv_loop_close)."""
        for connection in self._open():
            connection.shutdown()
        await self._answered(self._config.graceful_timeout)
        for task in list(self._state.tasks):
            task.cancel()
        await self._answered(LAST_WORDS)
        for end in (Connection.end, Connection.abort):
            for connection in self._open():
                end(connection)
            self._look()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), LAST_WORDS)

    async def _answered(self, seconds: float) -> None:
        """Wait for all requests under way, also those that a connection had waiting behind another."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self._state.tasks and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(set(self._state.tasks), timeout=left)


class Part(Enum):
    """What of a request is being read."""

    HEAD = auto()
    BODY = auto()
    NONE = auto()


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits, and with answers in JSON to what is no request."""

    def __init__(self, *arguments: Any, limits: Config, lost: Callable[[], None]) -> None:
        super().__init__(*arguments)
        self._limits = limits
        self._lost = lost
        self._part = Part.HEAD
        self._chunk = 0
        self._head_size = 0
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------ begin and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._lingering = Lingering(transport, self.loop)
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        limit = self._limits.listen_limit
        if limit and len(self.connections) > limit:
            self._refuse(Exhausted(f"{limit} connections are open, which is the --listen-limit; close one"))
        else:
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._reading)
        _cancel(self._writing)
        super().connection_lost(exc)
        self._lost()

    def end(self) -> None:
        """Close once all that was said is on its way, without waiting for the client."""
        self._lingering.end()

    def abort(self) -> None:
        self.transport.abort()

    # ------------------------------------------------------------------------------------------ a request

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._chunk = len(data)
        self._head_size += len(data)
        super().data_received(data)
        if self._part is Part.HEAD:
            self._check_head(self._head_size)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part = Part.HEAD
        self._head_size = self._chunk  # what came with its first byte may be another's: a bound, not a measure
        self._expect_request()

    def on_headers_complete(self) -> None:
        self._check_head(len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers))
        if not self.transport.is_closing():
            super().on_headers_complete()
            self._part = Part.BODY

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        _cancel(self._reading)
        self._part = Part.NONE
        if not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Malformed("this is no HTTP/1.1 request"))

    def _check_head(self, size: int) -> None:
        if size > self._limits.max_header_size:
            self._refuse(HeadersTooLarge(f"the header is larger than {self._limits.max_header_size} bytes"))

    # ------------------------------------------------------------------------------------- slow clients

    def _expect_request(self) -> None:
        """From now a whole request, its body included, must come within the read timeout."""
        _cancel(self._reading)
        self._reading = self.loop.call_later(self._limits.read_timeout, self._request_is_late)

    def _request_is_late(self) -> None:
        if self.pipeline:
            self._expect_request()  # it is we who do not read on, before the requests ahead of it are answered
        else:
            self._refuse(TooSlow(f"the request did not come whole within {self._limits.read_timeout:g}s"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self._limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._writing)
        super().resume_writing()

    # ------------------------------------------------------------------------------------------ refusals

    def _refuse(self, problem: Problem) -> None:
        """Answer what is no request, or only half of one, and close. While the answer to an earlier request is due,
        nothing can be said: the connection closes after that one."""
        _cancel(self._reading)
        if self.transport.is_closing():
            return
        current, earlier = self._cycles()
        if earlier is not None and not earlier.response_complete:
            earlier.keep_alive = False
            return
        if not self.pipeline and (current is None or not current.response_started):
            self.transport.write(raw(problem))
        self.transport.close()
        if current is not None:
            current.disconnected = True
            current.message_event.set()

    def _cycles(self) -> tuple[RequestResponseCycle | None, RequestResponseCycle | None]:
        """The answering of the request that is being read, once its head is known; and of the one before."""
        return (self.cycle, None) if self._part is Part.BODY else (None, self.cycle)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


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
        if self.is_closing():
            return
        self._ending = True
        with contextlib.suppress(OSError, RuntimeError):  # the client has gone already
            self._transport.write_eof()
            self._transport.resume_reading()
        self._loop.call_later(LINGER, self._transport.abort)

    def end(self) -> None:
        self._ending = True
        self._transport.close()
