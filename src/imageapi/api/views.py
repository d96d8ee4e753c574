"""From a picture of an object to its JSON, in either form: secrets masked.

The collection form shows everything an object stands on whole, all the way down; the kind form is flat, with plain ids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
from msgspec import Raw

from imageapi import spec
from imageapi.engine.graph import Picture
from imageapi.records import AnyRecord, Key, Run, snapshot
from imageapi.spec import Attach, Attachment, Container, Mount, Spec

View = dict[str, Any]
Child = Callable[[Key], Any]
"""How an object shows one that it stands on."""

DEEPEST = 150
"""How many objects an answer nests in each other. What a chain of references has built deeper is shown by its id from
there on: parsers of JSON have their limits (Python's and msgspec's is at 1,000 levels)."""

encode = msgspec.json.Encoder(enc_hook=spec.masking_hook).encode


class Shown(msgspec.Struct, eq=False):
    """How an object was shown, and all that this came from: a copy of its record, its references and how those it
    stands on were shown. `height` is how many objects the view nests; there is none of more than DEEPEST."""

    record: AnyRecord
    refs: int
    below: list[Shown]
    height: int
    view: Raw


class Album:
    """The collection form of a list of objects. What the list before has shown, and is the same in all that its view
    came from, is not made again."""

    def __init__(self) -> None:
        self._last: dict[Key, Shown] = {}

    def whole(self, pictures: Sequence[Picture]) -> list[Raw]:
        """Of pictures that were taken together."""
        self._last = self._all(pictures) if pictures else {}
        return [_bounded(self._last[picture.key], picture) for picture in pictures]

    def _all(self, pictures: Sequence[Picture]) -> dict[Key, Shown]:
        tables, shown = pictures[0], dict[Key, Shown]()
        for key in _children_first([picture.key for picture in pictures], tables, shown):
            shown[key] = self._shown(tables, key, shown)
        return shown

    def _shown(self, tables: Picture, key: Key, shown: dict[Key, Shown]) -> Shown:
        record, refs, edges = tables.records[key], tables.refs[key], tables.edges[key]
        below = [shown[edge] for edge in edges if edge in shown]
        last = self._last.get(key)
        if last is not None and last.below == below and last.refs == refs and last.record == record:
            return last
        height = 1 + max((each.height for each in below), default=0)
        children = {edge: shown[edge].view for edge in edges if edge in shown}
        view = Raw(encode(_object(record, refs, children)) if height <= DEEPEST else b"null")
        return Shown(snapshot(record), refs, below, height, view)


def whole(picture: Picture) -> Raw:
    """The collection form of one object."""
    return Album().whole([picture])[0]


def _bounded(shown: Shown, picture: Picture) -> Raw:
    return shown.view if shown.height <= DEEPEST else _cut(picture)


def _cut(picture: Picture) -> Raw:
    """The collection form of what nests too many objects: those too far down are shown by their ids."""
    order: dict[Key, AnyRecord] = {}
    for key in _children_first([picture.key], picture, order):
        order[key] = picture.records[key]
    levels = _levels(picture, list(order))
    views: dict[Key, Raw] = {}
    for key, record in order.items():
        deep = levels[key] >= DEEPEST
        view = {"id": record.id, "kind": record.kind} if deep else _object(record, picture.refs[key], views)
        views[key] = Raw(encode(view))
    return views[picture.key]


def flat(picture: Picture, kind: str) -> View:
    """The form of the routes of `kind`: its own, or for an attach-mount its attachment's."""
    record = picture.record
    fields = _fields(record, lambda key: key.id)
    if isinstance(record.definition, Attach) and kind != record.kind:
        fields = {f"{kind}_id": fields.pop("attach"), **fields}
    view: View = msgspec.to_builtins(
        {"id": record.id, **fields, **_learnt(record, picture.refs[record.key])}, enc_hook=spec.masking_hook
    )
    return view


def _children_first(keys: Iterable[Key], tables: Picture, done: Mapping[Key, Any]) -> Iterator[Key]:
    """The objects and all that they stand on, each once and after what it stands on itself, but for what is `done`.
    Whoever goes through them does each before asking for the next."""
    edges, records = tables.edges, tables.records
    for one in keys:
        waiting = [one]
        while waiting:
            key = waiting[-1]
            for edge in edges[key]:
                if edge not in done and edge in records:
                    waiting.append(edge)
            if waiting[-1] is key and waiting.pop() not in done:
                yield key


def _levels(picture: Picture, order: list[Key]) -> dict[Key, int]:
    """How far below the last of `order` each object is: the longest way counts."""
    levels: defaultdict[Key, int] = defaultdict(int)
    for key in reversed(order):
        for edge in picture.edges[key]:
            levels[edge] = max(levels[edge], levels[key] + 1)
    return levels


def _object(record: AnyRecord, refs: int, children: Mapping[Key, Raw]) -> View:
    """An object by the views of those it stands on. One that is gone, deleted by force, is shown by its id."""

    def child(key: Key) -> Any:
        return children.get(key, {"id": key.id})

    if isinstance(record.spec, Container):
        return _container(record, refs, child)
    return {"id": record.id, "kind": record.kind, record.kind: _fields(record, child), **_learnt(record, refs)}


def _container(record: AnyRecord, refs: int, child: Child) -> View:
    asked, run = record.spec, record.run or Run()
    return {
        "id": record.id,
        **({"name": asked.name} if asked.name else {}),
        "mount": child(Key(Mount.COLLECTION, asked.mount.id)),
        "command": asked.command,
        "systemd": asked.systemd,
        "state": run.state,
        "namespaces": asked.namespaces,
        "logfile": run.logfile,
        "refs": refs,
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
    found: View = {}
    for field, learnt, holds in _layout(type(part)):
        value = getattr(record.facts if learnt else part, field, None)
        if value is not None:
            found[field] = _held(value, child) if holds else value
    return found


@cache
def _layout(struct: type[Spec]) -> tuple[tuple[str, bool, bool], ...]:
    """The fields of a kind's own object: whether the server learns it, and whether it holds objects."""
    learnt, holding = spec.server_fields(struct), spec.holding(struct)
    return tuple((field, field in learnt, field in holding) for field in struct.__struct_fields__)


def _held(value: Any, child: Child) -> Any:
    """What stands where an object is needed, or a list of objects."""
    if isinstance(value, list):
        return [_held(item, child) for item in value]
    return child(Key(value.COLLECTION, value.id or 0))


def _learnt(record: AnyRecord, refs: int) -> View:
    """What the server knows of the object beside what was asked for."""
    place = "device_file" if record.key.collection == Attachment.COLLECTION else "mountpoint"
    found = getattr(record.facts, place)
    return {**({place: found} if found else {}), "refs": refs, **_problem(record)}


def _problem(record: AnyRecord) -> View:
    return {"problem": record.problem} if record.problem else {}
