"""What HTTP can get wrong, over TCP and the Unix socket: each has its answer, in JSON."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.machine import Machine
from lab.server import Server, eventually, lent, running, shared, squashfs
from lab.web import make_certificate

pytestmark = pytest.mark.api

REQUEST = "GET /imageapi/v1/container HTTP/1.1\r\nHost: {}\r\n{}\r\n"


class Answer:
    """One raw answer: its status, headers and JSON."""

    def __init__(self, data: bytes) -> None:
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = dict(line.lower().split(": ", 1) for line in lines)
        self.json = json.loads(body[: int(self.headers["content-length"])])


class Tcp:
    """A server that also listens on a port of loopback."""

    def __init__(self, server: Server) -> None:
        self.server = server
        found = eventually(lambda: re.findall(r"http://127\.0\.0\.1:(\d+)", server.log.read_text()), "it listens")
        self.port = int(found[-1])

    def connect(self, address: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection((address, self.port), timeout=20)

    def say(self, *parts: bytes) -> Answer:
        """What a connection of its own is answered to these bytes."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
            return Answer(_receive(connection))


def _receive(connection: socket.socket) -> bytes:
    """An answer, to the end of its body."""
    data = b""
    while b"\r\n\r\n" not in data or not _complete(data):
        more = connection.recv(65536)
        assert more, f"the connection was closed after {data!r}"
        data += more
    return data


def _complete(data: bytes) -> bool:
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return length is not None and len(body) >= int(length[1])


@pytest.fixture(scope="module")
def listening(machine: Machine, module_run_dir: Path) -> Iterator[Server]:
    options = ("--scheme", "http", "--port", "0", "--max-header-size", "8KB", "--read-timeout", "500ms")
    more = ("--allowed-host", "node7.cluster", "--listen-limit", "5")
    with shared(machine, module_run_dir, *options, *more) as server:
        yield server


@pytest.fixture
def tcp(listening: Server) -> Iterator[Tcp]:
    with lent(listening) as server:
        yield Tcp(server)


OURS = ["localhost", "LocalHost:8080", "127.0.0.1", "127.8.9.1:1", "[::1]:80", "node7.cluster"]


@pytest.mark.parametrize("host", OURS)
def test_hosts_that_are_ours(tcp: Tcp, host: str) -> None:
    assert tcp.say(REQUEST.format(host, "").encode()).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.1", "", "node8.cluster"])
def test_hosts_that_are_not(tcp: Tcp, host: str) -> None:
    answer = tcp.say(REQUEST.format(host, "").encode())
    assert (answer.status, answer.json["code"]) == (421, 421)
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:80", 200), ("http://evil.example", 403), ("null", 403), ("http://localhost:3000", 403),
     ("https://localhost:80", 403)],
)  # fmt: skip
def test_foreign_pages_are_refused(tcp: Tcp, origin: str, status: int) -> None:
    assert tcp.say(REQUEST.format("localhost:80", f"Origin: {origin}\r\n").encode()).status == status


def test_the_unix_socket_knows_its_clients_by_its_mode(tcp: Tcp) -> None:
    assert stat.S_IMODE(os.stat(tcp.server.socket).st_mode) == 0o600
    assert tcp.server.http.get("/container", headers={"host": "anything"}).status_code == 200


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x02\x00\x01\x00", b"HELLO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_request_is_told_so(tcp: Tcp, noise: bytes) -> None:
    answer = tcp.say(noise + b"\r\n" * 10)
    assert (answer.status, answer.json["code"]) == (400, 400)
    assert answer.headers["content-type"] == "application/json"


def test_a_header_over_the_limit(tcp: Tcp) -> None:
    assert tcp.say(REQUEST.format("localhost", f"X: {'y' * 9000}\r\n").encode()).status == 431
    assert tcp.say(b"GET /imageapi/v1/container HTTP/1.1\r\n", b"X: " + b"y" * 20000).status == 431


def test_a_slow_header_is_cut_off(tcp: Tcp) -> None:
    assert tcp.say(b"GET /imageapi/v1/cont").status == 408
    assert tcp.say().status == 408


def test_a_slow_body_is_cut_off(tcp: Tcp) -> None:
    head = b"POST /imageapi/v1/mount HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for rest in (b"Content-Length: 10\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"):
        answer = tcp.say(head + rest)
        assert (answer.status, answer.headers["connection"]) == (408, "close")


def test_a_client_that_does_not_read_is_let_go(run_dir: Path) -> None:
    """It asks for a long answer and does not take it: its connection ends."""
    with running(run_dir, "--write-timeout", "300ms") as server, socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(str(server.socket))
        deaf.sendall(f"GET /{'x' * 900_000} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        hung_up = select.poll()
        hung_up.register(deaf, 0)
        assert hung_up.poll(20_000), "the server has closed its end"


def test_a_body_in_pieces(tcp: Tcp) -> None:
    head = b"POST /imageapi/v1/mount HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json; charset=utf-8\r\n"
    body = json.dumps(squashfs()).encode()
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:20], body[20:])) + b"0\r\n\r\n"
    assert tcp.say(head + b"Transfer-Encoding: chunked\r\n\r\n", pieces).status == 201


def test_a_body_without_a_declared_length_is_limited_too(tcp: Tcp) -> None:
    head = b"POST /imageapi/v1/mount HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert tcp.say(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 16).status == 413


