"""From an exception to an answer: the one place where HTTP statuses and bodies of failures are made."""

from __future__ import annotations

import logging
import os
import time
from functools import cache, lru_cache
from http import HTTPStatus

import msgspec

from imageapi.api.request import Receive, Request, Scope, Send
from imageapi.errors import Problem, TooLarge

log = logging.getLogger(__name__)

JSON = "application/json"
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
MINIMAL = "return=minimal"
"""The preference of a client that needs no picture of what it has changed."""
Headers = list[tuple[bytes, bytes]]


class Json:
    """An answer of the API. Its type is exactly `application/json`, which is all the Go clients read."""

    def __init__(self, content: object, status: int = 200, **headers: str) -> None:
        self._body = msgspec.json.encode(content)
        self._status = status
        self.headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(self._body) if self._body else []
        headers += [(name.encode("ascii"), value.encode("ascii")) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body})


class Done(Json):
    """That all is well and no more, for a client that asked for as little (RFC 7240, 4.2)."""

    def __init__(self) -> None:
        super().__init__(None, 204, **{"preference-applied": MINIMAL})
        self._body = b""


def answer(problem: Problem) -> Json:
    """The answer that tells a problem. It is the connection's last where the request was not read to its end."""
    headers: dict[str, str] = {}
    if allow := problem.fields.get("allow"):
        headers["allow"] = ", ".join(allow)
    if isinstance(problem, TooLarge):
        headers["connection"] = "close"
    return Json(problem.to_dict(), problem.code, **headers)


def bug(request: Request, error: Exception) -> Json:
    """The answer to what only we can have caused: a number that is in the log too, beside the trace."""
    reference = os.urandom(4).hex()
    log.error("bug %s in %s %s", reference, request.method, request.path, exc_info=error)
    return answer(Problem(f"a bug of this server; its log has the trace under {reference}"))


def raw(problem: Problem) -> bytes:
    """The whole answer, for a connection on which no request could be read. It is the connection's last."""
    body = msgspec.json.encode(problem.to_dict())
    headers = [*headers_of(body), (b"connection", b"close")]
    return head(problem.code, headers) + body


def head(status: int, headers: Headers) -> bytes:
    """All of an answer before its body."""
    lines = [_status_line(status), _date(int(time.time())), *(b"%b: %b\r\n" % header for header in headers), b"\r\n"]
    return b"".join(lines)


@lru_cache(maxsize=1)
def _date(moment: int) -> bytes:
    """When an answer was made, which every answer says (RFC 9110, 6.6.1), in English whatever the locale."""
    at = time.gmtime(moment)
    clock = f"{at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02}"
    day = f"{DAYS[at.tm_wday]}, {at.tm_mday:02} {MONTHS[at.tm_mon - 1]} {at.tm_year}"
    return f"date: {day} {clock} GMT\r\n".encode("ascii")


@cache
def _status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode("ascii")


def headers_of(body: bytes) -> Headers:
    """What every answer says of its body."""
    return [(b"content-length", b"%d" % len(body)), (b"content-type", JSON.encode("ascii"))]
