"""One path of the API: its methods, and the answer to whatever happens in them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from imageapi.api import body
from imageapi.api.problems import MINIMAL, Done, Json, answer, bug
from imageapi.api.query import Query
from imageapi.api.request import Gone, Request
from imageapi.errors import Exhausted, MethodNotAllowed, NotFound, Problem, no_memory

BRIEF = ("DELETE", "PATCH")
"""The methods that answer without a body when asked to. What a POST has made has an id that its client needs."""
Handler = Callable[[Request, Query], Awaitable[Json]]


class Operation(NamedTuple):
    """One method of a path: what it does, the query parameters it knows, and whether it reads a body."""

    handler: Handler
    query: tuple[str, ...] = ()
    reads: bool = False


class Resource:
    """The methods of one path. HEAD is answered as GET is, unless `head` says otherwise."""

    def __init__(self, *, head: bool = True, **operations: Operation) -> None:
        self.operations = {**operations, **({"HEAD": operations["GET"]} if head and "GET" in operations else {})}

    async def answer(self, request: Request) -> Json | None:
        """The answer, whatever happens; None when nobody is there to read it."""
        try:
            return await self._handle(request)
        except Problem as problem:
            return answer(problem)
        except Gone:
            return None
        except asyncio.CancelledError:
            return answer(Exhausted("the server is ending and could not wait for this; what was half made is undone"))
        except MemoryError:
            return answer(no_memory("answering"))
        except Exception as error:
            return bug(request, error)

    async def _handle(self, request: Request) -> Json:
        if request.says_slash_in_code():
            raise NotFound("there is nothing with an encoded / in its path")
        operation = self.operations.get(request.method)
        if operation is None:
            allow = sorted(self.operations)
            raise MethodNotAllowed(f"{request.method} is not for this path; there are {', '.join(allow)}", allow=allow)
        body.check_type(request)
        found = await operation.handler(request, Query(request, *operation.query))
        return Done() if request.method in BRIEF and request.prefers(MINIMAL) else found
