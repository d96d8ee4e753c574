"""What a connection may bring that is no request, or only a part of one, over real sockets and an engine in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

import pytest
import uvloop

import imageapi.api.connection
from imageapi.api.app import app
from imageapi.api.connection import Connections
from imageapi.api.listen import Listeners
from imageapi.api.problems import Json
from imageapi.api.request import App
from imageapi.config import Config
from pure.memory_engine import MemoryEngine

pytestmark = pytest.mark.pure

PATIENCE = 20.0
HEAD = re.compile(rb"HTTP/1.1 (\d+) .*?content-length: (\d+)\r\n.*?\r\n\r\n", re.DOTALL)
HOST = b"Host: localhost\r\n"
GET = b"GET /imageapi/v1/container HTTP/1.1\r\n" + HOST + b"\r\n"
POST = b"POST /imageapi/v1/mount/bind HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
BIND = b'{"path":"/srv","base":"root"}'
CREATE = POST + b"Content-Length: %d\r\n\r\n" % len(BIND) + BIND

# The first loop of a process makes a pipe for signals that it keeps for all others: before any test looks around.
uvloop.new_event_loop().close()


class Service:
    """A server on a port of loopback, in a thread of its own."""

    def __init__(self, application: App | None = None, *, given: Sequence[socket.socket] = (), **config: Any) -> None:
        self.engine = MemoryEngine()
        self._config = Config(**{"schemes": ("http",), "host": "127.0.0.1", "port": 0, **config})
        self._application = application or app(self.engine, self._config)
        self._listeners = Listeners(self._config, given)
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()))

    async def _serve(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._up.set()
        await self._listeners.serve(self._application, self._stop)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the test has stopped it, and its loop is closed already
            self.stop()
        self._thread.join(PATIENCE)
        self._listeners.close()
        assert not self._thread.is_alive()

    def call(self, function: Any, *arguments: Any) -> None:
        """Do something in the server's loop."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def rest(self) -> None:
        """Wait for longer than it takes a timer to fire that was set before."""
        later = threading.Event()
        self.call(self.loop.call_later, 0.2, later.set)
        assert later.wait(PATIENCE)

    def stop(self) -> None:
        self.call(self._stop.set)

    def open_gate(self) -> None:
        assert self.engine.gate is not None
        self.call(self.engine.gate.set)

    def begin(self, peer: Peer | None = None) -> Peer:
        """A client whose create has come to the engine's gate, and waits there."""
        self.engine.gate = asyncio.Event()
        peer = peer or self.connect()
        peer.send(CREATE)
        asyncio.run_coroutine_threadsafe(self.engine.arrived.wait(), self.loop).result(PATIENCE)
        return peer

    @property
    def listener(self) -> socket.socket:
        return self._listeners._all[0].socket

    @property
    def port(self) -> int:
        return int(self._listeners.names[0].rpartition(":")[2])

    def connect(self) -> Peer:
        return Peer(socket.create_connection(("127.0.0.1", self.port), PATIENCE))

    def connect_unix(self) -> Peer:
        """A client on its Unix socket."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        client.connect(self._config.socket_path)
        return Peer(client)

    def say(self, *parts: bytes) -> tuple[int, Any]:
        """Status and JSON of the answer to these bytes on a connection of their own."""
        with self.connect() as peer:
            for part in parts:
                peer.send(part)
            return peer.answer()


class Peer:
    """A client that says what it likes."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._data = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> tuple[int, Any]:
        """The next answer."""
        while (match := HEAD.match(self._data)) is None:
            self.receive()
        assert b"content-type: application/json\r\n" in match[0]
        end = match.end() + int(match[2])
        while len(self._data) < end:
            self.receive()
        body, self._data = self._data[match.end() : end], self._data[end:]
        return int(match[1]), json.loads(body)

    def receive(self) -> None:
        """Read on."""
        more = self.socket.recv(65536)
        assert more, f"it was closed after {bytes(self._data)!r}"
        self._data += more

    def at_end(self) -> bool:
        """Whether the server says nothing more: waits for its end."""
        return self._data == b"" and self.socket.recv(1) == b""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service(max_body_size=10_000, max_header_size=4_000) as service:
        yield service


