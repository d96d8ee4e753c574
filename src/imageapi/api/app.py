"""The ASGI application: the guard, the way to a path's resource, and what is answered where there is none."""

from __future__ import annotations

from imageapi.api.complaints import shortened
from imageapi.api.guard import Guard
from imageapi.api.paths import Paths
from imageapi.api.problems import Json, answer
from imageapi.api.request import App, Receive, Request, Scope, Send
from imageapi.api.routes import Routes
from imageapi.config import BASE, Config
from imageapi.engine.engine import Engine
from imageapi.errors import NotFound


def app(engine: Engine, config: Config) -> App:
    """The API of `engine`. A path with a slash too many is another path, and there is nothing."""
    paths = Paths(Routes(engine, config).table())

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        resource, parts = paths.find(scope["path"])
        said = await resource.answer(Request(scope, receive, parts)) if resource else _nowhere(scope["path"])
        if said is not None:
            await said(scope, receive, send)

    return Guard(inner, {config.host, config.tls.host, *config.allowed_hosts})


def _nowhere(path: str) -> Json:
    where = f"there are {BASE}/attach, {BASE}/mount, {BASE}/container and what is below them"
    return answer(NotFound(f"there is no {shortened(path)}; {where}"))
