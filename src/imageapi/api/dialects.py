"""The two dialects of the API become one: the only place that knows both.

A request's JSON is rewritten to the canonical form of `spec`, and only then checked against it. Each place that the
rewriting moved is remembered, so that a complaint names the user's own. Which fields hold objects is read from the
annotations of `spec`; nothing here knows a kind but `attach`, whose flat form is the other dialect.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec

from imageapi import spec
from imageapi.api import complaints, rules
from imageapi.errors import Invalid, Problem
from imageapi.spec import Attach, Attachment, Iscsi, Mount, Object, Secret

ATTACHMENTS = spec.kinds(Attachment)
MOUNTS = spec.kinds(Mount)
KINDS: dict[Any, dict[str, Any]] = {Attachment: ATTACHMENTS, Mount: {**MOUNTS, **dict.fromkeys(ATTACHMENTS, Attach)}}
"""Every kind an object may be given as: its own, for a mount also its attachment's."""
ALIASES: dict[Any, dict[str, str]] = {Mount: {"mount_id": "id"}, Iscsi: {"max_commands": "max_comands"}}
"""Other names of fields, by the struct that has them: v0.1's, and the one that is spelled right."""
DEEPEST, MOST = 64, 1000
"""How many objects a request may nest in each other, and have in all; beyond that it is no image but an attack: while
one is read and planned nobody else is answered."""

Raw = dict[str, Any]


class Request(NamedTuple):
    """What is asked for, and where each part of it stood in what the client sent."""

    thing: Object
    places: Places


class Places:
    """Canonical JSON paths, and the client's own."""

    def __init__(self) -> None:
        self._moved: dict[str, str] = {"$": "$"}

    def moved(self, canonical: str, own: str) -> None:
        """What is `canonical` for the spec, and all below it, is `own` for the client."""
        self._moved[canonical] = own

    def named(self, canonical: str, own: str) -> None:
        """The object at `canonical` is a reference, for which the client has one value, at `own`."""
        for step in ("", ".id", ".kind"):
            self._moved[canonical + step] = own

    def own(self, canonical: str) -> str:
        """The client's path of a canonical one: the nearest place above it that was moved tells."""
        above = canonical
        while above and above not in self._moved:
            above = above[: max(above.rfind("."), above.rfind("["), 0)]
        return self._moved.get(above, "") + canonical[len(above) :]

    def locate(self, problem: Problem) -> Problem:
        """The problem, about the client's own place."""
        if path := problem.fields.get("path"):
            problem.fields["path"] = self.own(path)
        return problem


def read(collection: str, body: Any, kind: str | None = None) -> Request:
    """The object asked for by the body of a POST to `collection`, or to the route of one `kind` of it.

    Raises: errors.Problem with the client's own JSON path.
    """
    if not isinstance(body, dict):
        raise Invalid(f"send a JSON object, not {complaints.name_of(body)}", path="$")
    places = Places()
    try:
        raw = _Reader(places).top(spec.COLLECTIONS[collection], body, kind)
    except RecursionError:
        raise Invalid("the request is nested too deeply", path="$") from None
    try:
        thing: Object = complaints.convert(raw, spec.COLLECTIONS[collection])
        rules.check(thing)
    except Problem as problem:
        raise places.locate(problem) from None
    return Request(thing, places)


# ------------------------------------------------------------------------------------------------- rewriting