NOISE: dict[str, bytes] = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n" * 10,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a tunnel": b"CONNECT db:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path that is no ASCII": b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length and chunks": POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a length that is none": POST + b"Content-Length: -2\r\n\r\n",
    "a chunk that is none": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("name", NOISE)
def test_what_is_no_request_is_told_so_and_the_connection_ends(service: Service, name: str) -> None:
    with service.connect() as peer:
        peer.send(NOISE[name])
        code, problem = peer.answer()
        assert (code, problem["code"]) == (400, 400)
        assert peer.at_end()
    assert service.say(GET) == (200, [])


@pytest.mark.parametrize(("name", "reason"), [("a length and chunks", "Content-Length"), ("a tunnel", "is no path")])
def test_what_is_no_request_is_told_with_the_reason(service: Service, name: str, reason: str) -> None:
    with service.connect() as peer:
        peer.send(NOISE[name])
        _, problem = peer.answer()
        assert reason in problem["message"]
    assert service.say(b"GET http://localhost HTTP/1.1\r\n" + HOST + b"\r\n")[0] == 404, "RFC 9112, 3.2.2"


@pytest.mark.parametrize(
    "parts",
    [(GET[:-2] + b"X: " + b"y" * 5000 + b"\r\n\r\n",), (GET[:-2], b"X: " + b"y" * 5000),
     (b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",), (GET + GET[:-2] + b"X: " + b"y" * 5000,)],
    ids=["at once", "in pieces", "a long path", "behind another"],
)  # fmt: skip
def test_a_header_over_the_limit(service: Service, parts: tuple[bytes, ...]) -> None:
    with service.connect() as peer:
        for part in parts:
            peer.send(part)
        code, _ = peer.answer()
        assert code == (200 if parts[0].startswith(GET) else 431)
        assert peer.at_end()


class Wire(asyncio.Transport):
    """A transport that notes what is written to it, write by write."""

    def __init__(self, connection: asyncio.Protocol) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self._connection = connection

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def write_eof(self) -> None:
        self._connection.connection_lost(None)

    def resume_reading(self) -> None:
        pass


def written(application: App, request: bytes) -> list[bytes]:
    """What is written when a connection that says `request` is served by the application."""

    async def serve() -> list[bytes]:
        connections = Connections(application, Config())
        connection = connections.new()
        wire = Wire(connection)
        connection.connection_made(wire)
        connection.data_received(request)
        await connections.finish(connections.config.graceful_timeout)
        return wire.writes

    return uvloop.run(serve())


@pytest.mark.parametrize("said", [GET, CREATE, POST + b"Content-Length: 2\r\n\r\n{}", b"no request\r\n\r\n"])
def test_an_answer_is_one_write(said: bytes) -> None:
    (answer,) = written(app(MemoryEngine(), Config()), said)
    found = HEAD.match(answer)
    assert found is not None
    assert len(answer) == found.end() + int(found[2])


def test_an_application_that_fails_is_answered_for(caplog: pytest.LogCaptureFixture) -> None:
    async def failing(*_: object) -> None:
        raise KeyError("something of ours")

    (answer,) = written(failing, GET)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"something of ours" not in answer
    assert "something of ours" in caplog.text


def test_it_is_at_rest_once_when_requests_have_ceased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imageapi.api.connection, "REST", 0.02)
    answered: list[int] = []
    moments: list[int] = []

    async def serve() -> None:
        connections = Connections(app(MemoryEngine(), Config()), Config(), lambda: moments.append(len(answered)))
        connection = connections.new()
        connection.connection_made(Wire(connection))
        for _ in range(3):
            connection.data_received(GET)
            await asyncio.sleep(0.001)
            answered.append(1)
        await asyncio.sleep(0.2)
        await connections.finish(connections.config.graceful_timeout)

    uvloop.run(serve())
    assert moments == [3]


@pytest.mark.parametrize("ending", [GET.replace(b"/1.1", b"/1.0"), GET[:-2] + b"Connection: close\r\n\r\n"])
def test_a_client_that_wants_one_answer_gets_one(service: Service, ending: bytes) -> None:
    with service.connect() as peer:
        peer.send(ending)
        assert peer.answer() == (200, [])
        assert peer.at_end()


def test_an_idle_connection_is_closed_after_a_while() -> None:
    with Service(keep_alive=0.1) as service, service.connect() as peer:
        peer.send(GET)
        assert peer.answer() == (200, [])
        assert peer.at_end()


def test_what_is_wrong_with_a_later_request_does_not_cost_the_earlier_one_its_answer(service: Service) -> None:
    with service.begin() as peer:
        peer.send(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        peer.send(b"more")
        assert service.say(GET) == (200, [])
        service.open_gate()
        assert peer.answer()[0] == 201
        assert peer.at_end()


def test_requests_behind_each_other_are_answered_in_order(service: Service) -> None:
    with service.connect() as peer:
        peer.send(CREATE + GET + b"no request\r\n\r\n")
        assert peer.answer()[0] == 201
        assert peer.answer() == (200, [])
        assert peer.at_end()


def test_a_connection_goes_on_after_a_refusal(service: Service) -> None:
    with service.connect() as peer:
        peer.send(POST + b"Content-Length: 2\r\n\r\n{}")
        assert peer.answer()[0] == 422
        peer.send(GET)
        assert peer.answer() == (200, [])


def test_a_client_that_still_sends_can_read_why_it_should_not(service: Service) -> None:
    """More than all buffers between hold, of which the server reads no more than its limit."""
    with service.connect() as peer:
        peer.send(POST + b"Content-Length: 30000000\r\n\r\n")
        peer.send(b" " * 30_000_000)
        code, problem = peer.answer()
        assert (code, "10000" in problem["message"]) == (413, True)


async def long(scope: Any, receive: Any, send: Any) -> None:
    """Answers with more than all buffers between hold."""
    await Json("x" * 20_000_000)(scope, receive, send)


def ask_and_rest(service: Service, peer: Peer) -> None:
    """Ask for a last answer, and do not read on for longer than it takes a timer to fire that was set before."""
    peer.send(GET[:-2] + b"Connection: close\r\n\r\n")
    peer.receive()
    service.rest()


def test_a_last_answer_is_not_cut_off_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long that may take is the write timeout's; the client is waited for only after that."""
    monkeypatch.setattr(imageapi.api.connection, "LINGER", 0.05)
    with Service(long) as service, service.connect() as peer:
        ask_and_rest(service, peer)
        assert peer.answer() == (200, "x" * 20_000_000)
        assert peer.at_end()


def test_a_last_answer_that_nobody_reads_is_given_up() -> None:
    with Service(long, write_timeout=0.1) as service, service.connect() as peer:
        ask_and_rest(service, peer)
        with contextlib.suppress(ConnectionError):
            assert sum(map(len, iter(lambda: peer.socket.recv(1 << 20), b""))) < 20_000_000


MOST = 40_000
"""Bytes that small buffers do not hold of a short answer, also when one record of TLS is read besides (16 KiB)."""


async def short(scope: Any, receive: Any, send: Any) -> None:
    """Answers with more than small buffers hold, and less than makes a transport say that it is too much."""
    await Json("x" * 60_000)(scope, receive, send)


def ask_with_small_buffers(service: Service) -> Peer:
    """A client for whom a part of a short answer waits in the server."""
    service.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = socket.socket()
    client.settimeout(PATIENCE)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", service.port))
    return Peer(client)


def test_what_a_client_leaves_unread_at_its_end_is_given_up() -> None:
    with Service(short, write_timeout=0.1) as service, ask_with_small_buffers(service) as peer:
        peer.send(GET)
        peer.receive()
        peer.socket.shutdown(socket.SHUT_WR)
        service.rest()
        assert left(peer) < MOST


def left(peer: Peer) -> int:
    """Bytes that have come and do so until the end, be they enciphered or not."""
    total = len(peer._data)
    with contextlib.suppress(ConnectionError):
        while more := socket.socket.recv(peer.socket, 1 << 16):
            total += len(more)
    return total


def test_a_client_that_waits_to_be_told_to_go_on(service: Service) -> None:
    with service.connect() as peer:
        peer.send(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BIND))
        assert peer.socket.recv(100).startswith(b"HTTP/1.1 100 ")
        peer.send(BIND)
        assert peer.answer()[0] == 201
        peer.send(POST + b"Expect: 100-continue\r\nContent-Length: 20000\r\n\r\n")
        assert peer.answer()[0] == 413


# ------------------------------------------------------------------------------------------------- slow clients

LATE: dict[str, tuple[bytes, ...]] = {
    "nothing at all": (b"",),
    "half a head": (GET[:20],),
    "half a body": (POST + b"Content-Length: 100\r\n\r\n{",),
    "half a chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\n9\r\n{",),
}


