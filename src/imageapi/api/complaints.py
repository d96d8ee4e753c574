"""What msgspec complains about in a request, said so that the user knows what to send.

A complaint of msgspec is a message and the path of the object it is about; ours names the field itself, what it may
be, and for a field that does not exist the nearest that does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args, get_origin

import msgspec

from imageapi import spec
from imageapi.errors import Invalid, NotFound
from imageapi.spec import Container, Mount, Tmpfs, Uri

FIELDS: dict[tuple[type, str], str] = {
    (Container, "name"): "a name is 1 to 255 letters, digits, dots, dashes and underscores, and neither '.' nor '..'",
    (Container, "state"): "a new container is 'created' or 'running'",
    (Tmpfs, "size"): "a size is a number of bytes, or one with K, M, G, T or %: 512M, 2G, 10%",
    (Uri, "sha256"): "a SHA-256 is 64 hexadecimal digits",
}
"""What the values of some fields must be, where the type would say it badly."""

TYPES = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
"""JSON's types by msgspec's names."""


class Place(NamedTuple):
    """Where a complaint points: the struct it is about, and the annotation of what stands there."""

    struct: Any
    field: str
    hint: Any


def convert(raw: Any, target: Any) -> Any:
    """`raw` as a spec.

    Raises: errors.Invalid with the canonical path; errors.NotFound for an id that no object can have.
    """
    try:
        return msgspec.convert(raw, target, dec_hook=spec.decode_hook)
    except msgspec.ValidationError as error:
        message, path = _taken_apart(str(error), raw, target)
        place = find(target, path)
        if place.field == "id" and _TOO_LARGE.fullmatch(message):
            raise NotFound(f"there is no {place.struct.COLLECTION} with such an id", path=path) from None
        for pattern, say in SAYINGS:
            if match := pattern.fullmatch(message):
                said, step = say(match, place)
                raise Invalid(said, path=path + step) from None
        raise Invalid(message[:1].lower() + message[1:], path=path) from None


def _taken_apart(complaint: str, raw: Any, target: Any) -> tuple[str, str]:
    """The message, and the path, which ends a complaint about anything but the whole. A field of the whole has the name
    that the client chose, which may read like a path."""
    unknown = set(raw).difference(target.__struct_fields__) if isinstance(raw, dict) else set()
    message, at, path = complaint.rpartition(" - at `")
    if not at or any(complaint == f"Object contains unknown field `{name}`" for name in unknown):
        return complaint, "$"
    return message, path.removesuffix("`")


_TOO_LARGE = re.compile(r"Expected `int` <= \d+")
_STEP = re.compile(r"\.([A-Za-z_]\w*)")


def find(target: Any, path: str) -> Place:
    """What stands at a canonical path of the spec `target`."""
    place = Place(None, "", target)
    for step in _STEP.finditer(path):
        struct = spec.struct_of(place.hint)
        place = Place(struct, step[1], spec.hints(struct)[step[1]])
    return place


# ------------------------------------------------------------------------------------------------- the sayings


Saying = Callable[[re.Match[str], Place], tuple[str, str]]
"""From a complaint to our sentence, and the step from the path to the field it is about."""


def unknown(name: str, known: Iterable[str]) -> str:
    """The sentence for a field that does not exist among those that do."""
    return f"there is no field '{shortened(name)}' here{nearest(name, known)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """What may have been meant, and all there is."""
    import difflib  # here, as most servers never need it

    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{meant} there are {', '.join(known)}"


def name_of(value: Any) -> str:
    """What a JSON value is."""
    names: dict[type, str] = {list: "an array", dict: "an object", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def shortened(text: str) -> str:
    """What a message repeats of a request: enough to be recognised."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def known_fields(struct: Any) -> list[str]:
    """The fields that a request may have, by either dialect's names."""
    own = [field for field in struct.__struct_fields__ if field not in spec.server_fields(struct)]
    return own + list(spec.kinds(spec.Attachment)) if struct is Mount else own


def _unknown(match: re.Match[str], place: Place) -> tuple[str, str]:
    return unknown(match[1], known_fields(spec.struct_of(place.hint))), f".{match[1]}"


def _missing(match: re.Match[str], place: Place) -> tuple[str, str]:
    return f"the field '{match[1]}' is missing", f".{match[1]}"


def _wrong_type(match: re.Match[str], place: Place) -> tuple[str, str]:
    wanted = [TYPES.get(name, name) for name in match[1].split(" | ") if name != "null"]
    return f"this must be {' or '.join(wanted)}, not {TYPES.get(match[2], match[2])}", ""


def _wrong_value(match: re.Match[str], place: Place) -> tuple[str, str]:
    if known := FIELDS.get((place.struct, place.field)):
        return known, ""
    return f"'{shortened(match[1])}' is not one of {', '.join(choices(place.hint))}", ""


def _wrong_form(match: re.Match[str], place: Place) -> tuple[str, str]:
    return FIELDS.get((place.struct, place.field), "this must not hold a NUL"), ""


def _too_short(match: re.Match[str], place: Place) -> tuple[str, str]:
    return ("give at least one" if match[1] == "array" else "this must not be empty"), ""


def _too_long(match: re.Match[str], place: Place) -> tuple[str, str]:
    return f"this is longer than {match[1]}", ""


def _out_of_range(match: re.Match[str], place: Place) -> tuple[str, str]:
    return f"this must be {match[2]} or {'more' if match[1] == '>=' else 'less'}", ""


def choices(hint: Any) -> list[str]:
    """The strings that a field may be, where only some are."""
    found = list(get_args(hint)) if get_origin(hint) is Literal else []
    return [str(one) for one in found] or [one for inner in get_args(hint) for one in choices(inner)]


SAYINGS: list[tuple[re.Pattern[str], Saying]] = [
    (re.compile(r"Object contains unknown field `(.*)`", re.DOTALL), _unknown),
    (re.compile(r"Object missing required field `(.*)`"), _missing),
    (re.compile(r"Expected `([^`]*)`, got `([^`]*)`"), _wrong_type),
    (re.compile(r"Invalid enum value '(.*)'", re.DOTALL), _wrong_value),
    (re.compile(r"Expected `str` matching regex '(.*)'"), _wrong_form),
    (re.compile(r"Expected `(str|array)` of length >= 1"), _too_short),
    (re.compile(r"Expected `\w+` of length <= (\d+)"), _too_long),
    (re.compile(r"Expected `int` (>=|<=) (-?\d+)"), _out_of_range),
]
