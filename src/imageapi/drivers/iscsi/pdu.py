"""The few iSCSI messages that a login of our own needs (RFC 7143, section 11): how they look on the wire.

Only what is sent and read here is described. There are no digests and no additional headers: a login that offers none
gets none.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

HEADER_SIZE = 48
LARGEST = 262144
"""Bytes of the largest data segment that is taken from a target."""

IMMEDIATE = 0x40
FINAL = 0x80
CONTINUE = 0x40
NO_TAG = 0xFFFFFFFF

NOP_IN = 0x20
SCSI_COMMAND = 0x01
SCSI_RESPONSE = 0x21
LOGIN = 0x03
LOGIN_RESPONSE = 0x23
TEXT = 0x04
TEXT_RESPONSE = 0x24
DATA_IN = 0x25
LOGOUT = 0x06
LOGOUT_RESPONSE = 0x26

READ = 0x40
SIMPLE = 0x01
"""Flags of a SCSI command: data comes in; the task attribute."""
HAS_STATUS = 0x01
"""Flag of Data-In: the command's status is in it, and no response follows."""


class Pdu(NamedTuple):
    """A message. `body` is the header from its 8th byte on, 40 bytes; `data` its data segment."""

    opcode: int
    flags: int
    reserved: bytes
    body: bytes
    data: bytes

    @property
    def status_number(self) -> int:
        """StatSN, by which the target counts its answers."""
        return int.from_bytes(self.body[16:20], "big")

    @property
    def login_status(self) -> int:
        """The class and detail of a login response, as the RFC writes them: 0x0201."""
        return int.from_bytes(self.body[28:30], "big")


def encode(opcode: int, flags: int, body: bytes, data: bytes = b"") -> bytes:
    """The bytes of a message; data is padded to a multiple of four."""
    header = struct.pack(">BBHI", opcode, flags, 0, len(data)) + body.ljust(40, b"\0")
    return header + data + bytes(-len(data) % 4)


def sizes(header: bytes) -> tuple[int, int]:
    """The bytes of the additional header and of the data segment that follow a header."""
    return header[4] * 4, int.from_bytes(header[5:8], "big")


def decode(header: bytes, data: bytes) -> Pdu:
    """The message with this header and data segment."""
    return Pdu(header[0] & 0x3F, header[1], header[2:4], header[8:], data)


def encode_text(pairs: Mapping[str, str]) -> bytes:
    """Keys and values as a data segment has them."""
    return b"".join(f"{key}={value}\0".encode() for key, value in pairs.items())


def decode_text(data: bytes) -> list[tuple[str, str]]:
    """The keys and values of a data segment, in their order: SendTargets answers one key many times."""
    lines = data.decode("utf-8", "replace").split("\0")
    return [(key, value) for key, equals, value in (line.partition("=") for line in lines) if equals]


def lun_word(lun: int) -> int:
    """A LUN with its addressing method, as SAM-5 has it and the kernel and QEMU want to be told: peripheral addressing
    up to 255, flat space addressing above."""
    return lun if lun < 256 else 0x4000 | lun


def lun_bytes(lun: int) -> bytes:
    """A LUN in a message."""
    return lun_word(lun).to_bytes(2, "big") + bytes(6)


def lun_number(eight: bytes) -> int:
    """What `lun_bytes` encoded."""
    return int.from_bytes(eight[:2], "big") & 0x3FFF
