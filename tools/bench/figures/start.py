"""A start on a root that is mounted already: ours, the bare system calls, and every other program's.

A turn of all takes 0.2 s, after which our processes are out of the processor's caches; so what is called "again" was
measured with nobody but the bare system calls in between.
"""

from __future__ import annotations

import time
from typing import Any

from tools.bench.client import Client, request
from tools.bench.contestants import Limit, limit, peers
from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Contestant, Figure, Target, described, interleave
from tools.bench.service import nest, stamps

OURS, LEAST = "PATCH until the first instruction", "C: the same system calls"
SOON = ", again"


def figure(lab: Lab) -> Figure:
    with lab.service() as (_, client), limit(lab) as least:
        box = client.ask(request("POST", "/container", nest(lab.image, "/bin/stamp"))).json()
        rows = interleave(lab.rounds, _both(client, box, least, SOON))
        others = peers(lab, box["mount"]["mountpoint"])
        rows |= interleave(lab.rounds, {**_both(client, box, least, ""), **others})
        client.ask(request("DELETE", f"/container/{box['id']}"))
    for name in others:
        described(rows, name, LEAST)
    for when in "", SOON:
        described(rows, OURS + when, LEAST + when, Target(2.5))
    return Figure("A start on a mounted root, until the command's first instruction", list(rows.values()))


def _both(client: Client, box: Any, least: Limit, when: str) -> dict[str, Contestant]:
    return {
        OURS + when: lambda: {OURS + when: _round(client, box)},
        LEAST + when: lambda: {LEAST + when: _least(least)},
    }


def _round(client: Client, box: Any) -> float:
    start = request("PATCH", f"/container?id={box['id']}&state=running")
    sent = time.monotonic_ns()
    client.ask(start)
    client.await_state(box["id"], "exited")
    return (stamps(box["logfile"])[-1] - sent) / MILLISECOND


def _least(least: Limit) -> float:
    moments = least.round("/bin/stamp")
    return moments["executed"] - moments["root"]
