"""The two dialects of the API become one: the only place that knows both.

A request's JSON is rewritten to the canonical form of `spec`, and only then checked against it. Each place that the
rewriting moved is remembered, so that a complaint names the user's own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from imageapi import spec
from imageapi.api import rules
from imageapi.errors import Invalid, Problem
from imageapi.spec import Attach, Attachment, Container, Mount, Object, Spec

ATTACHMENTS = spec.kinds(Attachment)
MOUNTS = spec.kinds(Mount)
MOUNT_KINDS = {**MOUNTS, **dict.fromkeys(ATTACHMENTS, Attach)}
"""Every kind a mount may be given as: its own, or its attachment's."""
EMPTY_IS_NONE = ("name", "snapshot")
"""Fields that Go clients send as "" when they mean nothing; the string options are others."""

Raw = dict[str, Any]


class Request(NamedTuple):
    """What is asked for, and where each part of it stood in what the client sent."""

    thing: Object
    places: Places


class Places:
    """Canonical JSON paths, and the client's own."""

    def __init__(self) -> None:
        self._moved: dict[str, str] = {}

    def moved(self, canonical: str, own: str) -> None:
        self._moved[canonical] = own

    def own(self, canonical: str) -> str:
        """The client's path of a canonical one: the nearest place above it that was moved tells."""
        above = canonical
        while above not in self._moved:
            above, _, _ = above.rpartition(_last_step(above))
            if not above:
                return canonical
        return self._moved[above] + canonical[len(above) :]

    def locate(self, problem: Problem) -> Problem:
        """The problem, about the client's own place."""
        if path := problem.fields.get("path"):
            problem.fields["path"] = self.own(path)
        return problem


def _last_step(path: str) -> str:
    return path[max(path.rfind("."), path.rfind("[")) :]


def read(collection: str, body: Any, kind: str | None = None) -> Request:
    """The object asked for by the body of a POST to `collection`, or to the route of one `kind` of it.

    Raises: errors.Problem with the client's own JSON path.
    """
    places = Places()
    places.moved("$", "$")
    try:
        if not isinstance(body, dict):
            raise Invalid(f"send a JSON object, not {_name_of(body)}", path="$")
        raw = _Reader(places).top(collection, body, kind)
        thing: Object = _convert(raw, spec.COLLECTIONS[collection])
        rules.check(thing)
        return Request(thing, places)
    except RecursionError:
        raise Invalid("the request is nested too deeply", path="$") from None
    except Problem as problem:
        raise places.locate(problem) from None


# ------------------------------------------------------------------------------------------------- rewriting


