"""From a request to ordered steps: a pure function of the request and the graph.

The tree is walked children first. Each definition becomes a record of its own whose spec holds references only; a
nested definition that may be shared becomes the standing object it equals. What cannot be is refused here, with the
place in the request, before anything is made.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from imageapi import spec
from imageapi.drivers.base import Driver, driver
from imageapi.engine.graph import Graph, describe
from imageapi.errors import Conflict, Invalid, NotFound, Unsupported
from imageapi.records import AnyRecord, Key, Phase, Record
from imageapi.spec import Attachment, Container, Mount, Object

Drivers = Callable[[str, str], Driver]
"""How the planner comes to a kind's driver; raises errors.Unsupported for a kind that has none."""


class Later(NamedTuple):
    """The plan depends on something that is going away: ask again when it is gone."""

    key: Key


class Plan(NamedTuple):
    """The records to make, children first, and the place of each in the request as a JSON path."""

    steps: list[AnyRecord]
    paths: dict[Key, str]

    @property
    def root(self) -> AnyRecord:
        return self.steps[-1]


class _GoingAway(Exception):
    def __init__(self, key: Key) -> None:
        self.key = key


def plan(thing: Object, graph: Graph, draw_token: Callable[[], int], drivers: Drivers = driver) -> Plan | Later:
    """The steps that make `thing`, or what to wait for before they can be known. Changes nothing.

    Raises: errors.Problem, with the JSON path.
    """
    planner = _Planner(graph, draw_token, drivers)
    try:
        planner.place(thing, "$", nested=False)
    except _GoingAway as wait:
        return Later(wait.key)
    return Plan(planner.steps, planner.paths)


