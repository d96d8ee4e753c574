"""From the execution of the server to its first answer."""

from __future__ import annotations

from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Figure, Row, Target

ROUNDS = 10


def figure(lab: Lab) -> Figure:
    row = Row("execve until the first answer", targets=[Target(250.0)])
    for _ in range(ROUNDS):
        row.values.append(_round(lab))
    return Figure("Cold start, in an empty run directory", [row])


def _round(lab: Lab) -> float:
    with lab.service() as (service, _):
        return (service.answered - service.started) / MILLISECOND