class _Reader:
    """Rewrites one request. Each method takes raw JSON, the client's path of it, and the canonical one; what it does
    not understand it leaves, for the check against the spec to name."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def top(self, collection: str, body: Raw, kind: str | None) -> Raw:
        body = _without_nulls(body)
        if kind is None:
            if "id" in body:
                raise Invalid("the server chooses the id of a new object; leave it out", path="$.id")
            read = {"attach": self.attachment, "mount": self.mount, "container": self.container}[collection]
            canonical: Raw = read(body, "$", "$")
            return canonical
        if collection == "mount" and kind in ATTACHMENTS:
            return self._flat_top(body, kind)
        if "id" in body:
            raise Invalid("the server chooses the id of a new object; leave it out", path="$.id")
        self._places.moved(f"$.{kind}", "$")
        owner: Any = spec.COLLECTIONS[collection]
        return {"kind": kind, kind: self._definition(_strip(body, owner), kind, "$", f"$.{kind}")}

    def _flat_top(self, body: Raw, kind: str) -> Raw:
        """The body of /mount/rbd: with neither `rbd_id` nor `rbd`, its `id` is the attachment's (the tutorial)."""
        if f"{kind}_id" not in body and kind not in body:
            if "id" not in body:
                raise Invalid(_how_to_name(kind), path="$")
            body = {**{name: value for name, value in body.items() if name != "id"}, f"{kind}_id": body["id"]}
            self._places.moved("$.attach.attach", "$")
        elif "id" in body:
            raise Invalid(f"the server chooses the id of a new mount; '{kind}_id' names the attachment", path="$.id")
        self._places.moved("$.attach", "$")
        return {"kind": "attach", "attach": self._flat_attach(body, kind, "$", "$.attach")}

    def container(self, raw: Raw, own: str, canonical: str) -> Raw:
        raw = _strip(raw, Container)
        if "mount" in raw:
            raw["mount"] = self.mount(raw["mount"], f"{own}.mount", f"{canonical}.mount")
        return raw

    def mount(self, raw: Any, own: str, canonical: str) -> Any:
        raw = self._reference_or(raw, own, canonical, "mount_id", MOUNT_KINDS, Mount)
        if not isinstance(raw, dict) or "id" in raw:
            return raw
        kind = _kind_of(raw, MOUNT_KINDS, own)
        if kind in ATTACHMENTS:
            inner, outer = f"{own}.{kind}", f"{canonical}.attach"
            self._places.moved(outer, inner)
            rest = {name: value for name, value in raw.items() if name not in ("kind", kind)}
            flat = raw[kind]
            return {**rest, "kind": "attach", "attach": self._flat_attach(flat, kind, inner, outer)}
        return {**raw, "kind": kind, kind: self._definition(raw[kind], kind, f"{own}.{kind}", f"{canonical}.{kind}")}

    def attachment(self, raw: Any, own: str, canonical: str) -> Any:
        raw = self._reference_or(raw, own, canonical, "attach_id", ATTACHMENTS, Attachment)
        if not isinstance(raw, dict) or "id" in raw:
            return raw
        kind = _kind_of(raw, ATTACHMENTS, own)
        return {**raw, "kind": kind, kind: self._definition(raw[kind], kind, f"{own}.{kind}", f"{canonical}.{kind}")}

    def _reference_or(self, raw: Any, own: str, canonical: str, alias: str, kinds: Iterable[str], of: Any) -> Any:
        """A reference in its canonical form, or `raw` without what does not count. Where an id stands beside a
        definition the id decides, and only the definition's kind is read."""
        self._places.moved(canonical, own)
        if isinstance(raw, int) and not isinstance(raw, bool):
            return {"id": raw}
        if not isinstance(raw, dict):
            return raw
        raw = _strip(_without_nulls(raw), of, keep="id")
        if alias in raw:
            raw.setdefault("id", raw[alias])
            if raw.pop(alias) != raw["id"]:
                raise Invalid(f"'id' and '{alias}' name different objects", path=f"{own}.{alias}")
        if "id" not in raw:
            return raw
        given = [kind for kind in kinds if kind in raw]
        named = raw.get("kind") or (given[0] if given else None)
        if any(kind != named for kind in given):
            raise Invalid(f"the kind is '{named}', but '{given[0]}' is defined", path=f"{own}.kind")
        rest = {name: value for name, value in raw.items() if name not in given}
        return {**rest, "kind": named} if named else rest

    def _definition(self, raw: Any, kind: str, own: str, canonical: str) -> Any:
        """The kind's own object."""
        if not isinstance(raw, dict):
            return raw
        if kind == "attach":
            return self._attach(raw, own, canonical)
        raw = _strip(_without_nulls(raw), {**MOUNTS, **ATTACHMENTS}[kind])
        if "mount" in raw:
            raw["mount"] = self.mount(raw["mount"], f"{own}.mount", f"{canonical}.mount")
        if isinstance(raw.get("lower"), list):
            raw["lower"] = [
                self.mount(one, f"{own}.lower[{at}]", f"{canonical}.lower[{at}]") for at, one in enumerate(raw["lower"])
            ]
        if "max_commands" in raw and kind == "iscsi":
            raw["max_comands"] = raw.pop("max_commands")
        if isinstance(raw.get("options"), dict):
            raw["options"] = _without_empty(_without_nulls(raw["options"]), tuple(raw["options"]))
        if isinstance(raw.get("chap"), dict):
            raw["chap"] = _without_nulls(raw["chap"])
        return raw

    def _attach(self, raw: Raw, own: str, canonical: str) -> Raw:
        raw = _strip(_without_nulls(raw), Attach)
        kind = raw.pop("kind", None)
        if "attach" in raw:
            inner = self.attachment(raw["attach"], f"{own}.attach", f"{canonical}.attach")
            raw["attach"] = self._agreeing(inner, kind, f"{own}.kind")
        return raw

    def _flat_attach(self, flat: Any, kind: str, own: str, canonical: str) -> Any:
        """The flat object of an attach-mount, which names its attachment by `<kind>_id` or holds it as `<kind>`."""
        if not isinstance(flat, dict):
            return flat
        flat = _strip(_without_nulls(flat), Mount)
        rest = {name: value for name, value in flat.items() if name not in ("id", "kind", kind, f"{kind}_id")}
        if flat.get("kind", kind) != kind:
            raise Invalid(f"the kind is '{flat['kind']}', but this is the mount of '{kind}'", path=f"{own}.kind")
        place = f"{canonical}.attach"
        if f"{kind}_id" in flat:
            self._places.moved(f"{place}.id", f"{own}.{kind}_id")
            return {**rest, "attach": {"id": flat[f"{kind}_id"], "kind": kind}}
        if kind not in flat:
            raise Invalid(_how_to_name(kind), path=own)
        self._places.moved(place, f"{own}.{kind}")
        return {**rest, "attach": self._flat_attachment(flat[kind], kind, f"{own}.{kind}", place)}

    def _flat_attachment(self, raw: Any, kind: str, own: str, canonical: str) -> Any:
        """An attachment whose kind is known from where it stands: a reference, or the kind's own object."""
        if isinstance(raw, int) and not isinstance(raw, bool):
            return {"id": raw, "kind": kind}
        if isinstance(raw, dict) and raw.get("id") is not None:
            return {"id": raw["id"], "kind": kind}
        self._places.moved(f"{canonical}.{kind}", own)
        if isinstance(raw, dict):
            raw = _strip(raw, Attachment)
        return {"kind": kind, kind: self._definition(raw, kind, own, f"{canonical}.{kind}")}

    @staticmethod
    def _agreeing(attachment: Any, kind: str | None, path: str) -> Any:
        """The attachment, of the kind that stands beside it, if one does."""
        if kind is None or not isinstance(attachment, dict):
            return attachment
        if attachment.setdefault("kind", kind) != kind:
            raise Invalid(f"the kind is '{kind}', but the attachment is a '{attachment['kind']}'", path=path)
        return attachment


