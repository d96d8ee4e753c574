"""A server is asked before the kernel is: by a peer that speaks as a server does, or not."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator

import pytest

from imageapi.drivers.nfs import options, rpc, server
from imageapi.errors import Invalid, Problem, TimedOut
from imageapi.spec import Nfs

pytestmark = pytest.mark.pure


def reply(call: bytes, accepted: int, results: bytes = b"") -> bytes:
    """An RPC reply (RFC 5531) to a call, with its fragment's header."""
    body = call[4:8] + struct.pack(">IIIII", 1, 0, 0, 0, accepted) + results
    return struct.pack(">I", 1 << 31 | len(body)) + body


@contextlib.contextmanager
def peer(answer: Callable[[bytes], Iterable[int]], family: socket.AddressFamily = socket.AF_INET) -> Iterator[int]:
    """A listener that answers the first call of each connection, byte by byte; its port."""
    with socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):  # who asked may have heard enough
                    for byte in answer(connection.recv(4096)):
                        connection.sendall(bytes([byte]))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def reach(port: int, host: str = "127.0.0.1", version: str = "4.2", *more: str) -> server.Reached:
    definition = Nfs(host, "/export", version=version, options=[f"port={port}", *more])  # type: ignore[arg-type]
    return server.reach(definition, options.choose(definition))


def refusal(port: int, host: str = "127.0.0.1", version: str = "4.2", *more: str) -> Problem:
    with pytest.raises(Problem) as caught:
        reach(port, host, version, *more)
    return caught.value


def there(call: bytes) -> bytes:
    return reply(call, 0)


def other_versions(call: bytes) -> bytes:
    return reply(call, 2, struct.pack(">II", 2, 3))


def test_a_server_is_found_with_the_address_it_sees() -> None:
    with peer(there) as port:
        assert reach(port) == server.Reached("127.0.0.1", port, "127.0.0.1")
        assert server.answers("127.0.0.1", port, 4)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_server_is_found_by_its_ipv6_address(host: str) -> None:
    with peer(there, socket.AF_INET6) as port:
        assert reach(port, host) == server.Reached("::1", port, "::1")
        assert reach(port, host, "4.2", "proto=tcp6").address == "::1"
        assert "not known" in refusal(port, host, "4.2", "proto=tcp").message


def test_the_question_is_the_null_procedure_of_the_version_asked_for() -> None:
    calls = []

    def record(call: bytes) -> bytes:
        calls.append(struct.unpack(">11I", call))
        return there(call)

    with peer(record) as port:
        reach(port)
        reach(port, "127.0.0.1", "3", "mountport=1")
    assert [call[4:7] for call in calls] == [(rpc.NFS, 4, 0), (rpc.NFS, 3, 0)]


def test_the_versions_that_a_server_speaks_are_named() -> None:
    with peer(other_versions) as port:
        problem = refusal(port)
    assert (type(problem), problem.fields["path"]) == (Invalid, "$.version")
    assert "versions 2 to 3, not version 4.2" in problem.message


@pytest.mark.parametrize(
    "answer",
    [
        lambda call: reply(call, 1),
        lambda call: b"HTTP/1.1 400 Bad Request\r\n\r\n",
        lambda call: b"",
        lambda call: reply(b"\0\0\0\0other", 0),
        lambda call: struct.pack(">I", 1 << 31 | 4) + b"tiny",
    ],
)
def test_what_is_no_nfs_server_is_told_apart(answer: Callable[[bytes], bytes]) -> None:
    with peer(answer) as port:
        problem = refusal(port)
        assert not server.answers("127.0.0.1", port, 4)
    assert (type(problem), problem.fields["path"]) == (Invalid, "$.host")
    assert "is no NFS server" in problem.message


def test_a_host_without_the_service_and_a_name_that_is_not_known() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        problem = refusal(unused.getsockname()[1])
    assert (type(problem), problem.fields["errno"]) == (Invalid, "ECONNREFUSED")
    assert "has no NFS service at port" in problem.message
    assert "not known here" in refusal(1, "no-such-host.invalid").message


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        problem = refusal(silent.getsockname()[1])
    assert isinstance(problem, TimedOut)
    assert "does not answer at port" in problem.message


def test_a_server_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the reply never."""
    monkeypatch.setattr(server, "PATIENCE", 0.2)
    ended = threading.Event()

    def drips(call: bytes) -> Iterator[int]:
        while not ended.wait(0.01):
            yield from b"\x80\0\x01\0"

    try:
        with peer(drips) as port:
            problem = refusal(port)
            ended.set()
    finally:
        ended.set()
    assert isinstance(problem, TimedOut)


def test_version_3_needs_rpcbind_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with peer(there) as port, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(rpc, "PORTMAPPER_PORT", unused.getsockname()[1])
        problem = refusal(port, "127.0.0.1", "3")
        assert reach(port, "127.0.0.1", "3", "mountport=20048").port == port
        monkeypatch.setattr(rpc, "PORTMAPPER_PORT", port)
        assert reach(port, "127.0.0.1", "3").port == port
    assert (type(problem), problem.fields["path"]) == (Invalid, "$.version")
    assert "'mountport'" in problem.message


def test_with_rdma_the_kernel_alone_asks() -> None:
    assert reach(20049, "127.0.0.1", "4.2", "proto=rdma") == server.Reached("127.0.0.1", 20049, "")


@pytest.mark.parametrize(("port_told", "runs"), [(33333, True), (0, False)])
def test_the_lock_monitor_is_asked_for_at_this_hosts_rpcbind(
    monkeypatch: pytest.MonkeyPatch, port_told: int, runs: bool
) -> None:
    with peer(lambda call: reply(call, 0, struct.pack(">I", port_told))) as port:
        monkeypatch.setattr(rpc, "PORTMAPPER_PORT", port)
        assert server.has_lock_monitor() is runs
    assert server.has_lock_monitor() is False
