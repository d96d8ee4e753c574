"""Where the service listens, and what of HTTP is refused before there is a request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from imageapi.api.guard import is_loopback
from imageapi.api.problems import raw
from imageapi.config import Config
from imageapi.errors import Conflict, Exhausted, HeadersTooLarge, Invalid, Malformed, Problem, TooSlow

BACKLOG = 2048
LOCALHOST = [(int(socket.AF_INET), "127.0.0.1"), (int(socket.AF_INET6), "::1")]
"""What localhost is, also where no file says so (RFC 6761, 6.3)."""


class Listeners:
    """The sockets of one server, bound from the start and gone at the end."""

    def __init__(self, config: Config) -> None:
        """Raises: errors.Problem, when one cannot be had."""
        self._config = config
        self._sockets: list[socket.socket] = []
        self._own: tuple[int, int] | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for scheme in config.schemes:
                self._sockets += [self._unix()] if scheme == "unix" else list(_http(config))
            undo.pop_all()

    @property
    def names(self) -> list[str]:
        """How a client calls each."""
        return [_name(one) for one in self._sockets]

    async def serve(self, app: ASGIApp, stop: asyncio.Event) -> None:
        """Answer requests until `stop`, then let those under way end."""
        protocols = Protocols(app, self._config)
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(protocols.new, sock=one, backlog=BACKLOG) for one in self._sockets]
        await stop.wait()
        for server in servers:
            server.close()
        await protocols.finish()

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


def _http(config: Config) -> Iterator[socket.socket]:
    """A listener on each address of the host, all on one port."""
    port = config.port
    for family, address in _addresses(config):
        listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
        port = listener.getsockname()[1]
        yield listener


def _addresses(config: Config) -> list[tuple[int, str]]:
    """The addresses of the listening host that this machine has.

    Raises: Invalid, when there is none, or when plain http would be heard beyond loopback.
    """
    addresses = LOCALHOST if config.host == "localhost" else _resolve(config.host)
    beyond = [address for _, address in addresses if not is_loopback(address)]
    if beyond and not config.insecure_http:
        raise Invalid(
            f"--host {config.host} ({', '.join(beyond)}) is not loopback, and whoever reaches plain http is root here; "
            f"choose localhost, --scheme unix, or say --insecure-http"
        )
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


# -------------------------------------------------------------------------------------------------- connections


class Protocols:
    """The connections of one server."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self._config = config
        self._state = ServerState()
        self._uvicorn = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(config.keep_alive)),
        )
        self._uvicorn.load()

    def new(self) -> Protocol:
        return Protocol(self._uvicorn, self._state, {}, limits=self._config)

    async def finish(self) -> None:
        """Close what is idle, and wait for the answers that are due."""
        for protocol in list(self._state.connections):
            protocol.shutdown()
        deadline = asyncio.get_running_loop().time() + self._config.graceful_timeout
        while self._state.tasks and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(set(self._state.tasks), timeout=left)
        for task in list(self._state.tasks):
            task.cancel()


class Protocol(HttpToolsProtocol):
    """uvicorn's, with limits, and with answers in JSON to what is no request."""

    def __init__(self, *arguments: Any, limits: Config) -> None:
        super().__init__(*arguments)
        self._limits = limits
        self._chunk = 0
        self._head_size = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limit = self._limits.listen_limit
        if limit and len(self.connections) > limit:
            self._refuse(Exhausted(f"{limit} connections are open, which is the --listen-limit; close one"))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_has_come()
        self._write_has_gone()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read its answer: it has so long to go on."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._write_has_gone()
        super().resume_writing()

    def _write_has_gone(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._chunk = len(data)
        self._head_size += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_size > self._limits.max_header_size:
            self._refuse(HeadersTooLarge(f"the header is larger than {self._limits.max_header_size} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()
        self._head_size = self._chunk  # what came with its first byte may be another's: a bound, not a measure

    def on_headers_complete(self) -> None:
        self._head_has_come()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_header_size:
            self._refuse(HeadersTooLarge(f"the header is larger than {self._limits.max_header_size} bytes"))
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Malformed("this is no HTTP/1.1 request"))

    def _await_head(self) -> None:
        self._stop_waiting()
        self._head_timer = self.loop.call_later(self._limits.read_timeout, self._head_is_late)

    def _head_has_come(self) -> None:
        self._head_size = 0
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._refuse(TooSlow(f"no request came within {self._limits.read_timeout:g}s"))

    def _refuse(self, problem: Problem) -> None:
        self._head_has_come()
        if not self.transport.is_closing():
            self.transport.write(raw(problem))
            self.transport.close()
