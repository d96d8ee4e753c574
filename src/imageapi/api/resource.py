"""One path of the API: its methods, and the answer to whatever happens in them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from imageapi.api import body
from imageapi.api.problems import answer, bug
from imageapi.api.query import DIGITS, Query, number
from imageapi.errors import Exhausted, MethodNotAllowed, NotFound, Problem

T = TypeVar("T")
Handler = Callable[[Request, Query], Awaitable[Response]]

class _Number(Convertor[int]):
    """`{id:number}` in a path: digits, and nothing else."""

    regex = DIGITS.pattern

    def convert(self, value: str) -> int:
        return number(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("number", _Number())


class Operation(NamedTuple):
    """One method of a path: what it does, the query parameters it knows, and whether it reads a body."""

    handler: Handler
    query: tuple[str, ...] = ()
    reads: bool = False


class Gone(Exception):
    """The client hung up: there is nobody to answer."""


class Resource:
    """An ASGI application of the methods it is given. HEAD is answered as GET is, unless `head` says otherwise."""

    def __init__(self, *, head: bool = True, **operations: Operation) -> None:
        self.operations = {**operations, **({"HEAD": operations["GET"]} if head and "GET" in operations else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = await self._answer(request)
        if response is not None:
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response | None:
        """The answer, whatever happens; None when nobody is there to read it."""
        try:
            return await self._handle(request)
        except Problem as problem:
            return answer(problem)
        except (Gone, ClientDisconnect):
            return None
        except asyncio.CancelledError:
            return answer(Exhausted("the server is ending and could not wait for this; what was half made is undone"))
        except Exception as error:
            return bug(request, error)

    async def _handle(self, request: Request) -> Response:
        if b"%2f" in request.scope.get("raw_path", b"").lower():
            raise NotFound("there is nothing with an encoded / in its path")
        operation = self.operations.get(request.method)
        if operation is None:
            allow = sorted(self.operations)
            raise MethodNotAllowed(f"{request.method} is not for this path; there are {', '.join(allow)}", allow=allow)
        body.check_type(request)
        return await operation.handler(request, Query(request, *operation.query))


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. The body must have been read.

    Raises: Gone then.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        leaving.cancel()
        task.cancel()
        task.add_done_callback(_looked_at)


def _looked_at(task: asyncio.Future[Any]) -> None:
    """What a cancelled create fails with is nobody's any more; the engine has told its log."""
    if not task.cancelled():
        task.exception()


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