class _Reader:
    """Rewrites one request. A method takes raw JSON, the client's path of it, and the canonical one; what it does
    not understand it leaves, for the check against the spec to name."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._depth = 0
        self._things = 0

    def top(self, of: Any, body: Raw, kind: str | None) -> Raw:
        """The body of a POST, where no id may be: the server chooses it."""
        if of is Mount and kind in ATTACHMENTS:
            return self._flat_top(_without_nulls(body), kind or "")
        for name in ("id", *(alias for alias, real in ALIASES.get(of, {}).items() if real == "id")):
            if body.get(name) is not None:
                raise Invalid("the server chooses the id of a new object; leave it out", path=f"$.{name}")
        if kind is None:
            whole: Raw = self._thing(body, of, "$", "$") if of in KINDS else self._part(body, of, "$", "$")
            return whole
        self._places.moved(f"$.{kind}", "$")
        return {"kind": kind, kind: self._definition(body, of, kind, "$", f"$.{kind}")}

    def _flat_top(self, body: Raw, kind: str) -> Raw:
        """The body of /mount/rbd. With neither `rbd_id` nor `rbd`, its `id` is the attachment's (the tutorial)."""
        told = f"{kind}_id" in body or kind in body
        if told and "id" in body:
            raise Invalid(f"the server chooses the id of a new mount; '{kind}_id' names the attachment", path="$.id")
        self._places.moved("$.attach", "$")
        flat = self._flat_attach(body, kind, "$", "$.attach", id_field=f"{kind}_id" if told else "id")
        return {"kind": "attach", "attach": flat}

    # ------------------------------------------------------------------------------------ references and kinds

    def _thing(self, raw: Any, of: Any, own: str, canonical: str) -> Any:
        """An attachment or a mount: a reference, or one kind's definition."""
        self._things += 1
        if self._things > MOST:
            raise Invalid(f"a request names and defines at most {MOST} objects; make some of them before", path=own)
        self._places.moved(canonical, own)
        if _is_number(raw):
            self._places.named(canonical, own)
            return {"id": raw}
        if not isinstance(raw, dict):
            return raw
        raw = self._counting(raw, own, canonical, of)
        if "id" in raw:
            return _reference(raw, KINDS[of], own)
        kind = _kind_of(raw, KINDS[of], own)
        return self._deeper({**raw, "kind": kind}, of, own, canonical)

    def _deeper(self, raw: Raw, of: Any, own: str, canonical: str) -> Raw:
        """The object whose definition is there, one level further down.

        Raises: Invalid, where that is too far down.
        """
        if self._depth == DEEPEST:
            raise Invalid(f"the request is nested more than {DEEPEST} objects deep", path=own)
        self._depth += 1
        try:
            kind = raw["kind"]
            if kind in KINDS[of] and kind not in spec.kinds(of):
                return self._by_attachment(raw, kind, own, canonical)
            definition = self._definition(raw[kind], of, kind, f"{own}.{kind}", f"{canonical}.{kind}")
            return {**raw, kind: definition}
        finally:
            self._depth -= 1

    def _by_attachment(self, raw: Raw, kind: str, own: str, canonical: str) -> Raw:
        """A mount that is given as the kind of its attachment, as the tutorial does."""
        inner, outer = f"{own}.{kind}", f"{canonical}.attach"
        self._places.moved(outer, inner)
        rest = {name: value for name, value in raw.items() if name != kind}
        return {**rest, "kind": "attach", "attach": self._flat_attach(raw[kind], kind, inner, outer)}

    def _definition(self, raw: Any, of: Any, kind: str, own: str, canonical: str) -> Any:
        """The kind's own object."""
        if not isinstance(raw, dict):
            return raw
        if raw.get("id") is not None:
            raise Invalid('an id stands beside the kind, not in its definition: {"id": n}', path=f"{own}.id")
        struct = spec.kinds(of)[kind]
        part = self._part(_without(raw, ("id",)), struct, own, canonical, of)
        return _with_agreeing_kind(part, own) if struct is Attach else part

    # ---------------------------------------------------------------------------------- the flat attach-mount

    def _flat_attach(self, raw: Any, kind: str, own: str, canonical: str, id_field: str = "") -> Any:
        """The flat object of an attach-mount, which names its attachment by `<kind>_id` or holds it as `<kind>`."""
        if not isinstance(raw, dict):
            return raw
        id_field = id_field or f"{kind}_id"
        raw = self._counting(raw, own, canonical, Attach, Mount)
        _check_flat(raw, kind, own, id_field)
        rest = self._part(_without(raw, ("kind", kind, id_field)), Attach, own, canonical)
        place = f"{canonical}.attach"
        if id_field in raw:
            self._places.named(place, f"{own}.{id_field}")
            return {**rest, "attach": {"id": raw[id_field], "kind": kind}}
        return {**rest, "attach": self._flat_attachment(raw[kind], kind, f"{own}.{kind}", place)}

    def _flat_attachment(self, raw: Any, kind: str, own: str, canonical: str) -> Any:
        """An attachment whose kind is known from where it stands: a reference, or the kind's own object."""
        self._places.moved(canonical, own)
        if _is_number(raw):
            self._places.named(canonical, own)
            return {"id": raw, "kind": kind}
        if isinstance(raw, dict) and raw.get("id") is not None:
            if (_named_kind(raw, own) or kind) != kind:
                raise Invalid(f"an attachment of kind {kind} belongs here", path=f"{own}.kind")
            return {"id": raw["id"], "kind": kind}
        self._places.moved(f"{canonical}.{kind}", own)
        return {"kind": kind, kind: self._definition(raw, Attachment, kind, own, f"{canonical}.{kind}")}

    # ----------------------------------------------------------------------------------------- fields of a part

    def _part(self, raw: Raw, struct: Any, own: str, canonical: str, *owner: Any) -> Raw:
        """The fields of `struct`, those that hold objects rewritten. `owner` is what the struct is a kind of."""
        structs, texts = structs_of(struct), lists_of_text(struct)
        return {
            name: self._field(value, structs.get(name), name in texts, f"{own}.{name}", f"{canonical}.{name}")
            for name, value in self._counting(raw, own, canonical, struct, *owner).items()
        }

    def _field(self, value: Any, struct: Any, is_texts: bool, own: str, canonical: str) -> Any:
        if not isinstance(value, list):
            return self._held(value, struct, own, canonical)
        if is_texts and all(isinstance(one, str) for one in value):
            return [one for one in value if one]
        return [self._held(one, struct, f"{own}[{at}]", f"{canonical}[{at}]") for at, one in enumerate(value)]

    def _held(self, value: Any, struct: Any, own: str, canonical: str) -> Any:
        if struct in KINDS:
            return self._thing(value, struct, own, canonical)
        return self._part(value, struct, own, canonical) if struct and isinstance(value, dict) else value

    def _counting(self, raw: Raw, own: str, canonical: str, struct: Any, *owner: Any) -> Raw:
        """What of `raw` counts, under the names of `struct`: no nulls, no empty strings where text is optional, and
        nothing that only the server sets."""
        ignored, texts = _ignored(struct, *owner), optional_text(struct)
        counting = {
            name: value
            for name, value in raw.items()
            if value is not None and name not in ignored and (value != "" or name not in texts)
        }
        for alias, real in ALIASES.get(struct, {}).items():
            if alias in counting:
                self._places.moved(f"{canonical}.{real}", f"{own}.{alias}")
                if counting.setdefault(real, counting[alias]) != counting.pop(alias):
                    raise Invalid(f"'{alias}' and '{real}' are one field, and differ", path=f"{own}.{alias}")
        return counting


