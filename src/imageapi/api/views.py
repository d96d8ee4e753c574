"""From a picture of an object to its JSON, in either form: pure functions, secrets masked.

The collection form shows everything an object stands on whole, all the way down; the kind form is flat, with plain ids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from imageapi import spec
from imageapi.engine.graph import Picture
from imageapi.records import AnyRecord, Key, Run
from imageapi.spec import Attach, Attachment, Container, Mount, Spec

View = dict[str, Any]
Child = Callable[[Key], Any]
"""How an object shows one that it stands on."""

DEEPEST = 150
"""How many objects an answer nests in each other. What a chain of references has built deeper is shown by its id from
there on: parsers of JSON have their limits (Python's and msgspec's is at 1,000 levels)."""


def whole(picture: Picture) -> View:
    """The collection form."""
    order = list(_children_first(picture))
    levels = _levels(order)
    views: dict[Key, View] = {}
    for record in order:
        deep = levels[record.key] >= DEEPEST
        views[record.key] = {"id": record.id, "kind": record.kind} if deep else _object(picture, record, views)
    return views[picture.record.key]


def flat(picture: Picture, kind: str) -> View:
    """The form of the routes of `kind`: its own, or for an attach-mount its attachment's."""
    record = picture.record
    fields = _fields(record, lambda key: key.id)
    if isinstance(record.definition, Attach) and kind != record.kind:
        fields = {f"{kind}_id": fields.pop("attach"), **fields}
    return {"id": record.id, **fields, **_learnt(picture, record)}


def _children_first(picture: Picture) -> Iterator[AnyRecord]:
    """The object and all that it stands on, each once, and each after what it stands on itself."""
    known = {picture.record.key: picture.record, **picture.below}
    done: set[Key] = set()
    waiting = [picture.record.key]
    while waiting:
        key = waiting[-1]
        before = [edge for edge in known[key].edges() if edge in known and edge not in done]
        waiting += before
        if not before and waiting.pop() not in done:
            done.add(key)
            yield known[key]


def _levels(order: list[AnyRecord]) -> dict[Key, int]:
    """How far below the last of `order` each object is: the longest way counts."""
    levels: defaultdict[Key, int] = defaultdict(int)
    for record in reversed(order):
        for edge in record.edges():
            levels[edge] = max(levels[edge], levels[record.key] + 1)
    return levels


def _object(picture: Picture, record: AnyRecord, views: dict[Key, View]) -> View:
    """An object by the views of those it stands on. One that is gone, deleted by force, is shown by its id."""

    def child(key: Key) -> View:
        return views.get(key, {"id": key.id})

    if isinstance(record.spec, Container):
        return _container(picture, record, child)
    return {
        "id": record.id,
        "kind": record.kind,
        record.kind: _fields(record, child),
        **_learnt(picture, record),
    }


def _container(picture: Picture, record: AnyRecord, child: Child) -> View:
    asked, run = record.spec, record.run or Run()
    return {
        "id": record.id,
        **({"name": asked.name} if asked.name else {}),
        "mount": child(record.edges()[0]),
        "command": asked.command,
        "systemd": asked.systemd,
        "state": run.state,
        "namespaces": asked.namespaces,
        "logfile": run.logfile,
        "refs": picture.refs[record.key],
        "pid": run.pid,
        "exit_code": run.exit_code,
        "created_at": run.created_at,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        **_problem(record),
    }


def _fields(record: AnyRecord, child: Child) -> View:
    """The kind's own object: what was asked for and what holds by default, and what the server has learnt of it.
    Fields without a value are left out."""
    part: Spec = record.definition
    learnt = spec.server_fields(type(part))
    values = {
        field: getattr(record.facts if field in learnt else part, field, None) for field in part.__struct_fields__
    }
    return {field: _value(value, child) for field, value in values.items() if value is not None}


def _value(value: Any, child: Child) -> Any:
    if isinstance(value, Attachment | Mount):
        return child(Key(value.COLLECTION, value.id or 0))
    if isinstance(value, list):
        return [_value(item, child) for item in value]
    return msgspec.to_builtins(value, enc_hook=spec.masking_hook)


def _learnt(picture: Picture, record: AnyRecord) -> View:
    """What the server knows of the object beside what was asked for."""
    place = "device_file" if record.key.collection == Attachment.COLLECTION else "mountpoint"
    found = getattr(record.facts, place)
    return {**({place: found} if found else {}), "refs": picture.refs[record.key], **_problem(record)}


def _problem(record: AnyRecord) -> View:
    return {"problem": record.problem} if record.problem else {}
