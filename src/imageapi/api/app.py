"""The ASGI application: routes, what is answered where there is none, and the guard around all."""

from __future__ import annotations

from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from imageapi.api.complaints import shortened
from imageapi.api.guard import Guard
from imageapi.api.problems import answer
from imageapi.api.routes import BASE, Routes
from imageapi.config import Config
from imageapi.engine.engine import Engine
from imageapi.errors import NotFound


def app(engine: Engine, config: Config) -> ASGIApp:
    """The API of `engine`. A path with a slash too many is another path, and there is nothing."""
    inner = Router(Routes(engine, config).table(), redirect_slashes=False, default=_nowhere)
    return Guard(inner, {config.host, *config.allowed_hosts})


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    where = f"there are {BASE}/attach, {BASE}/mount, {BASE}/container and what is below them"
    await answer(NotFound(f"there is no {shortened(scope['path'])}; {where}"))(scope, receive, send)