class _Planner:
    def __init__(self, graph: Graph, draw_token: Callable[[], int], drivers: Drivers) -> None:
        self._graph = graph
        self._draw_token = draw_token
        self._drivers = drivers
        self._counted: Counter[str] = Counter()
        self._own: dict[Key, AnyRecord] = {}
        self.steps: list[AnyRecord] = []
        self.paths: dict[Key, str] = {}

    def place(self, thing: Object, path: str, *, nested: bool) -> Key:
        """Plan `thing` and all below it; the key it will be found under."""
        part = spec.own_part(thing)
        if part is None:
            return self._reference(thing, path)
        if isinstance(thing, Container):
            self._check_name(thing, path)
        else:
            self._check_driver(thing, path)
        inside = path if isinstance(thing, Container) else f"{path}.{thing.kind}"
        keys = [self.place(need, inside + at, nested=True) for at, need in spec.needs_at(part)]
        return self._make_or_share(self._flatten(thing, part, keys), path, nested=nested)

    def _make_or_share(self, record: AnyRecord, path: str, *, nested: bool) -> Key:
        if nested and self._shareable(record) and (shared := self._equal(record)):
            return shared
        self._check_exclusive(record, path)
        self._check_upper(record, path)
        self.steps.append(record)
        self.paths[record.key] = path
        self._own[record.key] = record
        self._counted[record.key.collection] += 1
        return record.key

    def _flatten(self, thing: Object, part: Any, keys: list[Key]) -> AnyRecord:
        """The record of `thing`, standing on `keys`: its spec holds what was asked for, and nothing the server sets."""
        references: list[Attachment | Mount] = [
            Attachment(id=key.id) if key.collection == Attachment.COLLECTION else Mount(id=key.id) for key in keys
        ]
        flat = spec.as_asked(spec.replace_needs(part, references))
        if isinstance(thing, Container):
            asked: Object = msgspec.structs.replace(flat, id=None, state=None)
        else:
            asked = type(thing)(kind=thing.kind, **{thing.kind or "": flat})
        collection = thing.COLLECTION
        number = self._graph.following(collection) + self._counted[collection]
        return Record(id=number, spec=asked, token=self._draw_token())

    # -------------------------------------------------------------------------------------------- references

    def _reference(self, thing: Object, path: str) -> Key:
        if thing.id is None:
            raise Invalid(
                f'give this {thing.COLLECTION} either as a reference, {{"id": n}}, or as a definition with its kind',
                path=path,
            )
        key = Key(thing.COLLECTION, thing.id)
        try:
            record = self._graph.visible(key)
        except NotFound as missing:
            raise NotFound(f"{missing.message}; GET /{key.collection} lists those that are", path=path) from None
        self._check_kind(thing, record, path)
        self._check_standing(record, path)
        return key

    def _check_kind(self, thing: Object, record: AnyRecord, path: str) -> None:
        wanted = None if isinstance(thing, Container) else thing.kind
        have = self._graph.kinds(record)
        if wanted and wanted not in have:
            raise Invalid(
                f"{record.key} is of kind {' or '.join(sorted(have))}, not {wanted}; leave the kind out or name the "
                f"right one",
                path=f"{path}.kind",
            )

    @staticmethod
    def _check_standing(record: AnyRecord, path: str) -> None:
        if record.phase is Phase.RELEASING:
            raise Conflict(f"{describe(record)} is being deleted; make a new one", path=path)
        if record.problem:
            raise Conflict(f"{describe(record)} cannot be used: {record.problem}", path=path)

    # ------------------------------------------------------------------------------------------------ sharing

    def _lookup(self, key: Key) -> AnyRecord:
        return self._own.get(key) or self._graph.get(key)

    def _read_only(self, record: AnyRecord) -> bool:
        return self._drivers(record.key.collection, record.kind).read_only(record.definition)

    def _shareable(self, record: AnyRecord) -> bool:
        """Whether equal definitions are one object: a read-only attachment, and a file system on one."""
        if record.key.collection == Attachment.COLLECTION:
            return self._read_only(record)
        return isinstance(record.definition, spec.Attach) and self._is_on_read_only(record)

    def _is_on_read_only(self, record: AnyRecord) -> bool:
        return all(self._read_only(self._lookup(key)) for key in record.edges())

    def _equal(self, record: AnyRecord) -> Key | None:
        """The object that `record` would be a second of: in this request, or standing."""
        for own in self.steps:
            if own.key.collection == record.key.collection and own.spec == record.spec:
                return own.key
        for other in self._graph.alike(record):
            if other.phase is Phase.RELEASING and other.problem is None:
                raise _GoingAway(other.key)
            if other.phase is not Phase.RELEASING and other.problem is None:
                return other.key
        return None

    # ---------------------------------------------------------------------------------------------- conflicts

    def _check_driver(self, thing: Attachment | Mount, path: str) -> None:
        try:
            self._drivers(thing.COLLECTION, thing.kind or "")
        except Unsupported as missing:
            raise Unsupported(missing.message, path=path) from None

    def _check_name(self, container: Container, path: str) -> None:
        holder = self._graph.named(container.name) if container.name else None
        if holder:
            raise Conflict(
                f"the name '{container.name}' is in use by {holder}; choose another, or delete that one",
                path=f"{path}.name",
            )

    def _check_exclusive(self, record: AnyRecord, path: str) -> None:
        """Refuse a second attachment of an image of which either could write."""
        if record.key.collection != Attachment.COLLECTION:
            return
        own = self._drivers(record.key.collection, record.kind)
        place = f"{path}.{record.kind}"
        identities = _identities(own, record.definition, place)
        if not identities or own.forced(record.definition):
            return
        writes = not own.read_only(record.definition)
        for other in (*self._graph.all(Attachment.COLLECTION), *self.steps):
            if other.kind == record.kind and not identities.isdisjoint(own.identities(other.definition)):
                self._check_pair(writes or not own.read_only(other.definition), other, place)

    def _check_upper(self, record: AnyRecord, path: str) -> None:
        """Refuse an upper that cannot be written, or that another overlay writes to at the same place."""
        definition = record.definition
        if not isinstance(definition, spec.Overlay) or definition.upper is None:
            return
        upper = self._lookup(record.edges()[-1])
        place = f"{path}.{record.kind}.upper"
        if self._read_only(upper) or (isinstance(upper.definition, spec.Attach) and self._is_on_read_only(upper)):
            raise Invalid(f"{describe(upper)} is read-only, and an upper is written to; make it writable", path=place)
        for other in (*self._graph.holders(upper.key), *self.steps):
            if _write_to_one_place(definition, other.definition):
                self._check_writer(other, upper, place)

    @staticmethod
    def _check_writer(other: AnyRecord, upper: AnyRecord, path: str) -> None:
        if other.phase is Phase.RELEASING and other.problem is None:
            raise _GoingAway(other.key)
        raise Conflict(
            f"{describe(other)} writes to this place in {describe(upper)} already; delete that one first, or choose "
            "another upper_path",
            path=path,
            holders=[describe(other)],
        )

    @staticmethod
    def _check_pair(writable: bool, other: AnyRecord, path: str) -> None:
        if not writable:
            return
        if other.phase is Phase.RELEASING and other.problem is None:
            raise _GoingAway(other.key)
        raise Conflict(
            f"the image is attached already, as {describe(other)}, and one of the two could write to it; refer to that "
            f"one by id, make both read-only, or set options.force",
            path=path,
        )


def _identities(own: Driver, definition: Any, place: str) -> frozenset[object]:
    """What the image is known by; what is wrong with its definition is wrong at `place`."""
    try:
        return own.identities(definition)
    except Invalid as wrong:
        fields = {**wrong.fields, "path": place + str(wrong.fields.get("path", "")).removeprefix("$")}
        raise Invalid(wrong.message, **fields) from None


def _write_to_one_place(overlay: spec.Overlay, other: Any) -> bool:
    """Whether two overlays write to one place of the same mount, or one of them inside what the other writes."""
    if not isinstance(other, spec.Overlay) or other.upper is None or overlay.upper is None:
        return False
    first, second = _place(overlay), _place(other)
    return other.upper.id == overlay.upper.id and (
        first == second or _lies_in(first, second) or _lies_in(second, first)
    )


def _place(overlay: spec.Overlay) -> str:
    return posixpath.normpath("/" + (overlay.upper_path or "").strip("/")).rstrip("/")


def _lies_in(inner: str, outer: str) -> bool:
    return f"{inner}/".startswith(tuple(f"{outer}/{name}/" for name in ("upper", "work")))