def _reference(raw: Raw, kinds: Iterable[str], own: str) -> Raw:
    """The id decides; of a definition beside it only the kind is read, which must agree."""
    given = [kind for kind in kinds if kind in raw]
    named = _named_kind(raw, own) or (given[0] if given else None)
    for kind in given:
        if kind != named:
            at = "kind" if "kind" in raw else kind
            raise Invalid(f"the kind is '{named}', but '{kind}' is defined", path=f"{own}.{at}")
    rest = _without(raw, given)
    return {**rest, "kind": named} if named else rest


def _named_kind(raw: Raw, own: str) -> str | None:
    """The kind that `raw` names itself, as far as a message should repeat it.

    Raises: errors.Invalid, when that is no string.
    """
    kind = raw.get("kind")
    if not isinstance(kind, str | None):
        raise Invalid("the kind is a string", path=f"{own}.kind")
    return kind and complaints.shortened(kind)


def _kind_of(raw: Raw, kinds: dict[str, Any], own: str) -> str:
    """The kind whose definition `raw` holds.

    Raises: errors.Invalid when there is none, or more than one.
    """
    given = [kind for kind in kinds if kind in raw]
    kind = _named_kind(raw, own) or (given[0] if len(given) == 1 else None)
    ways = 'give it as a reference, {"id": n}, or as a definition of one kind only, {"kind": K, K: {…}}'
    if kind is None:
        raise Invalid(f"{ways}; the kinds are {', '.join(kinds)}", path=own)
    if kind not in kinds:
        raise Invalid(f"there is no kind '{kind}'{complaints.nearest(kind, kinds)}", path=f"{own}.kind")
    for other in given:
        if other != kind:
            raise Invalid(f"the kind is '{kind}'; '{other}' does not belong here", path=f"{own}.{other}")
    if not given:
        raise Invalid(f"the kind is '{kind}', but there is no '{kind}'; {ways}", path=own)
    return kind


