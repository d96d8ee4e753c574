"""One request on a connection, and its answer: what ASGI calls `receive` and `send`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from imageapi.api.problems import head, raw
from imageapi.api.request import App, Message, Scope, header_values
from imageapi.errors import Problem

log = logging.getLogger(__name__)

ENOUGH = 65_536
"""Bytes of a body that are kept while nobody takes them; a client that sends more waits."""


class Line(Protocol):
    """What an exchange needs of its connection."""

    def write(self, data: bytes) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    async def drained(self) -> None: ...


class Exchange:
    """One request, as far as it has come, and its answer, which goes out in one piece. `answered` is called when the
    answer is under way, or when there will be none."""

    def __init__(self, scope: Scope, line: Line, answered: Callable[[], None], *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.complete = False
        self._scope = scope
        self._line = line
        self._answered = answered
        self._invited = False
        self._body = bytearray()
        self._more = True
        self._gone = False
        self._news = asyncio.Event()
        self._start: Message | None = None

    # ---------------------------------------------------------------------------------- told by the connection

    def feed(self, data: bytes) -> None:
        """More of the body has come."""
        if not self.complete:
            self._body += data
            if len(self._body) > ENOUGH:
                self._line.pause_reading()
            self._news.set()

    def end(self) -> None:
        """The request has come whole."""
        self._more = False
        self._news.set()

    def leave(self) -> None:
        """The client is gone, or will not be answered."""
        self._gone = True
        self._news.set()

    # ---------------------------------------------------------------------------------------- the application

    async def run(self, app: App) -> None:
        """Have the application answer. One that does not, because the client is gone or by a bug, ends the
        connection."""
        try:
            await app(self._scope, self.receive, self.send)
        except BaseException as error:
            log.error("the application failed", exc_info=error)
            if not self.complete:
                self._line.write(raw(Problem("a bug of this server; its log has the trace")))
        if not self.complete:
            self.keep_alive = False
            self._finish()

    async def receive(self) -> Message:
        if not self._gone and not self.complete:
            self._invite()
            self._line.resume_reading()
            await self._news.wait()
            self._news.clear()
        if self._gone or self.complete:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self._more}

    def _invite(self) -> None:
        """Tell a client that waits to be told that it may send its body (RFC 9110, 10.1.1)."""
        if self._more and not self._invited:
            self._invited = True
            if [value.lower() for value in header_values(self._scope, b"expect")] == ["100-continue"]:
                self._line.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def send(self, message: Message) -> None:
        if self._start is None:
            self._start = message
            return
        await self._line.drained()
        if not self._gone:
            self._line.write(self._head(self._start) + (b"" if self._scope["method"] == "HEAD" else message["body"]))
        self._finish()

    def _head(self, start: Message) -> bytes:
        headers: list[tuple[bytes, bytes]] = start["headers"]
        if (b"connection", b"close") in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            headers = [*headers, (b"connection", b"close")]
        return head(start["status"], headers)

    def _finish(self) -> None:
        self.complete = True
        self._news.set()
        self._answered()
