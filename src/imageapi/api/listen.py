"""Where the service listens: sockets that are bound at the start and gone at the end, or those that somebody else has
bound for it, who keeps them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from imageapi.api.connection import Connections
from imageapi.api.guard import is_loopback
from imageapi.api.request import App
from imageapi.config import Config
from imageapi.engine.tasks import unless
from imageapi.errors import Conflict, Invalid

if TYPE_CHECKING:
    import ssl

BACKLOG = 2048
BEYOND_TLS = (
    "is not loopback, and whoever reaches it is root here; have clients show a certificate (--tls-ca), or say "
    "--insecure-http"
)
BEYOND = (
    "is not loopback, and whoever reaches plain http is root here; choose localhost or a Unix socket, or say "
    "--insecure-http"
)
LOCALHOST = [(int(socket.AF_INET), "127.0.0.1"), (int(socket.AF_INET6), "::1")]
"""What localhost is, also where no file says so (RFC 6761, 6.3)."""


class Listener(NamedTuple):
    """One socket, and what is spoken on it: `unix` and `http` are plain, `https` is not."""

    socket: socket.socket
    scheme: str

    @property
    def name(self) -> str:
        """How a client calls it."""
        address = self.socket.getsockname()
        if isinstance(address, str):
            return f"unix:{address}"
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"{self.scheme}://{host}:{address[1]}"


class Listeners:
    """The sockets of one server, bound from the start and gone at the end. Where sockets are `given`, those are all."""

    def __init__(self, config: Config, given: Sequence[socket.socket] = ()) -> None:
        """Raises: errors.Problem, when one cannot be had."""
        self._config = config
        self._all = _handed_over(given, config)
        self._given = bool(given)
        self._own: tuple[int, int] | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for scheme in () if given else config.schemes:
                self._all += [Listener(one, scheme) for one in self._bound(scheme)]
            self._tls = _context(config) if any(one.scheme == "https" for one in self._all) else None
            undo.pop_all()

    def _bound(self, scheme: str) -> Iterable[socket.socket]:
        if scheme == "unix":
            return [self._unix()]
        return _http(self._config) if scheme == "http" else _https(self._config)

    @property
    def names(self) -> list[str]:
        """How a client calls each."""
        return [one.name for one in self._all]

    async def serve(
        self,
        app: App,
        stop: asyncio.Event,
        at_rest: Callable[[], None] = lambda: None,
        in_vain: Callable[[], bool] = lambda: False,
    ) -> None:
        """Answer requests until `stop`, then let those under way end, unless it is `in_vain` to wait for them: new ones
        are for the next server where sockets are given, and are refused at once elsewhere. `at_rest` is as for
        Connections."""
        connections = Connections(app, self._config, at_rest)
        await unless(stop, self._let_in(connections))
        if not self._given:
            self.close()
        await connections.finish(0.0 if in_vain() else self._config.graceful_timeout)

    async def _let_in(self, connections: Connections) -> NoReturn:
        """Take connections, for ever, as long as there are descriptors for them; otherwise they wait in the kernel. A
        copy of each socket accepts them, since it is closed with its server."""
        loop, new = asyncio.get_running_loop(), self._makers(connections)
        while True:
            servers = [
                await loop.create_server(new[one.scheme], sock=one.socket.dup(), backlog=BACKLOG) for one in self._all
            ]
            try:
                await connections.crowded.wait()
            finally:
                for server in servers:
                    server.close()
            await connections.roomy.wait()

    def _makers(self, connections: Connections) -> dict[str, Callable[[], asyncio.Protocol]]:
        """What makes a connection over each scheme."""
        plain: dict[str, Callable[[], asyncio.Protocol]] = {"unix": connections.new, "http": connections.new}
        if (tls := self._tls) is None:
            return plain
        from imageapi.api.secure import Secured

        return {**plain, "https": lambda: Secured(connections.new_over_tls(), tls, connections.loop)}

    def close(self) -> None:
        """Close all, and remove the socket file if it is still ours."""
        for one in self._all:
            one.socket.close()
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self._config.socket_path)
            if self._own == (status.st_dev, status.st_ino):
                os.unlink(self._config.socket_path)
        self._own = None

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


def _handed_over(given: Sequence[socket.socket], config: Config) -> list[Listener]:
    """The sockets that were bound for us. Where https was asked for, it is spoken on those with its port.

    Raises: Invalid, when one is of no use or is heard beyond loopback, or when none is for the https asked for.
    """
    found = [_checked(one, config) for one in given]
    if given and "https" in config.schemes and not any(one.scheme == "https" for one in found):
        raise Invalid(
            f"--scheme https: no socket that was handed over has the port {config.tls.port}; give the port of a "
            "ListenStream= in the unit as --tls-port, or leave out --scheme https"
        )
    return found


def _checked(given: socket.socket, config: Config) -> Listener:
    address = given.getsockname()
    if given.type != socket.SOCK_STREAM or not given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise Invalid("a socket that was handed over is none that streams come in on; give ListenStream= in the unit")
    if given.family == socket.AF_UNIX:
        return Listener(given, "unix")
    secured = "https" in config.schemes and address[1] == config.tls.port
    beyond = _beyond_tls(config) if secured else _beyond(config)
    if beyond is not None and not is_loopback(address[0]):
        raise Invalid(f"ListenStream= {address[0]}:{address[1]} {beyond}")
    return Listener(given, "https" if secured else "http")


def _beyond(config: Config) -> str | None:
    """Why plain http may not be heard beyond loopback; None if it may."""
    return None if config.insecure_http else BEYOND


def _beyond_tls(config: Config) -> str | None:
    """The same of https."""
    return None if config.tls.ca is not None or config.insecure_http else BEYOND_TLS


def _http(config: Config) -> Iterator[socket.socket]:
    return _on_all(config.host, config.port, "", _beyond(config))


def _https(config: Config) -> Iterator[socket.socket]:
    return _on_all(config.tls.host, config.tls.port, "tls-", _beyond_tls(config))


def _context(config: Config) -> ssl.SSLContext:
    from imageapi.api import secure  # no other listener has use for it

    return secure.context(config.tls)


def _on_all(host: str, port: int, options: str, beyond: str | None) -> Iterator[socket.socket]:
    """A listener on each address of the host, all on one port. `options`: what the names of its options begin with."""
    for family, address in _addresses(host, f"--{options}host", beyond):
        try:
            listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise Invalid(f"--{options}port {port}: {error.strerror or error} ({address})") from error
        port = listener.getsockname()[1]
        yield listener


def _addresses(host: str, option: str, beyond: str | None) -> list[tuple[int, str]]:
    """The addresses of the listening host that this machine has.

    Raises: Invalid, when there is none, or when it would be heard beyond loopback, and `beyond` says why not.
    """
    addresses = LOCALHOST if host == "localhost" else _resolve(host, option)
    heard = [address for _, address in addresses if not is_loopback(address)]
    if heard and beyond is not None:
        raise Invalid(f"{option} {host} ({', '.join(heard)}) {beyond}")
    usable = [(family, address) for family, address in addresses if _can_bind(family, address)]
    if not usable:
        raise Invalid(f"{option} {host}: this machine does not have the address {addresses[0][1]}")
    return usable


def _resolve(host: str, option: str) -> list[tuple[int, str]]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Invalid(f"{option} {host}: {error.strerror or error}") from error
    return list(dict.fromkeys((int(family), str(address[0])) for family, _, _, _, address in found))


def _can_bind(family: int, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
