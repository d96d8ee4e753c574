"""How far a verb that takes long has come, told to whoever listens: a download is late when it stands still, not when
it takes its time. The listener belongs to the context, so that a driver need not know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from imageapi.errors import Problem


class LeftOff(Problem):
    """Nobody waits for the end any more, so that it is not come to."""


class Progress(NamedTuple):
    """`step` is what is being done, in words that hold no secret; `done` and `total` are bytes, None where that is
    not known."""

    step: str
    done: int | None = None
    total: int | None = None

    def __str__(self) -> str:
        done = "" if self.done is None else f", {self.done} bytes"
        return f"{self.step}{done}{'' if self.total is None else f' of {self.total}'}"


Listener = Callable[[Progress], None]
_listener: ContextVar[Listener | None] = ContextVar("progress", default=None)


def tell(step: str, done: int | None = None, total: int | None = None) -> None:
    """Say how far it is: as often as one likes, but only when it has moved.

    Raises: LeftOff.
    """
    if (listener := _listener.get()) is not None:
        listener(Progress(step, done, total))


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Have `listener` called with all that is told within."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)
