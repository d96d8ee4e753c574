"""The body of a request: read within its limit, and decoded, or refused with the place.

How long it may take is the connection's matter (`listen`). Of a name that an object has twice the last value counts.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from imageapi.api.problems import JSON
from imageapi.api.request import Request
from imageapi.errors import Malformed, TooLarge, UnsupportedMedia


def check_type(request: Request) -> None:
    """A body is JSON, also where nobody reads it: so no form of a web page is a request (with GET and HEAD a body
    means nothing, RFC 9110, 9.3.1).

    Raises: errors.UnsupportedMedia.
    """
    if request.method in ("GET", "HEAD") or not _has_body(request):
        return
    if (request.header(b"content-type") or "").split(";")[0].strip().lower() != JSON:
        raise UnsupportedMedia(f"send the body as JSON, with the header Content-Type: {JSON}")
    if (request.header(b"content-encoding") or "identity").strip().lower() != "identity":
        raise UnsupportedMedia("send the body as it is, without a Content-Encoding")


def _has_body(request: Request) -> bool:
    return request.header(b"content-length") not in (None, "0") or request.header(b"transfer-encoding") is not None


async def read(request: Request, limit: int) -> Any:
    """The JSON of the request, which may have `limit` bytes.

    Raises: errors.TooLarge, Malformed; request.Gone.
    """
    declared = request.header(b"content-length") or ""
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    data = bytearray()
    async for chunk in request.chunks():
        data += chunk
        if len(data) > limit:
            raise _too_large(limit)
    return decode(bytes(data))


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes; a server started with --max-body-size takes more")


def decode(data: bytes) -> Any:
    """The value that `data` is the JSON of.

    Raises: errors.Malformed with line and column.
    """
    if not data:
        raise Malformed("line 1, column 1: the body is empty; send a JSON object")
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        raise Malformed("the body is nested too deeply to be read") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(_locate(data, str(error))) from None


def _locate(data: bytes, complaint: str) -> str:
    """What is wrong, and where. The standard library's parser says it best; what only msgspec refuses, it says.
    Nothing of the body is repeated: a secret may stand there."""
    try:
        json.loads(data)
    except UnicodeDecodeError as error:
        line, column = _position(data, error.start)
        return f"line {line}, column {column}: the body is not UTF-8"
    except json.JSONDecodeError as error:
        what = error.msg.lower().removesuffix(" at")
        return f"line {error.lineno}, column {error.colno}: the body is not JSON: {what}, found {_found(error)}"
    except (ValueError, RecursionError):
        pass
    at = re.search(r"byte (\d+)", complaint)
    line, column = _position(data, int(at[1]) if at else 0)
    return f"line {line}, column {column}: the body is not JSON: {complaint.partition(' - at ')[0]}"


def _found(error: json.JSONDecodeError) -> str:
    """What stands in the wrong place."""
    first = error.doc[error.pos : error.pos + 1]
    if not first:
        return "the end"
    if first == '"':
        return "a string"
    if first.isalnum() or first == "-":
        return "a word" if first.isalpha() else "a number"
    return f"'{first}'" if first.isprintable() else "an unprintable character"


def _position(data: bytes, offset: int) -> tuple[int, int]:
    """Line and column of a byte, both from 1."""
    before = data[:offset]
    return before.count(b"\n") + 1, offset - (before.rfind(b"\n") + 1) + 1