def test_one_connection_serves_many_requests(tcp: Tcp) -> None:
    with tcp.connect() as connection:
        for _ in range(3):
            connection.sendall(REQUEST.format("localhost", "").encode())
            assert Answer(_receive(connection)).status == 200


def test_more_connections_than_the_limit_are_refused(tcp: Tcp) -> None:
    held = [tcp.connect() for _ in range(6)]
    try:
        for connection in held:
            connection.sendall(REQUEST.format("localhost", "").encode())
        answers = [Answer(_receive(connection)) for connection in held]
        assert 503 in {answer.status for answer in answers}
        refused = next(answer for answer in answers if answer.status == 503)
        assert "listen-limit" in refused.json["message"]
    finally:
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/container", {"GET", "POST", "DELETE", "PATCH"}),
        ("DELETE", "/container/0/exited", {"GET", "POST"}),
        ("HEAD", "/container/0/exited", {"GET", "POST"}),
        ("PATCH", "/attach/0", {"GET", "DELETE"}),
        ("POST", "/attach/0", {"GET", "DELETE"}),
        ("DELETE", "/mount/rbd", {"GET", "POST"}),
    ],
)
def test_a_method_that_a_path_does_not_know(tcp: Tcp, method: str, path: str, allow: set[str]) -> None:
    answer = tcp.server.http.request(method, path)
    assert answer.status_code == 405
    assert allow <= {one.strip() for one in answer.headers["allow"].split(",")}
    if method != "HEAD":
        assert answer.json()["code"] == 405


def test_the_environment_says_where_to_listen(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOST": "::1", "PORT": "0", "IMAGEAPI_LOGLEVEL": "TRACE"}.items():
        monkeypatch.setenv(name, value)
    with running(run_dir, "--scheme=http") as server:
        port = int(re.findall(r"http://\[::1\]:(\d+)", server.log.read_text())[-1])
        with socket.create_connection(("::1", port), timeout=20) as connection:
            connection.sendall(REQUEST.format(f"[::1]:{port}", "").encode())
            assert Answer(_receive(connection)).status == 200


def test_limits_of_0_are_none(run_dir: Path) -> None:
    limits = ("keep-alive", "read-timeout", "write-timeout", "operation-timeout")
    with running(run_dir, *(f"--{limit}=0" for limit in limits)) as server:
        assert server.post("/mount", squashfs())["refs"] == 1


def start(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A server that is to refuse its start."""
    return subprocess.run(
        [sys.executable, "-m", "imageapi.server", *options],
        capture_output=True, text=True, timeout=20, env={**os.environ, **environment},
    )  # fmt: skip


def test_over_tls_a_client_with_a_certificate_is_answered(run_dir: Path, tmp_path: Path) -> None:
    server_file, client_file = (make_certificate(tmp_path / f"{name}.pem") for name in ("server", "client"))
    files = ("--tls-certificate", server_file, "--tls-key", server_file, "--tls-ca", client_file)
    with running(run_dir, "--scheme", "https", "--scheme", "unix", "--tls-port", "0", *map(str, files)) as server:
        found = eventually(lambda: re.findall(r"https://127\.0\.0\.1:(\d+)", server.log.read_text()), "it listens")
        url = f"https://localhost:{found[-1]}/imageapi/v1/container"
        asked = ["curl", "-sS", "--cacert", str(server_file), url]
        known = subprocess.run([*asked, "--cert", str(client_file)], check=True, capture_output=True, timeout=20)
        assert json.loads(known.stdout) == []
        unknown = subprocess.run(asked, check=False, capture_output=True, timeout=20)
        assert (unknown.returncode != 0, unknown.stdout) == (True, b"")


def test_a_server_without_tls_has_none_in_memory(tcp: Tcp) -> None:
    assert tcp.say(REQUEST.format("localhost", "").encode()).status == 200
    assert "libssl" not in Path(f"/proc/{tcp.server.pid}/maps").read_text()


def test_plain_http_stays_on_loopback(run_dir: Path) -> None:
    ended = start("--scheme", "http", "--host", "0.0.0.0", "--port", "0", "--run-dir", str(run_dir))
    assert (ended.returncode, "--insecure-http" in ended.stderr) == (1, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheme", "https"), "TLS"),
        (("--scheme", "gopher"), "gopher"),
        (("--read-timeout", "soon"), "30s"),
        (("--port", "99999"), "port"),
        (("--run-dir", "here"), "absolute"),
        (("--no-such-option",), "--no-such-option"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_words(options: tuple[str, ...], words: str) -> None:
    ended = start(*options)
    assert (ended.returncode, words in ended.stderr) == (2, True), ended.stderr


def test_a_socket_file_that_nobody_listens_on_is_replaced(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(run_dir / "api.sock"))
    with running(run_dir) as server:
        assert server.get("/container") == []
    assert not server.socket.exists()


def test_a_socket_that_somebody_listens_on_is_not_taken(tcp: Tcp, tmp_path: Path) -> None:
    ended = start("--socket-path", str(tcp.server.socket), "--run-dir", str(tmp_path / "other"))
    assert (ended.returncode, "listens" in ended.stderr) == (1, True)
    assert tcp.server.get("/container") == []


def test_another_file_is_not_taken_for_a_socket(run_dir: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    ended = start("--socket-path", str(precious), "--run-dir", str(run_dir))
    assert (ended.returncode, precious.read_text()) == (1, "data"), ended.stderr
