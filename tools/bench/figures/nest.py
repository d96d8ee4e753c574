"""A nest from one POST to its first instruction, and gone after one DELETE."""

from __future__ import annotations

import time

from tools.bench.client import Client, request
from tools.bench.contestants import Limit, limit
from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Figure, Target, described, interleave
from tools.bench.service import nest, stamps

FIRST, ANSWER, GONE = "POST until the first instruction", "POST until its answer", "DELETE until its answer"
LEAST, LEAST_GONE = "C: the same system calls", "C: unmount and detach"


def figure(lab: Lab) -> Figure:
    stages: dict[str, list[float]] = {}
    create = request("POST", "/container", nest(lab.image, "/bin/stamp", state="running"))
    with lab.service() as (_, client), limit(lab) as least:
        contestants = {"imageapi": lambda: _round(client, create, stages), "limit": lambda: _least(least)}
        rows = interleave(lab.rounds, contestants)
    described(rows, FIRST, LEAST, Target(5.0), Target(4.0, ratio=True))
    described(rows, ANSWER, LEAST, Target(6.0))
    described(rows, GONE, LEAST_GONE, Target(3.0))
    return Figure("A container on an overlay on squashfs on a loop device", list(rows.values()), stages)


def _round(client: Client, create: bytes, stages: dict[str, list[float]]) -> dict[str, float]:
    sent = time.monotonic_ns()
    answer = client.ask(create)
    answered = time.monotonic_ns()
    for name, taken in answer.stages().items():
        stages.setdefault(name, []).append(taken)
    box = answer.json()
    client.await_state(box["id"], "exited")
    times = (stamps(box["logfile"])[0] - sent, answered - sent, _delete(client, box["id"]))
    return {name: taken / MILLISECOND for name, taken in zip((FIRST, ANSWER, GONE), times, strict=True)}


def _delete(client: Client, container: int) -> int:
    delete = request("DELETE", f"/container/{container}")
    sent = time.monotonic_ns()
    client.ask(delete)
    return time.monotonic_ns() - sent


def _least(least: Limit) -> dict[str, float]:
    moments = least.round("/bin/stamp")
    return {LEAST: moments["executed"], LEAST_GONE: moments["detached"] - moments["ended"]}
