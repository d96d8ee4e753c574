"""Mount options, looked at one by one before the kernel sees them: what a kind takes, and with which values, is a table
of its own; anything else is refused with its place in the request and the name that was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from imageapi.errors import Invalid
from imageapi.linux import mount

Values = range | tuple[str, ...] | re.Pattern[str] | None
"""What an option may be set to: a number, one of some words, a text of this form, or nothing at all (a flag)."""


class Option(NamedTuple):
    """One option. `form` says in words what a pattern wants; `refused`, why the option cannot be given, and what to do
    instead; `optional`: it may also stand without a value."""

    values: Values = None
    form: str = ""
    refused: str = ""
    optional: bool = False


class Given(NamedTuple):
    """An option of a request, and its place there."""

    name: str
    value: str | None
    path: str

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


DIVIDING = frozenset('",')
"""What no option's name may hold: mount(2) takes all options in one text, and divides it at commas, in quotes, too."""
DEVICES = Option(refused="device nodes of an image mean nothing here; leave it out")
"""Why `dev` is given to no file system."""


def read(options: Sequence[str], table: Mapping[str, Option], what: str, field: str) -> tuple[int, list[Given]]:
    """The MS_ flags among `options`, later ones winning, and the file system's own options, each of them in `table` and
    with a value it may have. `what` names the file system, and `field` is the JSON path of the list.

    Raises: errors.Invalid.
    """
    flags, own = mount.split_options(options)[0], []
    for each in _each(options, field):
        if each.name in table or mount.split_options([str(each)])[1]:
            check(each, table, what)
            own.append(each)
        elif each.name == "dev":
            _refuse(each, DEVICES.refused)
    _check_contradictions(own)
    return flags, own


def check(each: Given, table: Mapping[str, Option], what: str) -> None:
    """Raises: errors.Invalid, when the table has no such option, or not with this value. Its option `*` is any."""
    option = table.get(each.name, table.get("*"))
    if option is None or DIVIDING.intersection(each.name):
        _refuse(each, f"{what} has no such option{_meant(each.name, table)}")
    elif option.refused:
        _refuse(each, option.refused)
    elif wrong := _wrong_value(each.value, option):
        _refuse(each, wrong)


def too_long(field: str) -> Invalid:
    """The refusal of options that mount(2) does not take for their length."""
    sentence = "all options together are longer than the kernel takes, which is one page of memory; leave some out"
    return Invalid(sentence, path=field, errno="E2BIG")


def _each(options: Sequence[str], field: str) -> Iterator[Given]:
    for at, item in enumerate(options):
        for text in mount.at_commas(item):
            name, equals, value = text.partition("=")
            yield Given(name, value if equals else None, f"{field}[{at}]")


def _refuse(each: Given, reason: str) -> None:
    raise Invalid(f"option '{each}': {reason}", path=each.path)


def _meant(name: str, table: Mapping[str, Option]) -> str:
    """The nearest name, as the end of a sentence."""
    import difflib

    known = [known for known in (*table, *mount.FLAGS) if known not in table or not table[known].refused]
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _wrong_value(value: str | None, option: Option) -> str:
    """What is wrong with it; "" when it is right."""
    values = option.values
    if values is None or value is None:
        unexpected = values is None and value is not None
        missing = values is not None and value is None and not option.optional
        return "it takes no value" if unexpected else f"it needs a value: {_wanted(option)}" if missing else ""
    return "" if _fits(value, values) else f"its value must be {_wanted(option)}"


def _fits(value: str, values: range | tuple[str, ...] | re.Pattern[str]) -> bool:
    if isinstance(values, range):
        return value.isascii() and value.isdigit() and len(value) < 20 and int(value) in values
    return value in values if isinstance(values, tuple) else bool(values.fullmatch(value))


def _wanted(option: Option) -> str:
    values = option.values
    if isinstance(values, range):
        return f"a number from {values[0]} to {values[-1]}"
    return " or ".join(values) if isinstance(values, tuple) else option.form


def _check_contradictions(options: Sequence[Given]) -> None:
    """Raises: errors.Invalid for an option that stands beside its own opposite."""
    names = {each.name for each in options}
    for each in options:
        if f"no{each.name}" in names:
            _refuse(each, f"it contradicts 'no{each.name}'; leave one out")
