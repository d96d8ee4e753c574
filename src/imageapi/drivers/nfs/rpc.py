"""The little of ONC RPC (RFC 5531) that asks whether a service is there: a call without arguments over TCP, and the
question for a port, to a portmapper (RFC 1833, version 2)."""

from __future__ import annotations

import errno
import socket
import struct
import time
from typing import Self

PORTMAPPER = 100000
PORTMAPPER_PORT = 111
NFS = 100003
STATUS_MONITOR = 100024

_CALL, _REPLY, _RPC_VERSION = 0, 1, 2
_ACCEPTED = 0
_SUCCESS, _NO_PROGRAM, _OTHER_VERSION = range(3)
_NULL, _GET_PORT = 0, 3
_LAST_FRAGMENT = 1 << 31
_XID = 0x1A2B3C4D
_LONGEST = 4096
"""Bytes of a reply: those asked for here have less than a hundred."""

_RECORD = struct.Struct(">I")
_HEADER = struct.Struct(">IIIIIIIIII")
"""A call: xid, type, RPC version, program, version, procedure, and neither credentials nor a verifier."""
_STATUS = struct.Struct(">IIIIII")
"""A reply: xid, type, accepted or denied, a verifier without content, and how it was accepted."""


class Absent(OSError):
    """Something answers, and it is not the service."""


class OtherVersions(OSError):
    """The service is there, and has versions `low` to `high` only."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__(f"versions {low} to {high}")
        self.low, self.high = low, high


class Channel:
    """A connection, for which there is so much time, however many pieces a reply comes in."""

    def __init__(self, address: str, port: int, seconds: float) -> None:
        """Connect; socket.create_connection would load the IDNA codec. Raises: OSError."""
        self._deadline = time.monotonic() + seconds
        self._socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            self._in_time().connect((address, port))
        except OSError:
            self.close()
            raise
        self.own_address = str(self._socket.getsockname()[0])
        """This host's, as the other end sees it."""

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Raises: OSError."""
        self._in_time().sendall(data)

    def receive(self, size: int) -> bytes:
        """Exactly so many bytes. Raises: Absent; OSError."""
        data = b""
        while len(data) < size:
            part = self._in_time().recv(size - len(data))
            if not part:
                raise Absent("the connection was closed without a reply")
            data += part
        return data

    def _in_time(self) -> socket.socket:
        """The socket, whose next call ends in time. Raises: TimeoutError."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "no whole reply in time")
        self._socket.settimeout(left)
        return self._socket


def ping(channel: Channel, program: int, version: int) -> None:
    """Call a service's procedure that does nothing; it is there when this returns.

    Raises: Absent; OtherVersions; OSError.
    """
    _call(channel, program, version, _NULL)


def port_of(channel: Channel, program: int, version: int, protocol: int) -> int:
    """The port that a portmapper has for a service; 0 when it has none. `protocol` is an IPPROTO_*.

    Raises: OSError.
    """
    wanted = struct.pack(">IIII", program, version, protocol, 0)
    return int.from_bytes(_call(channel, PORTMAPPER, 2, _GET_PORT, wanted)[:4], "big")


def _call(channel: Channel, program: int, version: int, procedure: int, arguments: bytes = b"") -> bytes:
    call = _HEADER.pack(_XID, _CALL, _RPC_VERSION, program, version, procedure, 0, 0, 0, 0) + arguments
    channel.send(_RECORD.pack(_LAST_FRAGMENT | len(call)) + call)
    return _result(_record(channel), version)


def _record(channel: Channel) -> bytes:
    """One reply; of more than one fragment there is none this short."""
    size = _RECORD.unpack(channel.receive(_RECORD.size))[0] & ~_LAST_FRAGMENT
    if not _STATUS.size <= size <= _LONGEST:
        raise Absent("what answers does not speak RPC")
    return channel.receive(size)


def _result(reply: bytes, version: int) -> bytes:
    xid, kind, stat, _, verifier, accepted = _STATUS.unpack_from(reply)
    if (xid, kind) != (_XID, _REPLY):
        raise Absent("what answers does not speak RPC")
    if (stat, verifier, accepted) == (_ACCEPTED, 0, _SUCCESS):
        return reply[_STATUS.size :]
    if (stat, verifier, accepted) == (_ACCEPTED, 0, _OTHER_VERSION) and len(reply) >= _STATUS.size + 8:
        raise OtherVersions(*struct.unpack_from(">II", reply, _STATUS.size))
    raise Absent(f"the service is not there in version {version}")
