"""The routes: each finds its object or reads its request, asks the engine, and shows the answer in its form."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from imageapi.api import body, dialects, views
from imageapi.api.problems import Json
from imageapi.api.query import KINDS, Query, is_number
from imageapi.config import Config
from imageapi.engine.engine import Engine
from imageapi.engine.graph import Picture
from imageapi.errors import Invalid, MethodNotAllowed, NotFound, Problem
from imageapi.records import Key

BASE = "/imageapi/v1"
T = TypeVar("T")
View = Callable[[Picture], Any]
Handler = Callable[[Request], Awaitable[Response]]


class Gone(Exception):
    """The client hung up: there is nobody to answer."""


class Routes:
    """The API of one engine."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self._engine = engine
        self._config = config

    def table(self) -> list[Route]:
        """All routes, the more particular ones first."""
        routes: list[Route] = []
        for collection in ("attach", "mount"):
            base = f"{BASE}/{collection}"
            routes += [
                _route(base, GET=self._list(collection), POST=self._create(collection),
                       DELETE=self._delete_by_query(collection)),
                _route(f"{base}/{{which}}", **self._id_or_kind(collection)),
                _route(f"{base}/{{kind}}/{{id}}", GET=self._one_of_kind(collection),
                       DELETE=self._delete_of_kind(collection)),
            ]
        base = f"{BASE}/container"
        for where in (f"{base}/byname/{{name}}", f"{base}/{{id}}"):
            routes += [
                _route(where, GET=self._container, DELETE=self._delete_container),
                _route(f"{where}/{{state}}", GET=self._state, POST=self._state, HEAD=None),
            ]
        list_route = _route(base, GET=self._list("container"), POST=self._create("container"),
                            DELETE=self._delete_by_query("container"), PATCH=self._patch)
        return [*routes, list_route]

    # ------------------------------------------------------------------------------------- collection routes

    def _list(self, collection: str) -> Handler:
        known = ("id", "name", "state") if collection == "container" else ("id", "kind")

        async def handler(request: Request) -> Response:
            query = Query(request, *known)
            kind = None if collection == "container" else query.kind(collection)
            found = [
                picture
                for picture in self._engine.pictures(collection)
                if query.id in (None, picture.record.id)
                and (kind is None or _is_of_kind(picture, kind))
                and query.name in (None, getattr(picture.record.spec, "name", None))
                and query.state in (None, picture.record.run and picture.record.run.state)
            ]
            if not found and (query.id is not None or query.name is not None):
                raise NotFound(f"there is no such {collection}; GET {BASE}/{collection} lists those that are")
            return Json([views.whole(picture) for picture in found])

        return handler

    def _create(self, collection: str) -> Handler:
        async def handler(request: Request) -> Response:
            Query(request)
            return await self._make(request, collection, None, views.whole)

        return handler

    def _delete_by_query(self, collection: str) -> Handler:
        known = ("id", "name", "force") if collection == "container" else ("id", "force")

        async def handler(request: Request) -> Response:
            query = Query(request, *known)
            force = query.force
            picture = await self._engine.delete(self._chosen(collection, query), force=force)
            return Json(views.whole(picture))

        return handler

    def _chosen(self, collection: str, query: Query) -> Key:
        """The object that a query names.

        Raises: errors.Invalid, when it names none, or two.
        """
        if query.name is None:
            if query.id is None:
                what = "id or name" if collection == "container" else "id"
                raise Invalid(f"say which {collection}, by the query parameter {what}", path="?id")
            return self._engine.picture(Key(collection, query.id)).record.key
        key = self._engine.named(query.name)
        if query.id not in (None, key.id):
            raise Invalid(f"id {query.id} and name '{query.name}' are not the same container", path="?id")
        return key

    # ------------------------------------------------------------------------------------------- kind routes

    def _id_or_kind(self, collection: str) -> dict[str, Handler]:
        """/attach/{which}: digits are an id, anything else a kind."""

        async def get(request: Request) -> Response:
            which = request.path_params["which"]
            Query(request)
            if is_number(which):
                return Json(views.whole(self._engine.picture(Key(collection, int(which)))))
            kind = _known_kind(collection, which)
            found = [one for one in self._engine.pictures(collection) if _is_of_kind(one, kind)]
            return Json([views.flat(picture, kind) for picture in found])

        async def post(request: Request) -> Response:
            which = request.path_params["which"]
            if is_number(which):
                raise MethodNotAllowed(f"POST to {BASE}/{collection}, or to a kind's route", allow=["GET", "DELETE"])
            Query(request)
            kind = _known_kind(collection, which)
            return await self._make(request, collection, kind, lambda picture: views.flat(picture, kind))

        async def delete(request: Request) -> Response:
            which = request.path_params["which"]
            if not is_number(which):
                raise MethodNotAllowed(f"DELETE takes one: {BASE}/{collection}/{which}/<id>", allow=["GET", "POST"])
            force = Query(request, "force").force
            return Json(views.whole(await self._engine.delete(Key(collection, int(which)), force=force)))

        return {"GET": get, "POST": post, "DELETE": delete}

    def _one_of_kind(self, collection: str) -> Handler:
        async def handler(request: Request) -> Response:
            Query(request)
            picture, kind = self._find_of_kind(request, collection)
            return Json(views.flat(picture, kind))

        return handler

    def _delete_of_kind(self, collection: str) -> Handler:
        async def handler(request: Request) -> Response:
            force = Query(request, "force").force
            picture, kind = self._find_of_kind(request, collection)
            last = await self._engine.delete(picture.record.key, force=force)
            return Json(views.flat(last, kind))

        return handler

    def _find_of_kind(self, request: Request, collection: str) -> tuple[Picture, str]:
        kind = _known_kind(collection, request.path_params["kind"])
        picture = self._engine.picture(Key(collection, _id_of(request)))
        if not _is_of_kind(picture, kind):
            raise NotFound(f"{picture.record.key} is of kind {picture.record.kind}, not {kind}")
        return picture, kind

    # -------------------------------------------------------------------------------------------- containers

    def _container_key(self, request: Request) -> Key:
        name = request.path_params.get("name")
        return self._engine.named(name) if name is not None else Key("container", _id_of(request))

    async def _container(self, request: Request) -> Response:
        Query(request)
        return Json(views.whole(self._engine.picture(self._container_key(request))))

    async def _delete_container(self, request: Request) -> Response:
        force = Query(request, "force").force
        return Json(views.whole(await self._engine.delete(self._container_key(request), force=force)))

    async def _state(self, request: Request) -> Response:
        Query(request)
        key = self._container_key(request)
        return Json(views.whole(await self._engine.request_state(key, request.path_params["state"])))

    async def _patch(self, request: Request) -> Response:
        query = Query(request, "id", "name", "state")
        key = self._chosen("container", query)
        if query.state is None:
            raise Invalid("say which state, by the query parameter state: running or exited", path="?state")
        return Json(views.whole(await self._engine.request_state(key, query.state)))

    # ------------------------------------------------------------------------------------------------- a POST

    async def _make(self, request: Request, collection: str, kind: str | None, view: View) -> Response:
        config = self._config
        asked = await body.read(request, limit=config.max_body_size, timeout=config.read_timeout)
        wanted = dialects.read(collection, asked, kind)
        try:
            picture = await _while_connected(request, self._engine.create(wanted.thing))
        except Problem as problem:
            raise wanted.places.locate(problem) from None
        return Json(view(picture), status_code=201)


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up.

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
        task.cancel()
        leaving.cancel()


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _route(path: str, **handlers: Handler | None) -> Route:
    """One path, with a handler for each method; what has none is 405, HEAD is answered as GET is."""
    methods = sorted(method for method, handler in handlers.items() if handler)

    async def endpoint(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" and "HEAD" not in handlers else request.method
        handler = handlers.get(method)
        if handler is None:
            these = ", ".join(methods)
            raise MethodNotAllowed(f"{request.method} is not for this path; there are {these}", allow=methods)
        return await handler(request)

    return Route(path, endpoint, methods=[*methods, "HEAD"])


def _known_kind(collection: str, kind: str) -> str:
    """Raises: NotFound: a route of a kind that does not exist does not either."""
    if kind not in KINDS[collection]:
        raise NotFound(f"there is no kind '{kind}'; there are {', '.join(KINDS[collection])}")
    return kind


def _id_of(request: Request) -> int:
    """Raises: NotFound, when what stands for an id is none."""
    text = request.path_params["id"]
    if not is_number(text):
        raise NotFound(f"'{text}' is no id")
    return int(text)


def _is_of_kind(picture: Picture, kind: str) -> bool:
    """Whether the object belongs to the route of `kind`: an attach-mount also to its attachment's."""
    record = picture.record
    if kind == record.kind:
        return True
    edges = record.edges() if record.kind == "attach" else []
    return any(kind == picture.below[key].kind for key in edges if key in picture.below)
