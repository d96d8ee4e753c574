"""CHAP as iSCSI has it (RFC 1994; RFC 7143, section 12.1.3): each side proves a secret without saying it."""

from __future__ import annotations

import base64
import binascii

HASHES = {"5": "md5", "6": "sha1", "7": "sha256", "8": "sha3_256"}
"""The algorithms by their numbers (IANA, "PPP Authentication Algorithms"); targets choose, and all know MD5."""
CHALLENGE_SIZE = 16


def response(algorithm: str, identifier: int, secret: str, challenge: bytes) -> bytes:
    """The proof of a secret."""
    import hashlib  # it loads libcrypto, which nothing else that is forked from the zygote needs

    return hashlib.new(HASHES[algorithm], bytes([identifier]) + secret.encode() + challenge).digest()


def encode_bytes(value: bytes) -> str:
    """A binary value in a text key."""
    return f"0x{value.hex()}"


def decode_bytes(text: str) -> bytes:
    """A binary value of a text key, which may be hexadecimal or base64.

    Raises: ValueError.
    """
    kind, digits = text[:2].lower(), text[2:]
    try:
        if kind == "0x":
            return bytes.fromhex(digits.rjust(len(digits) + len(digits) % 2, "0"))
        if kind == "0b":
            return base64.b64decode(digits, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    raise ValueError("neither hexadecimal nor base64")
