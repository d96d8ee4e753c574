"""Connections over TLS: the same as plain ones, but for who may come, and how what is said gets there."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imageapi.api.listen import Listeners
from imageapi.config import Config, Tls
from imageapi.errors import Invalid
from lab.web import make_certificate
from pure.test_connection import (
    CREATE,
    GET,
    HOST,
    MOST,
    PATIENCE,
    POST,
    Peer,
    Service,
    ask_and_rest,
    ask_with_small_buffers,
    left,
    long,
    short,
)

pytestmark = pytest.mark.pure


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`server.pem`, `client.pem` and `other.pem`, each with its key, and signed by itself."""
    directory = tmp_path_factory.mktemp("certificates")
    for name in ("server", "client", "other"):
        make_certificate(directory / f"{name}.pem")
    return directory


def serving(certificates: Path, application: Any = None, *, ca: str | None = None, **limits: Any) -> Service:
    """A server that only listens over TLS; to clients with the certificate `ca`, where that is given."""
    file, authority = str(certificates / "server.pem"), str(certificates / f"{ca}.pem") if ca else None
    tls = Tls(host="127.0.0.1", port=0, certificate=file, key=file, ca=authority, **limits)
    return Service(application, schemes=("https",), tls=tls, max_body_size=10_000)


def trusting(certificates: Path, own: str | None = None) -> ssl.SSLContext:
    """What a client knows: the server's certificate, and its `own`."""
    context = ssl.create_default_context(cafile=str(certificates / "server.pem"))
    if own:
        context.load_cert_chain(certificates / f"{own}.pem")
    return context


def connect(service: Service, context: ssl.SSLContext) -> Peer:
    plain = socket.create_connection(("127.0.0.1", service.port), PATIENCE)
    try:
        return Peer(context.wrap_socket(plain, server_hostname="localhost"))
    except OSError:
        plain.close()
        raise


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_requests_are_answered_in_their_order(certificates: Path, version: ssl.TLSVersion) -> None:
    context = trusting(certificates)
    context.maximum_version = version
    with serving(certificates) as service, connect(service, context) as peer:
        peer.send(GET + CREATE + GET * 50)
        answers = [peer.answer() for _ in range(52)]
        assert answers[0] == (200, [])
        assert answers[1][0] == 201
        assert answers[2:] == [(200, [])] * 50


def test_only_who_shows_a_certificate_that_is_signed_is_answered(certificates: Path) -> None:
    with serving(certificates, ca="client") as service:
        with connect(service, trusting(certificates, "client")) as peer:
            peer.send(GET)
            assert peer.answer() == (200, [])
        for own in (None, "other"):
            assert not hears_anything(service, trusting(certificates, own))


def hears_anything(service: Service, context: ssl.SSLContext) -> bool:
    """Whether a client is answered. With TLS 1.3 it has done its part of the handshake when it is refused."""
    with contextlib.suppress(OSError), connect(service, context) as peer:
        peer.send(GET)
        return peer.socket.recv(1) != b""
    return False


def test_who_speaks_plain_http_is_not_answered(certificates: Path) -> None:
    with serving(certificates) as service:
        with service.connect() as peer, contextlib.suppress(ConnectionError):
            peer.send(GET)
            assert b"HTTP" not in peer.socket.recv(1000)
        with connect(service, trusting(certificates)) as peer:
            peer.send(GET)
            assert peer.answer() == (200, [])


def test_who_comes_to_no_end_of_the_handshake_is_let_go(certificates: Path) -> None:
    with serving(certificates, read_timeout=0.1) as service, service.connect() as peer:
        assert peer.at_end()


def test_who_says_nothing_after_it_is_told_so(certificates: Path) -> None:
    with serving(certificates, read_timeout=0.3) as service, connect(service, trusting(certificates)) as peer:
        assert peer.answer()[0] == 408
        assert peer.at_end()


def test_one_more_than_the_limit_is_closed_without_a_word(certificates: Path) -> None:
    with serving(certificates, listen_limit=1) as service, connect(service, trusting(certificates)) as first:
        first.send(GET)
        assert first.answer() == (200, [])
        with service.connect() as second:
            assert second.at_end(), "before its handshake nothing can be said"
        first.send(GET)
        assert first.answer() == (200, [])


