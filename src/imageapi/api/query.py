"""The query of a request: each route says which parameters it knows; anything else is refused."""

from __future__ import annotations

import re
from typing import get_args

from imageapi import spec
from imageapi.api.complaints import shortened
from imageapi.api.dialects import KINDS
from imageapi.api.request import Request
from imageapi.errors import Invalid

DIGITS = re.compile(r"[0-9]+")
BEYOND = 10**18
"""No id is as large. What is longer counts as this: int() refuses 4,300 digits and more."""
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def number(text: str) -> int:
    """The id written in `text`, which is digits."""
    return int(text) if len(text.lstrip("0")) < len(str(BEYOND)) else BEYOND


class Query:
    """The parameters of one request, of which only `known` may be there, each once."""

    def __init__(self, request: Request, *known: str) -> None:
        """Raises: errors.Invalid."""
        self._values: dict[str, str] = {}
        for name, value in request.query():
            named = shortened(name)
            if name not in known:
                these = f"there are {', '.join(known)}" if known else "there are none here"
                raise Invalid(f"there is no query parameter '{named}'; {these}", path=f"?{named}")
            if name in self._values:
                raise Invalid(f"give the query parameter '{named}' once", path=f"?{named}")
            self._values[name] = value

    @property
    def id(self) -> int | None:
        """Raises: errors.Invalid when it is no number."""
        text = self._values.get("id")
        if text is not None and not DIGITS.fullmatch(text):
            raise Invalid(f"'{shortened(text)}' is no id; give a number from 0", path="?id")
        return None if text is None else number(text)

    @property
    def name(self) -> str | None:
        return self._values.get("name")

    @property
    def force(self) -> bool:
        """Raises: errors.Invalid."""
        text = self._values.get("force", "false")
        if text not in BOOLEANS:
            raise Invalid(f"force is true, false, 1 or 0, not '{shortened(text)}'", path="?force")
        return BOOLEANS[text]

    @property
    def state(self) -> str | None:
        """Raises: errors.Invalid when there is no such state."""
        return self._one_of("state", list(get_args(spec.State)))

    def kind(self, collection: str) -> str | None:
        """Raises: errors.Invalid when the collection has no such kind."""
        return self._one_of("kind", list(KINDS[spec.COLLECTIONS[collection]]))

    def _one_of(self, name: str, known: list[str]) -> str | None:
        text = self._values.get(name)
        if text is not None and text not in known:
            raise Invalid(f"there is no {name} '{shortened(text)}'; there are {', '.join(known)}", path=f"?{name}")
        return text
