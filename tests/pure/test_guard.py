"""Which requests over TCP are for this host, and come from no foreign page."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from imageapi.api.guard import Guard, host_name
from imageapi.api.request import Receive, Scope, Send

pytestmark = pytest.mark.pure

Headers = list[tuple[str, str]]


def status(headers: Headers, server: tuple[str, int | None] | None = ("192.0.2.7", 8080)) -> int:
    """What a request with these headers is answered, on a connection to this address."""
    said: list[Any] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        said.append({"status": 200})

    async def send(message: Any) -> None:
        said.append(message)

    async def nothing() -> Any:
        raise AssertionError("nobody reads the body")

    scope = {
        "type": "http", "method": "GET", "path": "/", "scheme": "http", "server": server,
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }  # fmt: skip
    asyncio.run(Guard(inner, ["node7.cluster", "0.0.0.0", "FE80::0:1"])(scope, nothing, send))
    code: int = said[0]["status"]
    return code


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "localhost.", "box.localhost:80", "127.0.0.1", "127.1.2.3:8080", "[::1]", "[::1]:8080",
     "[0:0:0:0:0:0:0:1]:1", "192.0.2.7", "192.0.2.7:8080", "[::ffff:192.0.2.7]:8080", "node7.cluster",
     "NODE7.Cluster.:99", "[fe80::1]:8080", "0.0.0.0:8080"],
)  # fmt: skip
def test_names_that_are_ours(host: str) -> None:
    assert status([("host", host)]) == 200


@pytest.mark.parametrize(
    "host",
    ["", ":8080", "evil.example", "localhost.evil.example", "evil.example:8080", "192.0.2.8", "xlocalhost", "node7",
     "2130706433", "127.1", "0x7f.0.0.1", "[::2]", "[::1", "[::1]evil", "[localhost", "evil.example@localhost", "::1"],
)  # fmt: skip
def test_names_that_are_not(host: str) -> None:
    assert status([("host", host)]) == 421


def test_there_is_one_host() -> None:
    assert status([]) == 421
    assert status([("host", "localhost"), ("host", "localhost")]) == 421
    assert status([("host", "localhost"), ("host", "evil.example")]) == 421


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([("origin", "http://localhost:8080")], 200),
        ([("origin", "HTTP://LOCALHOST:8080")], 200),
        ([("origin", "http://localhost")], 403),
        ([("origin", "http://localhost:3000")], 403),
        ([("origin", "https://localhost:8080")], 403),
        ([("origin", "http://127.0.0.1:8080")], 403),
        ([("origin", "null")], 403),
        ([("origin", "")], 403),
        ([("origin", "http://localhost:8080"), ("origin", "http://evil.example")], 403),
        ([("sec-fetch-site", "cross-site")], 403),
        ([("sec-fetch-site", "same-site")], 403),
        ([("sec-fetch-site", "same-origin")], 200),
        ([("sec-fetch-site", "none")], 200),
    ],
)
def test_pages(headers: Headers, code: int) -> None:
    assert status([("host", "localhost:8080"), *headers]) == code


@pytest.mark.parametrize("server", [None, ("/run/imageapi.sock", None)])
def test_on_the_unix_socket_nobody_is_a_page(server: tuple[str, int | None] | None) -> None:
    assert status([("host", "evil.example"), ("origin", "http://evil.example")], server) == 200


def test_a_name_without_its_port() -> None:
    assert [host_name(host) for host in ("A:1", "[::1]:1", "[::1]x", "a")] == ["a", "::1", "", "a"]
