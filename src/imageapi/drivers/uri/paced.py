"""A deadline for what an HTTP connection reads. Its time-outs are for each piece: a server that sends a byte every few
seconds, in a header or between two parts of a content, would be waited for without end.
"""

from __future__ import annotations

import errno
import io
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from http.client import HTTPResponse
from typing import Any, TypeVar, cast

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

_end: ContextVar[float] = ContextVar("end")
"""When what is being read must be there, in seconds of the monotonic clock."""
_Manager = TypeVar("_Manager", bound=urllib3.PoolManager)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Have all that is read within be there in so many seconds; else it fails with a TimeoutError."""
    before = _end.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _end.reset(before)


def pace(manager: _Manager) -> _Manager:
    """`manager`, whose connections keep to that."""
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
    return manager


class _Reader(io.RawIOBase):
    """What comes over a socket, for as long as there is time. `raw` reads from it."""

    def __init__(self, channel: socket.socket, raw: io.RawIOBase) -> None:
        self._channel = channel
        self._raw = raw
        self._silence = channel.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = _end.get() - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "it did not come whole in time")
        self._channel.settimeout(min(left, self._silence or left))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **more: Any) -> None:
        super().__init__(sock, *arguments, **more)
        self.fp = io.BufferedReader(_Reader(sock, self.fp.detach()))


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = cast(Any, _Connection)


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = cast(Any, _SecureConnection)