@pytest.fixture
def few(certificates: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A server that has 64 descriptors, of which 32 are for connections; it listens over TLS and on a Unix socket. Who
    is refused does not go by himself within a test."""
    monkeypatch.setattr("imageapi.api.connection.LINGER", 1000.0)
    monkeypatch.setattr("imageapi.api.connection.resource.getrlimit", lambda _: (64, 64))
    file = str(certificates / "server.pem")
    tls = Tls(host="127.0.0.1", port=0, certificate=file, key=file)
    with Service(schemes=("https", "unix"), tls=tls, socket_path=str(run_dir / "api.sock")) as service:
        yield service


def test_who_comes_to_no_handshake_does_not_shut_out_the_unix_socket(few: Service) -> None:
    with contextlib.ExitStack() as opened:
        for _ in range(60):
            opened.enter_context(few.connect())
        with few.connect_unix() as peer:
            peer.send(GET)
            assert peer.answer() == (200, [])


def test_connections_of_all_kinds_together_leave_the_descriptors_of_the_work(few: Service) -> None:
    with contextlib.ExitStack() as opened:
        over_tls = [opened.enter_context(few.connect()) for _ in range(17)]
        assert over_tls[-1].at_end(), "those before it have been let in"
        plain = [opened.enter_context(few.connect_unix()) for _ in range(17)]
        for peer in plain[:16]:
            peer.send(GET)
            assert peer.answer() == (200, [])
        code, problem = plain[16].answer()
        assert (code, "32 connections" in problem["message"], "LimitNOFILE" in problem["message"]) == (503, True, True)


def test_a_long_answer_comes_whole_however_late_it_is_read(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imageapi.api.connection.LINGER", 0.05)
    with serving(certificates, long) as service, connect(service, trusting(certificates)) as peer:
        ask_and_rest(service, peer)
        assert peer.answer() == (200, "x" * 20_000_000)
        assert peer.at_end()


@pytest.mark.parametrize("says_so", [True, False], ids=["within TLS", "beside it"])
def test_what_a_client_leaves_unread_at_its_end_is_given_up(certificates: Path, says_so: bool) -> None:
    with serving(certificates, short, write_timeout=0.1) as service:
        plain = ask_with_small_buffers(service)
        with Peer(trusting(certificates).wrap_socket(plain.socket, server_hostname="localhost")) as peer:
            peer.send(GET)
            peer.receive()
            (say_all if says_so else shut)(peer)
            service.rest()
            assert left(peer) < MOST


def say_all(peer: Peer) -> None:
    """Say that this was all, as TLS says it, and do not wait to hear the same."""
    peer.socket.settimeout(0)
    with contextlib.suppress(ssl.SSLError):
        peer.socket.unwrap()  # type: ignore[attr-defined]
    peer.socket.settimeout(PATIENCE)


def shut(peer: Peer) -> None:
    socket.socket.shutdown(peer.socket, socket.SHUT_WR)


def test_who_breaks_it_and_still_sends_can_read_that_it_is_broken(certificates: Path) -> None:
    """After more than all buffers between hold."""
    with serving(certificates) as service, connect(service, trusting(certificates)) as peer:
        socket.socket.sendall(peer.socket, b"\x17\x03\x03\x00\x20" + bytes(30_000_000))
        with pytest.raises(ssl.SSLError, match="alert bad record mac"):
            peer.receive()


def test_a_client_that_says_it_has_said_all_has_its_create_undone(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, though it stays connected."""
    monkeypatch.setattr("imageapi.api.connection.LINGER", 1000.0)
    with serving(certificates) as service, connect(service, trusting(certificates)) as peer:
        say_all(service.begin(peer))
        assert service.engine.cancelled.wait(PATIENCE)


def test_a_client_that_still_sends_can_read_why_it_should_not(certificates: Path) -> None:
    with serving(certificates) as service, connect(service, trusting(certificates)) as peer:
        peer.send(POST + b"Content-Length: 3000000\r\n\r\n")
        peer.send(b" " * 3_000_000)
        code, problem = peer.answer()
        assert (code, "10000" in problem["message"]) == (413, True)


def test_a_client_that_hangs_up_has_its_create_undone(certificates: Path) -> None:
    with serving(certificates) as service:
        service.begin(connect(service, trusting(certificates))).socket.close()
        assert service.engine.cancelled.wait(PATIENCE)


def test_pages_of_this_very_host_may_use_it_and_others_not(certificates: Path) -> None:
    with serving(certificates) as service, connect(service, trusting(certificates)) as peer:
        for origin, code in ((b"https://localhost", 200), (b"http://localhost", 403), (b"https://example.com", 403)):
            peer.send(GET[:-2] + b"Origin: " + origin + b"\r\n\r\n")
            assert peer.answer()[0] == code
        peer.send(GET.replace(HOST, b"Host: example.com\r\n"))
        assert peer.answer()[0] == 421


def test_the_end_of_the_server_closes_what_is_open(certificates: Path) -> None:
    with serving(certificates) as service, connect(service, trusting(certificates)) as peer, service.connect():
        service.stop()
        assert peer.at_end()


@pytest.mark.parametrize(
    ("tls", "words"),
    [
        ({"certificate": "server.pem", "key": "client.pem"}, "--tls-certificate .*server.pem and --tls-key"),
        ({"certificate": "none.pem", "key": "server.pem"}, "No such file"),
        ({"certificate": "server.pem", "key": "server.pem", "ca": "empty.pem"}, "--tls-ca .*empty.pem"),
        ({"certificate": "server.pem", "key": "server.pem", "host": "0.0.0.0"}, "--tls-host 0.0.0.0 .*--tls-ca"),
    ],
)
def test_what_cannot_be_listened_with_is_named(certificates: Path, tls: dict[str, str], words: str) -> None:
    (certificates / "empty.pem").touch()
    files = {name: value if name == "host" else str(certificates / value) for name, value in tls.items()}
    with pytest.raises(Invalid, match=words):
        Listeners(Config(schemes=("https",), tls=Tls(port=0, **files)))  # type: ignore[arg-type]


def handed_over(certificates: Path, port: int, given: list[socket.socket]) -> Listeners:
    """What a server with https on this port makes of sockets that were bound for it."""
    file = str(certificates / "server.pem")
    return Listeners(Config(schemes=("https",), tls=Tls(port=port, certificate=file, key=file)), given)


def test_a_socket_that_is_handed_over_with_the_port_of_https_speaks_it(certificates: Path) -> None:
    file = str(certificates / "server.pem")
    given = socket.create_server(("127.0.0.1", 0))
    tls = Tls(port=given.getsockname()[1], certificate=file, key=file)
    with (
        Service(given=[given], schemes=("https",), tls=tls) as service,
        connect(service, trusting(certificates)) as peer,
    ):
        peer.send(GET)
        assert peer.answer() == (200, [])


def test_the_others_that_are_handed_over_are_plain(certificates: Path, run_dir: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as over_tls,
        socket.create_server(("127.0.0.1", 0)) as plain,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(str(run_dir / "given.sock"))
        unix.listen()
        names = handed_over(certificates, over_tls.getsockname()[1], [unix, plain, over_tls]).names
    assert [name.partition(":")[0] for name in names] == ["unix", "http", "https"]


def test_https_on_no_socket_that_is_handed_over_is_not_served_as_plain_http(certificates: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as given,
        pytest.raises(Invalid, match=r"--scheme https.* as --tls-port"),
    ):
        handed_over(certificates, 1, [given])


def test_a_socket_that_is_handed_over_is_not_heard_beyond_loopback_by_unknown_clients(certificates: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as given, pytest.raises(Invalid, match=r"ListenStream= .*--tls-ca"):
        handed_over(certificates, given.getsockname()[1], [given])


def test_beyond_loopback_clients_must_show_who_they_are(certificates: Path) -> None:
    file = str(certificates / "server.pem")
    tls = Tls(host="0.0.0.0", port=0, certificate=file, key=file, ca=file)
    listeners = Listeners(Config(schemes=("https",), tls=tls))
    assert listeners.names[0].startswith("https://0.0.0.0:")
    listeners.close()
