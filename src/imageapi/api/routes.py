"""The routes: each finds its object or reads its request, asks the engine, and shows the answer in its form."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from imageapi import spec
from imageapi.api import body, dialects, openapi, views
from imageapi.api.complaints import shortened
from imageapi.api.paths import Route
from imageapi.api.problems import Json
from imageapi.api.query import Query, number
from imageapi.api.request import Request
from imageapi.api.resource import Operation, Resource
from imageapi.config import BASE, Config
from imageapi.engine import stages
from imageapi.engine.engine import Engine
from imageapi.engine.graph import Picture
from imageapi.errors import Invalid, NotFound, Problem
from imageapi.records import Key

View = Callable[[Picture], Any]


class Routes:
    """The API of one engine."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self._engine = engine
        self._config = config

    def table(self) -> list[Route]:
        """All routes, the more particular ones first: digits are an id, anything else a kind."""
        routes = [*self._of_kinds("attach"), *self._of_kinds("mount"), *self._of_containers()]
        routes.append(Route(f"{BASE}/progress", Resource(GET=Operation(self._progress))))
        routes.append(Route(f"{BASE}/check", Resource(GET=Operation(self._check))))
        described = cache(lambda: openapi.document(routes))

        async def handler(request: Request, query: Query) -> Json:
            return Json(described())

        return [*routes, Route(f"{BASE}/openapi.json", Resource(GET=Operation(handler)))]

    async def _progress(self, request: Request, query: Query) -> Json:
        return Json(self._engine.progress())

    async def _check(self, request: Request, query: Query) -> Json:
        return Json(await self._engine.check())

    def _of_kinds(self, collection: str) -> list[Route]:
        base = f"{BASE}/{collection}"
        return [
            Route(
                base,
                Resource(
                    GET=self._list(collection),
                    POST=self._create(collection),
                    DELETE=self._delete_by_query(collection),
                ),
            ),
            Route(f"{base}/{{id}}", Resource(GET=self._get(collection), DELETE=self._delete(collection))),
            Route(
                f"{base}/{{kind}}",
                Resource(
                    GET=self._list_of_kind(collection),
                    POST=self._create_of_kind(collection),
                ),
            ),
            Route(
                f"{base}/{{kind}}/{{id}}",
                Resource(
                    GET=self._get_of_kind(collection),
                    DELETE=self._delete_of_kind(collection),
                ),
            ),
        ]

    def _of_containers(self) -> list[Route]:
        base = f"{BASE}/container"
        one = Resource(GET=self._get("container"), DELETE=self._delete("container"))
        ask = Operation(self._ask_for_state)
        state = Resource(GET=ask, POST=ask, head=False)
        return [
            Route(
                base,
                Resource(
                    GET=self._list("container"),
                    POST=self._create("container"),
                    DELETE=self._delete_by_query("container"),
                    PATCH=Operation(self._patch, ("id", "name", "state")),
                ),
            ),
            Route(f"{base}/byname/{{name}}", one),
            Route(f"{base}/byname/{{name}}/{{state}}", state),
            Route(f"{base}/{{id}}", one),
            Route(f"{base}/{{id}}/{{state}}", state),
        ]

    # ------------------------------------------------------------------------------------- collection routes

    def _list(self, collection: str) -> Operation:
        known = ("id", "name", "state") if collection == "container" else ("id", "kind")
        album = views.Album()

        async def handler(request: Request, query: Query) -> Json:
            wanted = self._named(collection, query)
            kind, state = query.kind(collection) if "kind" in known else None, query.state
            pictures = self._engine.pictures(collection) if wanted is None else [self._engine.picture(wanted)]
            found = [
                picture
                for picture in pictures
                if (kind is None or _is_of_kind(picture, kind)) and (state is None or state == _state(picture))
            ]
            if wanted and not found:
                raise NotFound(f"{wanted} is not of that {'state' if state else 'kind'}")
            return Json((views.Album() if wanted else album).whole(found))

        return Operation(handler, known)

    def _create(self, collection: str) -> Operation:
        async def handler(request: Request, query: Query) -> Json:
            return await self._make(request, collection, None, views.whole)

        return Operation(handler, reads=True)

    def _delete_by_query(self, collection: str) -> Operation:
        known = ("id", "name", "force") if collection == "container" else ("id", "force")

        async def handler(request: Request, query: Query) -> Json:
            force, key = query.force, self._chosen(collection, query)
            return Json(views.whole(await self._engine.delete(key, force=force)))

        return Operation(handler, known)

    def _named(self, collection: str, query: Query) -> Key | None:
        """The object that a query names by id, name or both.

        Raises: errors.NotFound; errors.Invalid, when they disagree.
        """
        by_id = None if query.id is None else self._engine.picture(Key(collection, query.id)).record.key
        by_name = None if query.name is None else self._engine.named(query.name)
        if by_id and by_name and by_id != by_name:
            raise Invalid(f"{by_id} has another name: name '{query.name}' is {by_name}", path="?name")
        return by_id or by_name

    def _chosen(self, collection: str, query: Query) -> Key:
        """The object that a query must name.

        Raises: errors.Invalid, when it names none, or two; errors.NotFound.
        """
        key = self._named(collection, query)
        if key is None:
            what = "id or name" if collection == "container" else "id"
            raise Invalid(f"say which {collection}, by the query parameter {what}", path="?id")
        return key

    # ------------------------------------------------------------------------------------ one object by its path

    def _key(self, request: Request, collection: str) -> Key:
        name = request.parts.get("name")
        return Key(collection, number(request.parts["id"])) if name is None else self._engine.named(name)

    def _get(self, collection: str) -> Operation:
        async def handler(request: Request, query: Query) -> Json:
            return Json(views.whole(self._engine.picture(self._key(request, collection))))

        return Operation(handler)

    def _delete(self, collection: str) -> Operation:
        async def handler(request: Request, query: Query) -> Json:
            force, key = query.force, self._key(request, collection)
            return Json(views.whole(await self._engine.delete(key, force=force)))

        return Operation(handler, ("force",))

    async def _ask_for_state(self, request: Request, query: Query) -> Json:
        state, key = request.parts["state"], self._key(request, "container")
        return Json(views.whole(await self._engine.request_state(key, state)))

    async def _patch(self, request: Request, query: Query) -> Json:
        state, key = query.state, self._chosen("container", query)
        if state is None:
            raise Invalid("say which state, by the query parameter state: running or exited", path="?state")
        return Json(views.whole(await self._engine.request_state(key, state)))

    # ------------------------------------------------------------------------------------------- kind routes

    def _list_of_kind(self, collection: str) -> Operation:
        async def handler(request: Request, query: Query) -> Json:
            kind = _known_kind(request, collection)
            found = [one for one in self._engine.pictures(collection) if _is_of_kind(one, kind)]
            return Json([views.flat(picture, kind) for picture in found])

        return Operation(handler)

    def _create_of_kind(self, collection: str) -> Operation:
        async def handler(request: Request, query: Query) -> Json:
            kind = _known_kind(request, collection)
            return await self._make(request, collection, kind, lambda picture: views.flat(picture, kind))

        return Operation(handler, reads=True)

    def _get_of_kind(self, collection: str) -> Operation:
        async def handler(request: Request, query: Query) -> Json:
            picture, kind = self._found_of_kind(request, collection)
            return Json(views.flat(picture, kind))

        return Operation(handler)

    def _delete_of_kind(self, collection: str) -> Operation:
        async def handler(request: Request, query: Query) -> Json:
            picture, kind = self._found_of_kind(request, collection)
            force = query.force
            return Json(views.flat(await self._engine.delete(picture.record.key, force=force), kind))

        return Operation(handler, ("force",))

    def _found_of_kind(self, request: Request, collection: str) -> tuple[Picture, str]:
        """Raises: NotFound."""
        kind = _known_kind(request, collection)
        picture = self._engine.picture(Key(collection, number(request.parts["id"])))
        if not _is_of_kind(picture, kind):
            raise NotFound(f"{picture.record.key} is of kind {picture.record.kind}, not {kind}")
        return picture, kind

    # ------------------------------------------------------------------------------------------------- a POST

    async def _make(self, request: Request, collection: str, kind: str | None, view: View) -> Json:
        told = stages.begin()
        asked = await body.read(request, self._config.max_body_size)
        wanted = dialects.read(collection, asked, kind)
        told.end("read")
        try:
            picture = await request.while_connected(self._engine.create(wanted.thing))
        except Problem as problem:
            raise wanted.places.locate(problem) from None
        answer = Json(view(picture), 201)
        told.end("answer")
        answer.headers["server-timing"] = str(told)
        return answer


def _known_kind(request: Request, collection: str) -> str:
    """The kind in the path.

    Raises: NotFound: the route of a kind that does not exist does not either.
    """
    kind: str = request.parts["kind"]
    known = dialects.KINDS[spec.COLLECTIONS[collection]]
    if kind not in known:
        raise NotFound(f"there is no kind '{shortened(kind)}' in {BASE}/{collection}; there are {', '.join(known)}")
    return kind


def _is_of_kind(picture: Picture, kind: str) -> bool:
    """Whether the object belongs to the routes of `kind`: an attach-mount also to its attachment's."""
    record = picture.record
    edges = picture.edges[picture.key] if record.kind == "attach" else []
    return kind == record.kind or any(kind == picture.records[key].kind for key in edges if key in picture.records)


def _state(picture: Picture) -> str | None:
    return picture.record.run.state if picture.record.run else None
