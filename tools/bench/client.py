"""A client of the API that does not measure itself: requests are made beforehand, and an answer is one recv."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_STAGE = re.compile(rb"([\w-]+);dur=([\d.]+)")
_BIGGEST = 1 << 20


class Refused(Exception):
    """An answer that is an error; the text is its message."""


def request(method: str, path: str, body: Any = None) -> bytes:
    """All of a request as it goes over the wire. `path` comes after `/imageapi/v1`."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} /imageapi/v1{path} HTTP/1.1\r\nHost: localhost\r\n"
    if content:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"\r\n" + content


class Answer(NamedTuple):
    """The head and the body, not yet read."""

    head: bytes
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def stages(self) -> dict[str, float]:
        """The milliseconds of each stage, in the order of Server-Timing; empty where the server does not tell."""
        told = next((line for line in self.head.split(b"\r\n") if line.lower().startswith(b"server-timing:")), b"")
        return {name.decode(): float(taken) for name, taken in _STAGE.findall(told)}


class Client:
    """One connection, kept open."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, sent: bytes) -> Answer:
        """Raises: Refused; OSError."""
        self._socket.sendall(sent)
        head, _, body = self._socket.recv(_BIGGEST).partition(b"\r\n\r\n")
        if not head:
            raise ConnectionError("the server has closed the connection")
        answer = Answer(head, self._rest(body, _length(head)))
        if head[9:10] != b"2":
            raise Refused(answer.json()["message"])
        return answer

    def _rest(self, body: bytes, length: int) -> bytes:
        parts, missing = [body], length - len(body)
        while missing > 0:
            parts.append(self._socket.recv(_BIGGEST))
            missing -= len(parts[-1])
        return b"".join(parts)

    def await_state(self, container: int, state: str, pause: float = 0.0) -> None:
        """Ask until the container is in this state, with `pause` seconds between questions.

        Raises: Refused when it is dead.
        """
        look, wanted = request("GET", f"/container/{container}"), f'"state":"{state}"'.encode()
        while wanted not in (body := self.ask(look).body):
            if b'"state":"dead"' in body:
                raise Refused(f"container {container} is dead: {body.decode()}")
            if pause:
                time.sleep(pause)


def _length(head: bytes) -> int:
    found = _LENGTH.search(head)
    if found is None:
        raise Refused(f"there is no Content-Length in {head!r}")
    return int(found[1])
