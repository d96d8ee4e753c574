"""Web servers as they are: they break off, change their mind, lead elsewhere, and want to know who asks."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drivers.bench import Bench
from imageapi.config import Config
from imageapi.drivers.uri import web as transport
from imageapi.drivers.uri.source import Interrupted
from imageapi.errors import Invalid, Problem, TimedOut
from imageapi.records import AnyRecord
from lab.archives import Member, archive, compressed
from lab.web import Content, Web

pytestmark = pytest.mark.kernel

NOISE = random.Random(4).randbytes(1_500_000)
"""More than what is read at once, and it does not compress."""
TAR = archive(Member("etc/hello", b"hello\n"), Member("noise", NOISE))
SHA256 = hashlib.sha256(TAR).hexdigest()


def content(record: AnyRecord) -> bytes:
    assert record.facts.mountpoint is not None
    return Path(record.facts.mountpoint, "noise").read_bytes()


def fetched(bench: Bench, uri: str | list[str], **options: Any) -> bytes:
    return content(bench.acquire(bench.uri(uri, **options)))


def refused(bench: Bench, uri: str | list[str], kind: type[Problem] = Invalid, **options: Any) -> Problem:
    with pytest.raises(kind) as refusal:
        bench.acquire(bench.uri(uri, **options))
    assert type(refusal.value) is kind
    return refusal.value


@pytest.mark.parametrize("chunked", [False, True])
def test_it_is_fetched(bench: Bench, web: Web, chunked: bool) -> None:
    assert fetched(bench, web.put("/a.tar", TAR, chunked=chunked), sha256=SHA256.upper()) == NOISE
    [asked] = web.asked
    assert asked.headers["accept-encoding"] == "identity"
    assert asked.headers["user-agent"].startswith("imageapi/")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("how", ["gz", "xz", "zst"])
def test_what_is_broken_off_goes_on_where_it_was(bench: Bench, web: Web, how: Any, chunked: bool) -> None:
    """The decompressor goes on as well."""
    packed = compressed(TAR, how)
    assert fetched(bench, web.put("/a", packed, breaks=[400_000, 500_000, 0], chunked=chunked)) == NOISE
    ranges = [asked.headers.get("range") for asked in web.asked]
    assert ranges == [None, "bytes=400000-", "bytes=900000-", "bytes=900000-"]
    assert {asked.headers.get("if-range") for asked in web.asked[1:]} == {'"1"'}


def test_a_server_that_brings_nothing_any_more_is_left(bench: Bench, impatient: Web) -> None:
    problem = refused(bench, impatient.put("/a", TAR, breaks=[400_000]), TimedOut)
    assert "the connection broke" in problem.message
    assert len(impatient.asked) == 1


def test_what_has_changed_meanwhile_is_begun_anew(bench: Bench, web: Web) -> None:
    """The server of the old one answers a range of it with all of the new one."""
    address = web.put("/a", TAR, breaks=[400_000])
    other = NOISE[::-1]

    web.contents["/a"].then = Content(archive(Member("noise", other)), etag='"2"')
    assert fetched(bench, address) == other
    assert [asked.headers.get("if-range") for asked in web.asked] == [None, '"1"', None]


@pytest.mark.parametrize("etag", [None, 'W/"1"'])
def test_without_a_strong_entity_tag_it_begins_anew(bench: Bench, web: Web, etag: str | None) -> None:
    assert fetched(bench, web.put("/a", TAR, etag=etag, breaks=[400_000])) == NOISE
    assert [asked.headers.get("range") for asked in web.asked] == [None, None]


def test_where_that_does_not_help_the_digest_is_asked_for(bench: Bench, web: Web) -> None:
    problem = refused(bench, web.put("/a", TAR, etag=None, breaks=[400_000] * 9), Interrupted)
    assert "give its sha256" in problem.message
    assert len(web.asked) == 3


def test_with_the_digest_it_goes_on_whatever_the_server_says(bench: Bench, web: Web) -> None:
    assert fetched(bench, web.put("/a", TAR, etag=None, breaks=[400_000]), sha256=SHA256) == NOISE
    assert [asked.headers.get("range") for asked in web.asked] == [None, "bytes=400000-"]


def test_a_server_without_ranges_sends_it_again(bench: Bench, web: Web) -> None:
    assert fetched(bench, web.put("/a", TAR, ranges=False, breaks=[400_000]), sha256=SHA256) == NOISE


def test_with_the_digest_one_address_finishes_what_another_has_begun(bench: Bench, impatient: Web) -> None:
    dying = impatient.put("/a", TAR, breaks=[400_000])
    assert fetched(bench, [dying, impatient.put("/b", TAR, etag='"other"')], sha256=SHA256) == NOISE
    assert impatient.asked[-1].headers["range"] == "bytes=400000-"


def test_without_it_the_next_address_begins_anew(bench: Bench, impatient: Web) -> None:
    dying = impatient.put("/a", archive(Member("old"), Member("noise", NOISE[::-1])), breaks=[400_000])
    record = bench.acquire(bench.uri([dying, impatient.put("/b", TAR)]))
    assert content(record) == NOISE
    assert "range" not in impatient.asked[-1].headers
    assert record.facts.mountpoint is not None
    assert not Path(record.facts.mountpoint, "old").exists()


def test_the_first_address_that_serves_it_is_taken(bench: Bench, web: Web) -> None:
    wrong = web.put("/wrong", archive(Member("noise", b"another")))
    html = web.put("/page", b"<html>hello</html>" * 100)
    addresses = [web.url("/none"), "file:///no/such/file", html, wrong, web.put("/a", TAR), web.url("/never")]
    assert fetched(bench, addresses, sha256=SHA256) == NOISE
    assert "/never" not in [asked.target for asked in web.asked]


def test_when_none_serves_it_each_is_named_with_its_reason(bench: Bench, web: Web) -> None:
    html = web.put("/page", b"<html>hello</html>" * 100)
    problem = refused(bench, [web.url("/none?token=dear"), html])
    assert problem.fields["path"] == "$.uri"
    for words in ("/none?XXX", "it answers 404: there is no such file", "/page: ", "a web page"):
        assert words in problem.message
    assert "dear" not in problem.message


@pytest.mark.parametrize(
    ("status", "words", "kind", "tries"),
    [
        (403, "the signature or password is wrong, or has expired", Invalid, 1),
        (404, "there is no such file", Invalid, 1),
        (204, "it answers 204 instead of the file", Invalid, 1),
        (503, "ask again later", TimedOut, transport.TRIES),
    ],
)
def test_what_an_answer_means(bench: Bench, web: Web, status: int, words: str, kind: type[Problem], tries: int) -> None:
    problem = refused(bench, web.put("/a", b"", status=status), kind)
    assert words in problem.message
    assert len(web.asked) == tries


def test_a_server_that_is_busy_once_is_asked_again(bench: Bench, web: Web) -> None:
    assert fetched(bench, web.put("/a", b"", status=503, then=Content(TAR))) == NOISE


# ---------------------------------------------------------------------------------------------------- the way


def test_redirects_are_followed(bench: Bench, web: Web) -> None:
    web.put("/b", b"", status=307, headers={"location": "c?sig=1"})
    web.put("/c", TAR)
    assert fetched(bench, web.put("/a", b"", status=302, headers={"location": web.url("/b")})) == NOISE
    assert [asked.target for asked in web.asked] == ["/a", "/b", "/c?sig=1"]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("/a", "more than 5 times"),
        ("file:///etc/passwd", "not http or https"),
        ("ftp://127.0.0.1/a", "not http or https"),
        ("", "not http or https"),
        ("http://[dear", "not http or https"),
        ("http://dear dear/", "not served|no address"),
    ],
)
def test_redirects_that_lead_nowhere(bench: Bench, web: Web, location: str, words: str) -> None:
    with pytest.raises(Problem, match=words) as refusal:
        bench.acquire(bench.uri(web.put("/a", b"", status=301, headers={"location": location})))
    assert "dear" not in str(refusal.value.to_dict())


def test_a_login_is_sent_and_not_given_to_others(bench: Bench, web: Web) -> None:
    web.put("/b", TAR)
    address = web.url("/a", login="me:p%40ss")
    web.put("/a", b"", status=302, headers={"location": f"http://localhost:{web.server_port}/b"})
    assert fetched(bench, address) == NOISE
    logins = [asked.headers.get("authorization") for asked in web.asked]
    assert logins == [f"Basic {base64.b64encode(b'me:p@ss').decode()}", None]


def test_a_proxy_of_the_servers_environment_is_asked(bench: Bench, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.contents["http://images.invalid/a.tar"] = Content(TAR)
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{web.server_port}")
    assert fetched(bench, "http://images.invalid/a.tar") == NOISE
    assert web.asked[0].headers["proxy-authorization"].startswith("Basic ")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetched(bench, web.put("/a", TAR)) == NOISE
    assert web.asked[-1].target == "/a"


def test_a_certificate_that_nobody_signed_is_not_accepted(bench: Bench, secure: Web) -> None:
    problem = refused(bench, secure.put("/a?token=dear", TAR))
    assert "its certificate is not accepted: self-signed certificate" in problem.message
    assert "update-ca-certificates" in problem.message
    assert "dear" not in str(problem.to_dict())
    assert secure.asked == []


def test_the_hosts_own_authorities_are_trusted(
    bench: Bench, secure: Web, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    assert fetched(bench, secure.put("/a", TAR, breaks=[400_000])) == NOISE
    secure.host = "127.0.0.1"
    assert "IP address mismatch" in refused(bench, secure.url("/a")).message


def test_from_https_nothing_leads_to_http(
    bench: Bench, web: Web, secure: Web, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    address = secure.put("/a", b"", status=302, headers={"location": web.put("/a", TAR)})
    assert "an address that is not https" in refused(bench, address).message
    assert web.asked == []


def test_a_server_that_says_nothing_is_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SILENCE", 0.05)
    monkeypatch.setattr(transport, "PAUSE", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a"
        assert "the server said nothing" in refused(bench, address, TimedOut).message


@contextlib.contextmanager
def dripping(beginning: bytes, drop: bytes) -> Iterator[str]:
    """A server that answers with `beginning`, and then drop by drop without end; its address."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    drip(listener.accept()[0])

        def drip(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.sendall(beginning)
                while not ended.wait(0.01):
                    connection.sendall(drop)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/a"
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("beginning", "drop"),
    [(b"HTTP/1.1 200 OK\r\nX-", b"x"), (b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"), (CHUNKED, b"0")],
    ids=["a header", "headers", "the size of a part"],
)
def test_a_server_that_drips_is_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, beginning: bytes, drop: bytes
) -> None:
    """Each piece comes in time; but for the deadline, http.client takes 64 KiB of a line, or 100 of them."""
    for name, seconds in (("CONNECT", 0.1), ("SILENCE", 0.2), ("PAUSE", 0.0), ("TRIES", 1)):
        monkeypatch.setattr(transport, name, seconds)
    with dripping(beginning, drop) as address:
        assert "the server said nothing" in refused(bench, address, TimedOut).message


def test_the_tries_take_less_time_than_an_operation_may_stand_still() -> None:
    one = transport.CONNECT + transport.SILENCE
    longest = max(transport.TRIES * one, transport.PERSISTENCE + one) + transport.LONGEST_PAUSE
    assert longest < Config().operation_timeout


# --------------------------------------------------------------------------------------------------- the limits


def test_what_says_that_it_is_too_large_is_not_fetched(bench: Bench, web: Web) -> None:
    problem = refused(bench, web.put("/a", TAR), max_size=1_000_000)
    assert (problem.fields["path"], "max_size is 1000000" in problem.message) == ("$.uri", True)
    assert f"it has {len(TAR)} bytes" in problem.message


def test_what_does_not_say_so_is_broken_off(bench: Bench, web: Web) -> None:
    assert "max_size" in refused(bench, web.put("/a", TAR, chunked=True), max_size=1_000_000).message


@pytest.mark.parametrize("more", [5, 400_000])
def test_a_length_that_is_a_lie(bench: Bench, impatient: Web, more: int) -> None:
    problem = refused(bench, impatient.put("/a", TAR, length=len(TAR) + more), TimedOut)
    assert "the connection broke" in problem.message


def test_a_digest_that_is_not_its_own(bench: Bench, web: Web) -> None:
    problem = refused(bench, web.put("/a", TAR), sha256="0" * 64)
    assert (problem.fields["path"], SHA256 in problem.message) == ("$.sha256", True)


Spoil = Callable[[bytes], bytes]


@pytest.mark.parametrize("how", ["gz", "xz", "zst"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data[: len(data) // 2], "end in the middle"),
        (lambda data: data[:-30] + bytes(30), "damaged|end in the middle"),
    ],
    ids=["cut", "damaged"],
)
def test_what_is_compressed_and_not_whole(bench: Bench, web: Web, how: Any, spoil: Spoil, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        bench.acquire(bench.uri(web.put("/a", spoil(compressed(TAR, how)))))
