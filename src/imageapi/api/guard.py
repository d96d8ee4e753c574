"""A browser is no client by accident: over TCP, a request names this host, and comes from no foreign page.

Without this a page anywhere on the web could have a browser on the node send requests here, by DNS rebinding
(CVE-2024-28224) or plainly: an image's address is enough for a GET, which here can stop a container and has no Origin;
of those Sec-Fetch-Site tells. On the Unix socket the file's mode says who may come.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection

from imageapi.api.complaints import shortened
from imageapi.api.problems import answer
from imageapi.api.request import App, Receive, Scope, Send, header_values
from imageapi.errors import Forbidden, Misdirected, Problem

FOREIGN_SITES = ("cross-site", "same-site")
"""Values of Sec-Fetch-Site (W3C, Fetch Metadata) that say a page of another origin is behind the request."""


class Guard:
    """The middleware. `names` are the hosts, beside loopback and the connection's own address, that are ours."""

    def __init__(self, app: App, names: Collection[str]) -> None:
        self._app = app
        self._names = {_plain(name) for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._complaint(scope) if scope["type"] == "http" and _is_tcp(scope) else None
        await (self._app if problem is None else answer(problem))(scope, receive, send)

    def _complaint(self, scope: Scope) -> Problem | None:
        hosts, origins = header_values(scope, b"host"), header_values(scope, b"origin")
        sites = header_values(scope, b"sec-fetch-site")
        local = scope["server"][0]
        if len(hosts) != 1 or not self._is_ours(host_name(hosts[0]), local):
            named = shortened(", ".join(hosts))
            return Misdirected(
                f"the request is for the host '{named}', which is not this one; use its address, or start the server "
                f"with --allowed-host and that name"
            )
        own = f"{scope['scheme']}://{hosts[0]}".lower()
        if any(origin.lower() != own for origin in origins) or any(site in FOREIGN_SITES for site in sites):
            return Forbidden(f"pages of {shortened(', '.join(origins) or 'another site')} may not use this API")
        return None

    def _is_ours(self, name: str, local_address: str) -> bool:
        return name in self._names or name == _plain(local_address) or is_loopback(name)


def _is_tcp(scope: Scope) -> bool:
    """Whether the connection has a port; one over the Unix socket has none."""
    server = scope.get("server")
    return server is not None and server[1] is not None


def host_name(host: str) -> str:
    """The name or address in a Host header: without the port, and as `_plain` has it."""
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        return _plain(name) if bracket and (not port or port.startswith(":")) else ""
    return _plain(host.partition(":")[0])


def _plain(name: str) -> str:
    """A host's name in lower case and without the dot of its end, an address in its shortest form."""
    address = _packed(name.partition("%")[0])
    if address is None:
        return name.lower().removesuffix(".")
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def is_loopback(name: str) -> bool:
    """Whether `name` is of loopback: an address, or a name that never is anybody else's (RFC 6761, 6.3)."""
    address = _packed(name)
    if address is None:
        return name == "localhost" or name.endswith(".localhost")
    return address[0] == 127 if len(address) == 4 else address == socket.inet_pton(socket.AF_INET6, "::1")


def _packed(name: str) -> bytes | None:
    """The bytes of an address, of an IPv4-mapped one (RFC 4291, 2.5.5.2) those of IPv4; None for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            return socket.inet_pton(family, name).removeprefix(bytes(10) + b"\xff\xff")
    return None
