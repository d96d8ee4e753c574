"""A Ceph key: base64 of a type (1: AES), a time of creation, a length and that many bytes."""

from __future__ import annotations

import base64
import binascii
import struct

from imageapi.errors import Invalid
from imageapi.spec import Secret

HEADER = struct.Struct("<HIIH")


def decoded(secret: Secret) -> bytes:
    """The bytes of a key.

    Raises: errors.Invalid when it is none; the sentence does not show it.
    """
    try:
        data = base64.b64decode(secret.reveal(), validate=True)
    except (binascii.Error, ValueError):
        raise _no_key("it is not base64") from None
    if len(data) < HEADER.size or HEADER.unpack_from(data)[3] != len(data) - HEADER.size:
        raise _no_key("its length does not agree with what it holds")
    return data


def _no_key(reason: str) -> Invalid:
    return Invalid(
        f"the secret is no Ceph key: {reason}; give the value that 'ceph auth get-key client.<name>' prints",
        path="$.options.secret",
    )
