"""TLS between a connection and its client. It is spoken by what comes in and goes out in memory, so that a connection
counts, and its time runs, from the moment that somebody has connected, and not from the end of a handshake.

Imported only where there is such a listener: ssl, and with it libcrypto, takes memory. The event loop has none of its
own (see lean).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any

from imageapi.api.connection import Connection
from imageapi.config import Tls
from imageapi.errors import Invalid

PIECE = 1 << 16
"""Bytes that are decrypted at once."""


def context(tls: Tls) -> ssl.SSLContext:
    """The server's side of it: TLS 1.2 or later, and with `ca` only clients with a certificate that is signed by it.

    Raises: errors.Invalid, naming the option whose file will not do.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.set_alpn_protocols(["http/1.1"])
    try:
        made.load_cert_chain(tls.certificate or "", tls.key, password=_no_password)
    except OSError as error:
        files = f"--tls-certificate {tls.certificate} and --tls-key {tls.key}"
        raise Invalid(f"{files}: {_words(error)}; give a certificate and its key, in PEM, without a password") from None
    if tls.ca is not None:
        made.verify_mode = ssl.CERT_REQUIRED
        try:
            made.load_verify_locations(tls.ca)
        except OSError as error:
            raise Invalid(f"--tls-ca {tls.ca}: {_words(error)}; give certificates in PEM") from None
    return made


def _no_password() -> str:
    """Nobody is there to type one."""
    return ""


def _words(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)


class Secured(asyncio.Protocol):
    """What a transport sees as its protocol, and the protocol `inner` as its transport."""

    def __init__(self, inner: Connection, how: ssl.SSLContext, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = inner
        self._loop = loop
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = how.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._ready = self._paused = self._ended = False

    # ----------------------------------------------------------------------------------- as a protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._inner.connection_made(self)  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    def eof_received(self) -> None:
        self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return  # it is only read on so that the client can read
        self._incoming.write(data)
        self._advance()

    def _advance(self) -> None:
        """Go as far as what has come allows."""
        failed = False
        try:
            if not self._ready:
                self._tls.do_handshake()
                self._ready = True
            self._read()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            failed = True
        self._flush()  # also an alert
        if failed:
            self._ended = True
            self._inner.hung_up()

    def _read(self) -> None:
        """Give the inner protocol what there is, until it has enough. Raises: ssl.SSLError."""
        while not (self._paused or self._ended):
            data = self._tls.read(PIECE)
            if not data:
                self._inner.hung_up()  # it says that it has said all
                return
            self._inner.data_received(data)

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._transport.write(data)

    # ---------------------------------------------------------------------------------- as a transport

    def get_extra_info(self, name: str) -> Any:
        return self._transport.get_extra_info(name)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int) -> None:
        self._transport.set_write_buffer_limits(high)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def abort(self) -> None:
        self._transport.abort()

    def write(self, data: bytes) -> None:
        """Whoever has not come to the end of the handshake cannot be told anything."""
        if not self._ready or self._ended:
            return
        left = memoryview(data)
        while left:
            left = left[self._tls.write(left) :]
        self._flush()

    def write_eof(self) -> None:
        self._say_end()
        self._transport.write_eof()

    def close(self) -> None:
        self._say_end()
        self._transport.close()

    def _say_end(self) -> None:
        if self._ready and not self._ended:
            with contextlib.suppress(ssl.SSLError):  # that it waits for the client's own
                self._tls.unwrap()
            self._flush()
        self._ended = True

    def pause_reading(self) -> None:
        self._paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Some may have been decrypted already: the transport does not know of that."""
        self._paused = False
        self._transport.resume_reading()
        if not self._ended:
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._ready and not self._transport.is_closing():
            self._advance()
