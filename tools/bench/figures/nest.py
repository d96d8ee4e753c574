"""A nest from one POST to its first instruction, and gone after one DELETE."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tools.bench.client import Client, request
from tools.bench.contestants import Limit, limit
from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Figure, Target, described, interleave
from tools.bench.service import nest, stamps

FIRST, ANSWER, GONE = "POST until the first instruction", "POST until its answer", "DELETE until its answer"
LEAST, LEAST_GONE = "C: the same system calls", "C: unmount and detach"

Stages = dict[str, list[float]]


def figure(lab: Lab) -> Figure:
    told: Stages = {}
    needed: Stages = {}
    create = request("POST", "/container", nest(lab.image, "/bin/stamp", state="running"))
    with lab.service() as (_, client), limit(lab) as least:
        contestants = {"imageapi": lambda: _round(client, create, told), "limit": lambda: _least(least, needed)}
        rows = interleave(lab.rounds, contestants)
    described(rows, FIRST, LEAST, Target(5.0), Target(4.0, ratio=True))
    described(rows, ANSWER, LEAST, Target(6.0))
    described(rows, GONE, LEAST_GONE, Target(3.0))
    stages = {"the server's stages until its answer, by Server-Timing (ms)": told, "C's stages (ms)": needed}
    return Figure("A container on an overlay on squashfs on a loop device", list(rows.values()), stages)


def _round(client: Client, create: bytes, told: Stages) -> dict[str, float]:
    sent = time.monotonic_ns()
    answer = client.ask(create)
    answered = time.monotonic_ns()
    _add(told, answer.stages())
    box = answer.json()
    client.await_state(box["id"], "exited")
    times = (stamps(box["logfile"])[0] - sent, answered - sent, _delete(client, box["id"]))
    return {name: taken / MILLISECOND for name, taken in zip((FIRST, ANSWER, GONE), times, strict=True)}


def _delete(client: Client, container: int) -> int:
    delete = request("DELETE", f"/container/{container}")
    sent = time.monotonic_ns()
    client.ask(delete)
    return time.monotonic_ns() - sent


def _least(least: Limit, needed: Stages) -> dict[str, float]:
    moments = least.round("/bin/stamp")
    ends = list(moments.values())
    _add(needed, {name: end - begun for name, begun, end in zip(moments, [0.0, *ends], ends, strict=False)})
    return {LEAST: moments["executed"], LEAST_GONE: moments["detached"] - moments["ended"]}


def _add(stages: Stages, round: Mapping[str, float]) -> None:
    for name, taken in round.items():
        stages.setdefault(name, []).append(taken)
