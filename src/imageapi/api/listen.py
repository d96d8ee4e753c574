"""Where the service listens: sockets that are bound at the start and gone at the end, or those that somebody else has
bound for it, who keeps them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from imageapi.api.connection import Connections
from imageapi.api.guard import is_loopback
from imageapi.api.request import App
from imageapi.config import Config
from imageapi.engine.tasks import unless
from imageapi.errors import Conflict, Invalid

BACKLOG = 2048
BEYOND = (
    "is not loopback, and whoever reaches plain http is root here; choose localhost or a Unix socket, or say "
    "--insecure-http"
)
LOCALHOST = [(int(socket.AF_INET), "127.0.0.1"), (int(socket.AF_INET6), "::1")]
"""What localhost is, also where no file says so (RFC 6761, 6.3)."""


class Listeners:
    """The sockets of one server, bound from the start and gone at the end. Where sockets are `given`, those are all."""

    def __init__(self, config: Config, given: Sequence[socket.socket] = ()) -> None:
        """Raises: errors.Problem, when one cannot be had."""
        self._config = config
        self._sockets = [_checked(one, config) for one in given]
        self._own: tuple[int, int] | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for scheme in () if given else config.schemes:
                self._sockets.extend([self._unix()] if scheme == "unix" else _http(config))
            undo.pop_all()

    @property
    def names(self) -> list[str]:
        """How a client calls each."""
        return [_name(one) for one in self._sockets]

    async def serve(self, app: App, stop: asyncio.Event, at_rest: Callable[[], None] = lambda: None) -> None:
        """Answer requests until `stop`, then let those under way end. `at_rest` is as for Connections."""
        connections = Connections(app, self._config, at_rest)
        await unless(stop, self._let_in(connections))
        await connections.finish()

    async def _let_in(self, connections: Connections) -> NoReturn:
        """Take connections, for ever, as long as there are descriptors for them; otherwise they wait in the kernel. A
        copy of each socket accepts them, since it is closed with its server."""
        new, loop = connections.new, asyncio.get_running_loop()
        while True:
            servers = [await loop.create_server(new, sock=one.dup(), backlog=BACKLOG) for one in self._sockets]
            try:
                await connections.crowded.wait()
            finally:
                for server in servers:
                    server.close()
            await connections.roomy.wait()

    def close(self) -> None:
        """Close all, and remove the socket file if it is still ours."""
        for one in self._sockets:
            one.close()
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self._config.socket_path)
            if self._own == (status.st_dev, status.st_ino):
                os.unlink(self._config.socket_path)

    def _unix(self) -> socket.socket:
        path = self._config.socket_path
        _make_way(path)
        listener = socket.socket(socket.AF_UNIX)
        try:
            previous = os.umask(0o177)
            try:
                listener.bind(path)
            finally:
                os.umask(previous)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise Invalid(f"--socket-path {path}: {error.strerror or error}") from error
        status = os.stat(path)
        self._own = (status.st_dev, status.st_ino)
        return listener


def _make_way(path: str) -> None:
    """Remove a socket file that nobody listens on any more.

    Raises: Conflict, when somebody does; Invalid, when it is another kind of file.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            if not _is_socket(path):
                raise Invalid(f"{path} is there and is no socket; choose another --socket-path") from None
            os.unlink(path)
            return
        except OSError as error:
            raise Invalid(f"--socket-path {path}: {error.strerror or error}") from error
    raise Conflict(f"somebody listens on {path} already; stop that server, or choose another --socket-path")


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode)


def _checked(given: socket.socket, config: Config) -> socket.socket:
    """A socket that was bound for us.

    Raises: Invalid, when it is of no use, or is heard beyond loopback.
    """
    address = given.getsockname()
    if given.type != socket.SOCK_STREAM or not given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise Invalid("a socket that was handed over is none that streams come in on; give ListenStream= in the unit")
    if given.family != socket.AF_UNIX and not is_loopback(address[0]) and not config.insecure_http:
        raise Invalid(f"ListenStream= {address[0]}:{address[1]} {BEYOND}")
    return given


def _http(config: Config) -> Iterator[socket.socket]:
    """A listener on each address of the host, all on one port."""
    port = config.port
    for family, address in _addresses(config):
        try:
            listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise Invalid(f"--port {port}: {error.strerror or error} ({address})") from error
        port = listener.getsockname()[1]
        yield listener


def _addresses(config: Config) -> list[tuple[int, str]]:
    """The addresses of the listening host that this machine has.

    Raises: Invalid, when there is none, or when plain http would be heard beyond loopback.
    """
    addresses = LOCALHOST if config.host == "localhost" else _resolve(config.host)
    beyond = [address for _, address in addresses if not is_loopback(address)]
    if beyond and not config.insecure_http:
        raise Invalid(f"--host {config.host} ({', '.join(beyond)}) {BEYOND}")
    usable = [(family, address) for family, address in addresses if _can_bind(family, address)]
    if not usable:
        raise Invalid(f"--host {config.host}: this machine does not have the address {addresses[0][1]}")
    return usable


def _resolve(host: str) -> list[tuple[int, str]]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Invalid(f"--host {host}: {error.strerror or error}") from error
    return list(dict.fromkeys((int(family), str(address[0])) for family, _, _, _, address in found))


def _can_bind(family: int, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _name(listener: socket.socket) -> str:
    address = listener.getsockname()
    if isinstance(address, str):
        return f"unix:{address}"
    return f"http://[{address[0]}]:{address[1]}" if ":" in address[0] else f"http://{address[0]}:{address[1]}"