def _check_flat(raw: Raw, kind: str, own: str, id_field: str) -> None:
    """Raises: errors.Invalid for what the flat object of an attach-mount cannot have, or lacks."""
    known = [*(name for name in Attach.__struct_fields__ if name != "attach"), kind, id_field]
    if (named := _named_kind(raw, own) or kind) != kind:
        raise Invalid(f"this is the mount of an attachment of kind {kind}, not '{named}'", path=f"{own}.kind")
    if id_field not in raw and kind not in raw:
        raise Invalid(f"name the attachment by '{kind}_id', or define it as '{kind}'", path=own)
    if "id" in raw and id_field != "id":
        raise Invalid(
            f"'{kind}_id' names the attachment; a mount's own id stands beside its kind: "
            f'{{"id": n, "kind": "{kind}"}}',
            path=f"{own}.id",
        )
    for name in raw:
        if name not in known:
            raise Invalid(complaints.unknown(name, known), path=f"{own}.{name}")


def _with_agreeing_kind(part: Raw, own: str) -> Raw:
    """The part of an attach-mount without the `kind` that may stand in it, which must be its attachment's."""
    kind, attachment = _named_kind(part, own), part.get("attach")
    if kind and isinstance(attachment, dict) and attachment.setdefault("kind", kind) != kind:
        raise Invalid(f"the kind is '{kind}', but the attachment is of kind '{attachment['kind']}'", path=f"{own}.kind")
    return _without(part, ("kind",))


def _without(raw: Raw, names: Iterable[str]) -> Raw:
    left_out = frozenset(names)
    return {name: value for name, value in raw.items() if name not in left_out}


def _without_nulls(raw: Raw) -> Raw:
    return {name: value for name, value in raw.items() if value is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@cache
def _ignored(*structs: Any) -> frozenset[str]:
    """What only the server sets of any of these."""
    return frozenset().union(*map(spec.server_fields, structs))


@cache
def structs_of(struct: Any) -> dict[str, Any]:
    """The fields of `struct` that hold structs, or lists of them, and which."""
    held = {name: spec.struct_of(hint) for name, hint in spec.hints(struct).items()}
    return {name: one for name, one in held.items() if one}


@cache
def lists_of_text(struct: Any) -> frozenset[str]:
    """The fields of `struct` that are lists of any text."""
    return frozenset(name for name, hint in spec.hints(struct).items() if get_args(hint) == (str,))


@cache
def optional_text(struct: Any) -> frozenset[str]:
    """The fields of `struct` that hold text and may be left out: Go clients send "" when they mean that."""
    optional = {field.name for field in msgspec.structs.fields(struct) if not field.required}
    return frozenset(name for name, hint in spec.hints(struct).items() if name in optional and _is_text(hint))


def _is_text(hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return isinstance(get_args(hint)[0], str)
    if origin is list:
        return False
    inner = get_args(hint)[:1] if origin is Annotated else get_args(hint)
    return any(map(_is_text, inner)) if inner else hint in (str, Secret)
