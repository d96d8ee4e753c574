"""The OpenAPI document: its schemas come from the structs of `spec`, its paths from the table of routes.

It says what the types say. What else must hold of a request, the answer that refuses it tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

import msgspec

from imageapi import __version__, spec
from imageapi.api.dialects import ALIASES, KINDS
from imageapi.api.paths import Route
from imageapi.api.problems import MINIMAL
from imageapi.api.resource import BRIEF, Operation, Resource
from imageapi.api.rules import MOST_ADDRESSES
from imageapi.spec import Finding, Mount, Progress, Spec

Schema = dict[str, Any]

TEMPLATE = "#/components/schemas/{name}"
ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
PROBLEM: Schema = {
    "type": "object",
    "description": "What went wrong: one sentence, and fields that help.",
    "required": ["code", "message"],
    "properties": {
        "code": {"type": "integer", "description": "the HTTP status"},
        "message": {"type": "string"},
        "path": {"type": "string", "description": "the JSON path of the field it is about"},
        "step": {"type": "string"},
        "errno": {"type": "string"},
        "detail": {"type": "string", "description": "the kernel's own words"},
        "holders": {"type": "array", "items": {"type": "string"}},
    },
}
PARAMETERS: dict[str, Schema] = {
    "id": ID,
    "name": {"type": "string"},
    "kind": {"type": "string"},
    "state": {"type": "string", "enum": list(get_args(spec.State))},
    "force": {"type": "string", "enum": ["true", "false", "1", "0"], "default": "false"},
}
"""The schema of each parameter, in a path or a query."""
SHOWN: dict[str, type[Spec]] = {**spec.COLLECTIONS, "progress": Progress, "check": Finding}
"""What there is to read, by the word in its path."""


class Place(NamedTuple):
    """One path of the document; `schema` is the name of what is there."""

    path: str
    schema: str
    resource: Resource


def document(routes: Sequence[Route]) -> Schema:
    """The document of an API with these routes."""
    whole = {
        "openapi": "3.1.0",
        "info": {"title": "ImageAPI", "version": __version__},
        "paths": {
            place.path: {
                method.lower(): _operation(method, operation, place)
                for method, operation in place.resource.operations.items()
                if method != "HEAD"
            }
            for route in routes
            for place in _places(route)
        },
        "components": {"schemas": _schemas()},
    }
    # Python's \Z is $ in the regular expressions that JSON schemas are written in.
    described: Schema = msgspec.json.decode(msgspec.json.encode(whole).replace(rb"\\Z", b"$"))
    return described


def _places(route: Route) -> Iterator[Place]:
    """The paths of a route: one for each kind, where it is of kinds."""
    owner = next((one for name, one in SHOWN.items() if f"/{name}" in route.path), None)
    if owner is None:
        return
    if "{kind}" not in route.path:
        yield Place(route.path, owner.__name__, route.resource)
        return
    for kind in KINDS[owner]:
        yield Place(route.path.replace("{kind}", kind), _flat_name(owner, kind), route.resource)


# --------------------------------------------------------------------------------------------------- operations


def _operation(method: str, operation: Operation, place: Place) -> Schema:
    one = _reference(place.schema)
    many = method == "GET" and "{" not in place.path
    described: Schema = {
        "operationId": f"{method.lower()}{place.path.replace('{', '').replace('}', '').replace('/', '_')}",
        "parameters": [*_parameters(place.path, operation)],
        "responses": {
            "201" if operation.reads else "200": _content({"type": "array", "items": one} if many else one),
            **({"204": {"description": f"Done; asked for by Prefer: {MINIMAL}"}} if method in BRIEF else {}),
            "default": _content(_reference("Problem")),
        },
    }
    if operation.reads:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": one}}}
    return described


def _parameters(path: str, operation: Operation) -> Iterator[Schema]:
    for name, schema in PARAMETERS.items():
        if f"{{{name}}}" in path:
            yield {"in": "path", "name": name, "required": True, "schema": schema}
        elif name in operation.query:
            yield {"in": "query", "name": name, "schema": schema}


def _content(schema: Schema) -> Schema:
    return {"description": "the answer", "content": {"application/json": {"schema": schema}}}


# ------------------------------------------------------------------------------------------------------ schemas


def _reference(name: str) -> Schema:
    return {"$ref": TEMPLATE.format(name=name)}


def _flat_name(owner: Any, kind: str) -> str:
    return f"{owner.__name__}_{kind}"


def _schemas() -> dict[str, Schema]:
    """The structs' own schemas, the kinds' flat ones, and for what may be referred to also its bare id."""
    _, schemas = msgspec.json.schema_components(list(SHOWN.values()), schema_hook=_of_ours, ref_template=TEMPLATE)
    flat = {
        _flat_name(owner, kind): _flat(owner, kind, schemas[owner.__name__], schemas[struct.__name__])
        for owner, kinds in KINDS.items()
        for kind, struct in kinds.items()
    }
    for owner, kinds in KINDS.items():
        properties = schemas[owner.__name__]["properties"]
        properties |= {kind: _reference(_flat_name(owner, kind)) for kind in kinds if kind not in properties}
    for struct, aliases in ALIASES.items():
        properties = schemas[struct.__name__]["properties"]
        properties |= {alias: {**properties[real], "deprecated": True} for alias, real in aliases.items()}
    for owner in KINDS:
        schemas[owner.__name__] = {"anyOf": [ID, schemas[owner.__name__]]}
    return {**schemas, **flat, "Problem": PROBLEM}


def _flat(owner: Any, kind: str, whole: Schema, part: Schema) -> Schema:
    """What a kind's own routes take and show: its definition, with its id and what the server knows of it."""
    own = dict(part["properties"])
    required = part["required"]
    if owner is Mount and kind not in spec.kinds(Mount):
        own |= {f"{kind}_id": ID, kind: _reference(spec.kinds(spec.Attachment)[kind].__name__)}
        del own["attach"]
        required = [name for name in required if name in own]
    known = {name: whole["properties"][name] for name in whole["properties"] if name in spec.server_fields(owner)}
    return {**part, "properties": {"id": ID, **own, **known}, "required": required}


def _of_ours(kind: type) -> Schema:
    """The schema of the types that msgspec does not know."""
    if kind is spec.Addresses:
        one = {"type": "string", "format": "uri", "description": f"shown with {spec.MASK} for its user and its query"}
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1, "maxItems": MOST_ADDRESSES}]}
    if kind is not spec.Secret:
        raise NotImplementedError(kind)
    return {"type": "string", "format": "password", "description": f"shown as {spec.MASK}"}