@pytest.mark.parametrize("name", LATE)
def test_a_request_that_does_not_come_whole_in_time(name: str) -> None:
    with Service(read_timeout=0.2) as service, service.connect() as peer:
        for part in LATE[name]:
            peer.send(part)
        code, problem = peer.answer()
        assert (code, problem["code"]) == (408, 408)
        assert peer.at_end()
        assert service.engine.pictures("mount") == []


def test_what_is_already_answered_may_not_drip_on_for_ever() -> None:
    with Service(read_timeout=0.2) as service, service.connect() as peer:
        peer.send(GET[:-2] + b"Content-Length: 100\r\n\r\n{")
        assert peer.answer() == (200, [])
        assert peer.at_end()


def test_a_create_may_take_longer_than_reading_its_request() -> None:
    """The read timeout is over once the request is read: the answer comes when it comes."""
    with Service(read_timeout=0.2) as service, service.begin() as peer, service.connect() as idle:
        assert idle.answer()[0] == 408, "as long as a connection that began later had"
        service.open_gate()
        assert peer.answer()[0] == 201


def test_a_request_waits_behind_another_as_long_as_that_takes() -> None:
    """Nobody reads on meanwhile: the client is not to blame that its second body has not come."""
    with Service(read_timeout=0.2) as service, service.begin() as peer, service.connect() as idle:
        peer.send(CREATE[:-5])
        assert idle.answer()[0] == 408, "as long as a connection that began later had"
        service.open_gate()
        assert peer.answer()[0] == 201
        peer.send(CREATE[-5:])
        assert peer.answer()[0] == 201