def _kind_of(raw: Raw, kinds: dict[str, Any], own: str) -> str:
    """The kind whose definition `raw` holds.

    Raises: errors.Invalid when there is none, or more than one.
    """
    given = [kind for kind in kinds if kind in raw]
    kind = raw.get("kind", given[0] if len(given) == 1 else None)
    if kind is None:
        way = "with one kind only" if given else 'as a reference, {"id": n}, or as a definition, {"kind": K, K: {…}}'
        raise Invalid(f"give it {way}; the kinds are {', '.join(kinds)}", path=own)
    if not isinstance(kind, str) or kind not in kinds:
        raise Invalid(f"there is no kind '{kind}'{_nearest(str(kind), kinds)}", path=f"{own}.kind")
    if kind not in raw:
        raise Invalid(f"the kind is '{kind}', but '{kind}', which defines it, is missing", path=own)
    if len(given) > 1:
        other = next(one for one in given if one != kind)
        raise Invalid(f"the kind is '{kind}'; '{other}' does not belong here", path=f"{own}.{other}")
    return kind


def _how_to_name(kind: str) -> str:
    return f"name the attachment by '{kind}_id', or define it as '{kind}'"


def _without_nulls(raw: Raw) -> Raw:
    """`null` for an optional field is the same as leaving it out; so is an empty name or snapshot."""
    return _without_empty({name: value for name, value in raw.items() if value is not None}, EMPTY_IS_NONE)


def _without_empty(raw: Raw, names: Iterable[str]) -> Raw:
    return {name: value for name, value in raw.items() if value != "" or name not in names}


def _strip(raw: Raw, struct: Any, keep: str = "") -> Raw:
    """`raw` without the fields that only the server sets, which a client may send back."""
    ignored = spec.server_fields(struct)
    return {name: value for name, value in raw.items() if name not in ignored or name == keep}


def _name_of(value: object) -> str:
    names: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# --------------------------------------------------------------------------------------------------- checking

_AT = re.compile(r"^(.*?)(?: - at `(.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[[^\]]*\]")


_FORMS = {
    "name": "A name is 1 to 255 letters, digits, '.', '_' and '-', and neither . nor ..",
    "sha256": "A SHA-256 is 64 hexadecimal digits",
}
"""What to say of a field that is not of its form."""


def _convert(raw: Raw, target: Any) -> Any:
    """`raw` as a spec. Raises: errors.Invalid with the canonical path and a remedy."""
    try:
        return msgspec.convert(raw, target, dec_hook=spec.decode_hook)
    except msgspec.ValidationError as error:
        match = _AT.match(str(error))
        message, path = (match[1], match[2] or "$") if match else (str(error), "$")
        if unknown := _UNKNOWN.match(message):
            message = _unknown_field(unknown[1], target, path)
        elif "matching regex" in message:
            message = _FORMS.get(path.rpartition(".")[2], "It must not be empty or hold a NUL")
        raise Invalid(message[0].lower() + message[1:], path=path) from None


def _unknown_field(name: str, target: Any, path: str) -> str:
    struct = target
    for step in _STEP.finditer(path):
        if step[1] and struct is not None:
            struct = spec.struct_of(spec.hints(struct)[step[1]])
    known = [field for field in (struct or Spec).__struct_fields__ if field not in spec.server_fields(struct or Spec)]
    return f"there is no field '{name}' here{_nearest(name, known)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """What may have been meant, or all there is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(known)}"
