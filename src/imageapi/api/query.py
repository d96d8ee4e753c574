"""The query of a request: each route says which parameters it knows; anything else is refused."""

from __future__ import annotations

from typing import get_args

from starlette.requests import Request

from imageapi import spec
from imageapi.api.dialects import ATTACHMENTS, MOUNT_KINDS
from imageapi.errors import Invalid

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
KINDS: dict[str, list[str]] = {"attach": list(ATTACHMENTS), "mount": list(MOUNT_KINDS)}


class Query:
    """The parameters of one request, of which only `known` may be there, each once."""

    def __init__(self, request: Request, *known: str) -> None:
        """Raises: errors.Invalid."""
        self._values: dict[str, str] = {}
        for name, value in request.query_params.multi_items():
            if name not in known:
                these = f"there are {', '.join(known)}" if known else "there are none here"
                raise Invalid(f"there is no query parameter '{name}'; {these}", path=f"?{name}")
            if name in self._values:
                raise Invalid(f"give the query parameter '{name}' once", path=f"?{name}")
            self._values[name] = value

    @property
    def id(self) -> int | None:
        """Raises: errors.Invalid when it is no number."""
        text = self._values.get("id")
        if text is None:
            return None
        if not is_number(text):
            raise Invalid(f"'{text}' is no id; give a number from 0", path="?id")
        return int(text)

    @property
    def name(self) -> str | None:
        return self._values.get("name")

    @property
    def force(self) -> bool:
        """Raises: errors.Invalid."""
        text = self._values.get("force", "false")
        if text not in BOOLEANS:
            raise Invalid(f"force is true, false, 1 or 0, not '{text}'", path="?force")
        return BOOLEANS[text]

    @property
    def state(self) -> str | None:
        """Raises: errors.Invalid when there is no such state."""
        text = self._values.get("state")
        states = get_args(spec.State)
        if text is not None and text not in states:
            raise Invalid(f"there is no state '{text}'; there are {', '.join(states)}", path="?state")
        return text

    def kind(self, collection: str) -> str | None:
        """Raises: errors.Invalid when the collection has no such kind."""
        text = self._values.get("kind")
        if text is not None and text not in KINDS[collection]:
            raise Invalid(f"there is no kind '{text}'; there are {', '.join(KINDS[collection])}", path="?kind")
        return text


def is_number(text: str) -> bool:
    """Whether `text` is digits and nothing else."""
    return text.isascii() and text.isdigit()