def test_a_client_that_hangs_up_has_its_create_undone(service: Service) -> None:
    service.begin().socket.close()
    assert service.engine.cancelled.wait(PATIENCE)
    assert service.say(GET.replace(b"container", b"mount")) == (200, [])


def test_more_connections_than_the_limit_can_read_so() -> None:
    with Service(listen_limit=1) as service, service.connect() as first:
        first.send(GET)
        assert first.answer() == (200, [])
        code, problem = service.say(GET)
        assert (code, "--listen-limit" in problem["message"]) == (503, True)
        first.send(GET)
        assert first.answer() == (200, [])


def test_the_end_of_the_server_waits_for_the_answers_that_are_due() -> None:
    with Service() as service, service.begin() as peer:
        service.stop()
        service.open_gate()
        assert peer.answer()[0] == 201


def test_what_the_end_cannot_wait_for_is_told_so() -> None:
    with Service(graceful_timeout=0.1) as service, service.begin() as peer:
        service.stop()
        assert peer.answer()[0] == 503
        assert service.engine.cancelled.wait(PATIENCE)


def test_the_end_of_the_server_closes_what_is_open() -> None:
    """Idle connections, one whose last answer nobody reads on after, and one in the middle of a request."""
    with Service() as service, service.connect() as idle, service.connect() as noise, service.connect() as half:
        idle.send(GET)
        assert idle.answer() == (200, [])
        noise.send(b"no request\r\n\r\n")
        assert noise.answer()[0] == 400
        half.send(GET + GET[:20])
        assert half.answer() == (200, [])
        service.stop()
        assert idle.at_end()
        assert noise.at_end()
        assert half.at_end()
