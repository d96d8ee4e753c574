"""The body of a request: read within limits, and decoded, or refused with the place."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from imageapi.api.problems import JSON
from imageapi.errors import Malformed, TooLarge, TooSlow, UnsupportedMedia


async def read(request: Request, *, limit: int, timeout: float) -> Any:
    """The JSON of the request. `limit` is in bytes, `timeout` in seconds.

    Raises: errors.UnsupportedMedia, TooLarge, TooSlow, Malformed; starlette's ClientDisconnect.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    data = await _receive(request, limit, timeout)
    if data and request.headers.get("content-type", "").split(";")[0].strip().lower() != JSON:
        raise UnsupportedMedia(f"send the body as JSON, with the header Content-Type: {JSON}")
    return decode(data)


async def _receive(request: Request, limit: int, timeout: float) -> bytes:
    data = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {timeout:g}s; send it at once") from None
    return bytes(data)


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
        raise Malformed("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(_locate(data, str(error))) from None


def _locate(data: bytes, complaint: str) -> str:
    """What is wrong, and where. The standard library's parser says it best; what only msgspec refuses, it says."""
    try:
        json.loads(data)
    except UnicodeDecodeError as error:
        line, column = _position(data, error.start)
        return f"line {line}, column {column}: the body is not UTF-8"
    except json.JSONDecodeError as error:
        return f"line {error.lineno}, column {error.colno}: the body is not JSON: {error.msg.lower()}{_near(error)}"
    except (ValueError, RecursionError):
        pass
    at = re.search(r"byte (\d+)", complaint)
    line, column = _position(data, int(at[1]) if at else 0)
    return f"line {line}, column {column}: the body is not JSON: {complaint}"


def _near(error: json.JSONDecodeError) -> str:
    """The first characters of what stands in the wrong place."""
    found = error.doc[error.pos : error.pos + 20].split("\n")[0]
    return f", found '{found}'" if found else ", found its end"


def _position(data: bytes, offset: int) -> tuple[int, int]:
    """Line and column of a byte, both from 1."""
    before = data[:offset]
    return before.count(b"\n") + 1, offset - (before.rfind(b"\n") + 1) + 1


__all__ = ["ClientDisconnect", "decode", "read"]
