"""Reading: one container, and the list of many."""

from __future__ import annotations

import time

from tools.bench.client import Client, request
from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Figure, Target, described, interleave
from tools.bench.service import nest

MANY = 500
RESTED, ONE, ALL = "GET of one, after 10 ms of rest", "GET of one", f"GET of the list of {MANY}"


def figure(lab: Lab) -> Figure:
    create = request("POST", "/container", nest(lab.image, "/bin/stamp"))
    with lab.service() as (_, client):
        made = [client.ask(create).json()["id"] for _ in range(MANY)]
        one, every = request("GET", f"/container/{made[MANY // 2]}"), request("GET", "/container")
        asked = ((RESTED, one), (ALL, every), (ONE, one))
        rows = interleave(lab.rounds, {"imageapi": lambda: {name: _taken(client, sent) for name, sent in asked}})
        for container in made:
            client.ask(request("DELETE", f"/container/{container}"))
    described(rows, ONE, "", Target(0.4))
    described(rows, ALL, "", Target(4.0))
    return Figure(f"Reading, where there are {MANY} containers with a mount each", list(rows.values()))


def _taken(client: Client, sent: bytes) -> float:
    begun = time.monotonic_ns()
    client.ask(sent)
    return (time.monotonic_ns() - begun) / MILLISECOND
