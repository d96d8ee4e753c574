"""Where the time of a request goes: each stage as it ends, to be told in the header Server-Timing (W3C Server Timing).

The stages belong to the request's context, and with it to every task begun for it.
"""

from __future__ import annotations

import time
from contextvars import ContextVar

_NANOSECONDS = 1e6
"""In a millisecond, the header's unit."""


class Stages:
    """The stages of one request so far."""

    def __init__(self) -> None:
        self._last = time.monotonic_ns()
        self._ended: list[tuple[str, int]] = []

    def end(self, name: str) -> None:
        """What was done since the last stage was the stage `name`."""
        now = time.monotonic_ns()
        self._ended.append((name, now - self._last))
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{name};dur={taken / _NANOSECONDS:.3f}" for name, taken in self._ended)


_current: ContextVar[Stages | None] = ContextVar("stages", default=None)


def begin() -> Stages:
    """From now on the stages of this context are counted."""
    stages = Stages()
    _current.set(stages)
    return stages


def end(name: str) -> None:
    """A stage has ended, if anybody wants to know."""
    if (stages := _current.get()) is not None:
        stages.end(name)
