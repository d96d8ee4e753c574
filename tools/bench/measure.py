"""Values, what is said of them, and contestants that take turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

PAUSE = 0.01
"""Seconds before each turn, in which what the one before has left running may end."""
MILLISECOND = 1e6
"""Nanoseconds."""

Contestant = Callable[[], Mapping[str, float]]
"""Makes one round: the name of each row it is about, and the value."""


class Unable(Exception):
    """A contestant that does not run on this machine; the text is its own words."""


class Target(msgspec.Struct, frozen=True):
    """What a row's median should be: at most `bound`, or at least. With `ratio` its ratio to the row it is against."""

    bound: float
    at_least: bool = False
    ratio: bool = False

    def missed_by(self, value: float) -> float:
        """The part of the bound that is missing; 0 when it is met."""
        over = (self.bound - value) if self.at_least else (value - self.bound)
        return max(0.0, over / self.bound)


class Row(msgspec.Struct):
    """One thing measured several times. `against` names the row of the same figure that it is a multiple of; `error` is
    why there are no values."""

    name: str
    values: list[float] = []
    unit: str = "ms"
    against: str = ""
    targets: list[Target] = []
    error: str = ""


class Figure(msgspec.Struct):
    """What one function of `figures/` has found. `stages` says where the time of it went: for each account of it the
    milliseconds of each stage, in their order."""

    title: str
    rows: list[Row]
    stages: dict[str, dict[str, list[float]]] = {}


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that is not exceeded by `part` of them (nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * part) - 1)]


def ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """The row's median as a multiple of that of the row it is against; None when either has none."""
    other = next((each for each in rows if each.name == row.against and each.values), None)
    return statistics.median(row.values) / statistics.median(other.values) if other and row.values else None


def interleave(rounds: int, contestants: Mapping[str, Contestant]) -> dict[str, Row]:
    """Each contestant in turn, `rounds` times: the rows by name. The first round of each is not counted.

    A contestant that is unable gets a row of its own name that says so. Any other exception is the figure's failure.
    """
    rows: dict[str, Row] = {}
    able = {name: each for name, each in contestants.items() if _warm(name, each, rows)}
    for _ in range(rounds):
        for contestant in able.values():
            time.sleep(PAUSE)
            for name, value in contestant().items():
                rows.setdefault(name, Row(name)).values.append(value)
    return rows


def _warm(name: str, contestant: Contestant, rows: dict[str, Row]) -> bool:
    try:
        contestant()
    except Unable as error:
        rows[name] = Row(name, error=str(error))
        return False
    return True


def described(rows: dict[str, Row], name: str, against: str = "", *targets: Target) -> None:
    """Say of the row what it is compared with."""
    rows[name].against, rows[name].targets = against, list(targets)
