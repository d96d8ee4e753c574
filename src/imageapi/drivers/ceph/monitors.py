"""Monitors: how they are written, and which of them answer.

A client of Ceph that meets a silent monitor waits inside a library where nothing can stop it. So each monitor is asked
first: both messengers of Ceph send a banner to whoever connects, which also tells which of the two a port speaks.
"""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from imageapi.errors import Invalid, TimedOut

LEGACY_PORT = 6789
MSGR2_PORT = 3300

PROBE_TIMEOUT = 5.0
"""Seconds for the first monitor to show its banner; an idle one takes milliseconds."""

GRACE = 0.1
"""Seconds more for the others once one has answered: one that is slow now is learnt from the cluster's own map."""

BANNERS = {b"ceph v2\n": "v2", b"ceph v0": "v1"}
"""How each messenger begins, and the name Ceph's addresses have for it."""

_BRACKETED = re.compile(r"\[(?P<host>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?)\](?::(?P<port>\d+))?")
_PLAIN = re.compile(r"(?P<host>[A-Za-z0-9._-]+)(?::(?P<port>\d+))?")
_BARE_V6 = re.compile(r"(?P<host>[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)(?P<port>)")


class Monitor(NamedTuple):
    """A monitor as it was asked for."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Address(NamedTuple):
    """A monitor that answers: an IP address, and the messenger it speaks there (`v1`, `v2`)."""

    ip: str
    port: int
    messenger: str

    def __str__(self) -> str:
        return f"{self.messenger}:{Monitor(self.ip, self.port)}"


def parse(texts: Sequence[str], default_port: int = LEGACY_PORT) -> list[Monitor]:
    """The monitors in `texts`: a name or an IPv4 or IPv6 address, each with or without a port ([IPv6]:port).

    Raises: errors.Invalid.
    """
    return [_parse(text, position, default_port) for position, text in enumerate(texts)]


def _parse(text: str, position: int, default_port: int) -> Monitor:
    match = _BRACKETED.fullmatch(text) or _BARE_V6.fullmatch(text) or _PLAIN.fullmatch(text)
    port = int((match and match["port"]) or default_port)
    if match is None or not 1 <= port <= 65535:
        raise Invalid(
            f"'{text}' is no monitor: write host, host:port, an IPv4 or IPv6 address, or [IPv6]:port",
            path=f"$.monitors[{position}]",
        )
    return Monitor(match["host"], port)


def store(texts: Sequence[str]) -> str:
    """The name of the cluster that these monitors are."""
    return "rbd:" + ",".join(sorted(texts))


def resolve(monitors: Sequence[Monitor]) -> list[tuple[str, int]]:
    """Their IP addresses and ports. A name that is not known is left out, as long as another is.

    Raises: errors.Invalid when none is known.
    """
    found: dict[tuple[str, int], None] = {}
    for monitor in monitors:
        with contextlib.suppress(socket.gaierror):
            # As bytes: for a str Python loads its IDNA codec first, several milliseconds in every new worker.
            for *_, address in socket.getaddrinfo(monitor.host.encode(), monitor.port, type=socket.SOCK_STREAM):
                found[str(address[0]), int(address[1])] = None
    if not found:
        raise Invalid(f"no monitor's name is known here: {names(monitors)}", path="$.monitors")
    return list(found)


def reachable(
    monitors: Sequence[Monitor], seconds: float = PROBE_TIMEOUT, addresses: Sequence[tuple[str, int]] | None = None
) -> list[Address]:
    """The monitors that answer now; it does not wait for the slow ones once one has. `addresses` are what they have
    been resolved to, if they have: a name server that is silent takes many seconds each time.

    Raises: errors.TimedOut when none does within `seconds`; errors.Invalid for unknown names.
    """
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(selectors.DefaultSelector())
        for address in resolve(monitors) if addresses is None else addresses:
            _connect(address, waiting, stack)
        found = _listen(waiting, seconds)
    if not found:
        raise TimedOut(
            f"no monitor answers: {names(monitors)}; see that the addresses are right, the monitors run and this "
            "host may reach them",
            path="$.monitors",
        )
    return found


def names(monitors: Sequence[Monitor]) -> str:
    """Them in a sentence."""
    return ", ".join(map(str, monitors))


def _connect(address: tuple[str, int], waiting: selectors.BaseSelector, stack: contextlib.ExitStack) -> None:
    connection = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET))
    connection.setblocking(False)
    try:
        connection.connect(address)
    except BlockingIOError:
        pass
    except OSError:
        return
    waiting.register(connection, selectors.EVENT_READ, address)


def _listen(waiting: selectors.BaseSelector, seconds: float) -> list[Address]:
    end = time.monotonic() + seconds
    found: list[Address] = []
    while waiting.get_map() and (left := end - time.monotonic()) > 0:
        for event, _ in waiting.select(left):
            connection = event.fileobj
            assert isinstance(connection, socket.socket)
            waiting.unregister(connection)
            messenger = _banner(connection)
            if messenger:
                ip, port = event.data
                found.append(Address(ip, port, messenger))
                end = min(end, time.monotonic() + GRACE)
    return found


def _banner(connection: socket.socket) -> str | None:
    try:
        data = connection.recv(64)
    except OSError:
        return None
    return next((name for banner, name in BANNERS.items() if data.startswith(banner)), None)
