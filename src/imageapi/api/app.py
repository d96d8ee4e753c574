"""The ASGI application: routes, what is answered when there is none, and the guard around all."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from imageapi.api.guard import Guard
from imageapi.api.problems import answer, on_bug, on_problem
from imageapi.api.routes import BASE, Gone, Routes
from imageapi.config import Config
from imageapi.engine.engine import Engine
from imageapi.errors import BY_CODE, MethodNotAllowed, NotFound, Problem


def app(engine: Engine, config: Config) -> ASGIApp:
    """The API of `engine`."""
    inner = Starlette(
        routes=Routes(engine, config).table(),
        exception_handlers={
            Problem: on_problem,
            HTTPException: _on_http,
            Gone: _on_hang_up,
            ClientDisconnect: _on_hang_up,
            Exception: on_bug,
        },
    )
    inner.router.redirect_slashes = False
    return Guard(inner, {config.host, *config.allowed_hosts})


async def _on_http(request: Request, error: Exception) -> Response:
    """What Starlette refuses: a path or a method that no route has."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == NotFound.code:
        problem: Problem = NotFound(f"there is no {request.url.path}; there are {BASE}/attach, /mount, /container")
    elif status == MethodNotAllowed.code:
        problem = MethodNotAllowed(f"{request.method} is not for this path")
    else:
        problem = BY_CODE.get(status, Problem)(str(error))
    response = answer(problem)
    response.headers.update(getattr(error, "headers", None) or {})
    return response


async def _on_hang_up(request: Request, error: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=499)
