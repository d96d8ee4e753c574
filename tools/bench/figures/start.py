"""A start on a root that is mounted already: ours, the bare system calls, and every other program's."""

from __future__ import annotations

import time
from typing import Any

from tools.bench.client import Client, request
from tools.bench.contestants import Limit, limit, peers
from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Figure, Target, described, interleave
from tools.bench.service import nest, stamps

OURS, LEAST = "PATCH until the first instruction", "C: the same system calls"


def figure(lab: Lab) -> Figure:
    with lab.service() as (_, client), limit(lab) as least:
        box = client.ask(request("POST", "/container", nest(lab.image, "/bin/stamp"))).json()
        contestants = {OURS: lambda: {OURS: _round(client, box)}, LEAST: lambda: {LEAST: _least(least)}}
        rows = interleave(lab.rounds, {**contestants, **peers(lab, box["mount"]["mountpoint"])})
        client.ask(request("DELETE", f"/container/{box['id']}"))
    for name in set(rows) - {LEAST}:
        described(rows, name, LEAST)
    described(rows, OURS, LEAST, Target(2.5))
    return Figure("A start on a mounted root, until the command's first instruction", list(rows.values()))


def _round(client: Client, box: Any) -> float:
    start = request("PATCH", f"/container?id={box['id']}&state=running")
    sent = time.monotonic_ns()
    client.ask(start)
    client.await_state(box["id"], "exited")
    return (stamps(box["logfile"])[-1] - sent) / MILLISECOND


def _least(least: Limit) -> float:
    moments = least.round("/bin/stamp")
    return moments["executed"] - moments["root"]
