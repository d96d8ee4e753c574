"""The end of a container whose command ends at once when it is asked to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tools.bench.client import Client, Refused, request
from tools.bench.contestants import Limit, limit
from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Figure, Target, described, interleave
from tools.bench.service import await_stamps, nest, stamps

ASKED, ENDED = "PATCH exited until `exited` is read", "end of the process until `exited` is read"
LEAST = "C: SIGTERM until waitid(2) returns"


def figure(lab: Lab) -> Figure:
    with lab.service() as (_, client), limit(lab) as least:
        box = client.ask(request("POST", "/container", nest(lab.image, "/bin/wait"))).json()
        contestants = {"imageapi": lambda: _round(client, box), "limit": lambda: {LEAST: _least(least)}}
        rows = interleave(lab.rounds, contestants)
        client.ask(request("DELETE", f"/container/{box['id']}"))
    described(rows, ASKED, LEAST)
    described(rows, ENDED, LEAST, Target(3.0))
    return Figure("The end of a container that ends at SIGTERM", list(rows.values()))


def _round(client: Client, box: Any) -> dict[str, float]:
    before = len(stamps(box["logfile"]))
    pid = client.ask(request("PATCH", f"/container?id={box['id']}&state=running")).json()["pid"]
    await_stamps(box["logfile"], before + 1)
    stop = request("PATCH", f"/container?id={box['id']}&state=exited")
    sent = time.monotonic_ns()
    client.ask(stop)
    client.await_state(box["id"], "exited")
    read = time.monotonic_ns()
    if Path(f"/proc/{pid}").exists():
        raise Refused(f"process {pid} is still there when its container is exited")
    ended = await_stamps(box["logfile"], before + 2)[-1]
    return {ASKED: (read - sent) / MILLISECOND, ENDED: (read - ended) / MILLISECOND}


def _least(least: Limit) -> float:
    moments = least.round("/bin/wait")
    return moments["ended"] - moments["asked"]
