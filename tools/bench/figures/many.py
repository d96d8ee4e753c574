"""Whether the thousandth container starts as fast as the first."""

from __future__ import annotations

import time

from tools.bench.client import Client, request
from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Figure, Row, Target
from tools.bench.service import await_stamps, clear, nest

MANY = 1000
AROUND = 20
"""How many starts are looked at."""


def figure(lab: Lab) -> Figure:
    create = request("POST", "/container", nest(lab.image, "/bin/wait", state="running"))
    with lab.service() as (_, client):
        _start(client, create)
        taken = [_start(client, create) for _ in range(MANY)]
        clear(client)
    first = Row(f"the first {AROUND}", taken[:AROUND])
    last = Row(f"the {AROUND} up to the {MANY}th", taken[-AROUND:], targets=[Target(1.5, ratio=True)])
    last.against = first.name
    return Figure("Starts (POST until the first instruction) while the others run on", [first, last])


def _start(client: Client, create: bytes) -> float:
    sent = time.monotonic_ns()
    box = client.ask(create).json()
    return (await_stamps(box["logfile"], 1)[0] - sent) / MILLISECOND
