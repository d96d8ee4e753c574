"""A request as the ASGI server hands it over (asgi.readthedocs.io, HTTP), and the one thing to do while it is answered:
look whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gone(Exception):
    """The client hung up: there is nobody to answer."""


def header_values(scope: Scope, name: bytes) -> list[str]:
    """All that the request says under a header's name, which is in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


class Request:
    """One request. `parts` is what its path says at the places that the route leaves open."""

    def __init__(self, scope: Scope, receive: Receive, parts: dict[str, str]) -> None:
        self._scope = scope
        self._receive = receive
        self.parts = parts
        self.method: str = scope["method"]
        self.path: str = scope["path"]

    def header(self, name: bytes) -> str | None:
        """The first value of a header, whose name is in lower case."""
        return next(iter(header_values(self._scope, name)), None)

    def prefers(self, preference: str) -> bool:
        """Whether the client has asked for a preference, such as `return=minimal` (RFC 7240, 2). Of several that differ
        in their value the first counts."""
        asked = ",".join(header_values(self._scope, b"prefer")).lower().replace('"', "").split(",")
        said = ("".join(one.partition(";")[0].split()) for one in asked)
        name = preference.partition("=")[0]
        return preference == next((one for one in said if one.partition("=")[0] == name), None)

    def says_slash_in_code(self) -> bool:
        """Whether the path as it was sent has an encoded slash, which is in `path` like any other."""
        return b"%2f" in self._scope.get("raw_path", b"").lower()

    def query(self) -> list[tuple[str, str]]:
        """The parameters behind the path, in their order."""
        text = self._scope["query_string"].decode("latin-1")
        if "%" not in text and "+" not in text:
            return [(name, value) for name, _, value in (part.partition("=") for part in text.split("&") if part)]
        from urllib.parse import parse_qsl  # 0.5 MB, of which ipaddress is the most

        return parse_qsl(text, keep_blank_values=True)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, as it comes.

        Raises: Gone.
        """
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Gone
            yield message.get("body", b"")
            more = message.get("more_body", False)

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the client hangs up. The body must have been read.

        Raises: Gone then.
        """
        asking = asyncio.current_task()
        assert asking is not None

        def leave(_: object) -> None:
            asking.cancel()

        leaving = asyncio.ensure_future(self._hang_up())
        leaving.add_done_callback(leave)
        try:
            return await work
        except asyncio.CancelledError:
            if leaving.done():
                raise Gone from None
            raise
        finally:
            leaving.remove_done_callback(leave)
            leaving.cancel()

    async def _hang_up(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
