"""A web server of one test on loopback, real down to the socket, whose answers go wrong as the test says."""

from __future__ import annotations

import contextlib
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, cast

NEVER = 10.0
"""Seconds after which an answer that is held back comes all the same."""


class Asked(NamedTuple):
    """One request that has come; the names of its headers in lower case."""

    target: str
    headers: dict[str, str]


@dataclass
class Content:
    """What there is at one path. `breaks`: after how many bytes each answer in turn is broken off; those that follow
    are whole. `length`: what an answer says of its size, when that is a lie; with `chunked` it says nothing. `gate`,
    when there is one, is waited for once half is sent. `trickle`: seconds before each eighth. `then` is there from the
    second answer on."""

    data: bytes = b""
    etag: str | None = '"1"'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    length: int | None = None
    gate: threading.Event | None = None
    trickle: float = 0.0
    chunked: bool = False
    then: Content | None = None


class Web(ThreadingHTTPServer):
    """The server. `contents` are by path, without the query; `left` are clients that hung up on an answer."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.contents: dict[str, Content] = {}
        self.asked: list[Asked] = []
        self.left: list[object] = []
        self.scheme, self.host = "http", "127.0.0.1"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def url(self, path: str, login: str = "") -> str:
        return f"{self.scheme}://{login and login + '@'}{self.host}:{self.server_port}{path}"

    def put(self, path: str, data: bytes, **how: Any) -> str:
        """Serve `data` there; the address of it."""
        self.contents[path.partition("?")[0]] = Content(data, **how)
        return self.url(path)

    def end(self) -> None:
        for content in self.contents.values():
            if content.gate is not None:
                content.gate.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def speak_tls(self, certificate: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.scheme, self.host = "https", "localhost"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client has gone away, which is what some tests are about."""
        self.left.append(client_address)


@contextlib.contextmanager
def serving(certificate: Path | None = None) -> Iterator[Web]:
    web = Web()
    try:
        if certificate is not None:
            web.speak_tls(certificate)
        yield web
    finally:
        web.end()


def make_certificate(path: Path) -> Path:
    """A key and a certificate for `localhost` that it has signed itself, in one file."""
    key, certificate = path.with_suffix(".key"), path.with_suffix(".crt")
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-batch"]
    about = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*request, *about, *files], check=True, capture_output=True)
    path.write_bytes(key.read_bytes() + certificate.read_bytes())
    return path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _web(self) -> Web:
        return cast(Web, self.server)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is."""

    def do_GET(self) -> None:
        self._web.asked.append(Asked(self.path, {name.lower(): value for name, value in self.headers.items()}))
        content = self._content(self.path.partition("?")[0])
        start = self._start(content)
        self.send_response(206 if start and content.status == 200 else content.status)
        self._describe(content, start)
        self._send(content, content.data[start:])

    def _content(self, path: str) -> Content:
        content = self._web.contents.get(path, Content(status=404))
        if content.then is not None:
            self._web.contents[path] = content.then
        return content

    def _start(self, content: Content) -> int:
        """From where the client wants it, if it may have that."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        same = self.headers.get("if-range") in (None, content.etag)
        return int(asked[1]) if asked and same and content.ranges else 0

    def _describe(self, content: Content, start: int) -> None:
        for name, value in content.headers.items():
            self.send_header(name, value)
        if content.etag:
            self.send_header("ETag", content.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content.data) - 1}/{len(content.data)}")
        if content.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(content.length or len(content.data) - start))
        self.end_headers()

    def _send(self, content: Content, data: bytes) -> None:
        end = content.breaks.pop(0) if content.breaks else len(data)
        half = min(end, len(data) // 2) if content.gate else 0
        self._write(content, data[:half])
        if content.gate is not None:
            content.gate.wait(NEVER)
        self._write(content, data[half:end])
        if end < len(data) or content.length:
            self.close_connection = True
        elif content.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _write(self, content: Content, data: bytes) -> None:
        size = -(-len(data) // 8) if content.trickle else len(data)
        for start in range(0, len(data), size or 1):
            time.sleep(content.trickle)
            self._write_piece(content, data[start : start + size])

    def _write_piece(self, content: Content, data: bytes) -> None:
        if data:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if content.chunked else data)
            self.wfile.flush()
