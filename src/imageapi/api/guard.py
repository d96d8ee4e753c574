"""A browser is no client by accident: over TCP, a request names this host, and comes from no foreign page.

Without this a page anywhere on the web could have a browser on the node send requests here, by DNS rebinding
(CVE-2024-28224) or plainly. On the Unix socket the file's mode says who may come.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from imageapi.api.problems import answer
from imageapi.errors import Forbidden, Misdirected, Problem


class Guard:
    """The middleware. `names` are the hosts, beside loopback and the connection's own address, that are ours."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._complaint(scope) if scope["type"] == "http" else None
        await (self._app if problem is None else answer(problem))(scope, receive, send)

    def _complaint(self, scope: Scope) -> Problem | None:
        server = scope.get("server")
        if server is None or server[1] is None:
            return None
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host_name(host), server[0]):
            return Misdirected(
                f"the request is for the host '{host}', which is not this one; use its address, or start the server "
                f"with --allowed-host {host_name(host) or 'NAME'}"
            )
        if origin is not None and origin.lower() != f"{scope['scheme']}://{host}".lower():
            return Forbidden(f"pages of {origin} may not use this API")
        return None

    def _is_ours(self, name: str, local_address: str) -> bool:
        return name in self._names or name in ("localhost", local_address.lower()) or is_loopback(name)


def host_name(host: str) -> str:
    """The name or address in a Host header: without port and brackets, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def is_loopback(name: str) -> bool:
    """Whether `name` is an address of loopback."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
