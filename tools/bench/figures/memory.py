"""Memory: of all our processes while nothing happens, and for each container that runs."""

from __future__ import annotations

import time

from tools.bench.client import Client, request
from tools.bench.lab import Lab
from tools.bench.measure import Figure, Row, Target
from tools.bench.service import clear, nest

FEW, CONTAINERS = 20, 200
SETTLED = 4.0
"""Seconds after which the server has come to rest: idle workers have ended."""
OWN = "Pss_Anon"
"""What a container makes grow. How many of the pages of programs are in use just then changes by more than that."""


def figure(lab: Lab) -> Figure:
    with lab.service() as (service, client):
        _run(client, lab, FEW)
        clear(client)
        time.sleep(SETTLED)
        idle, before = service.memory(), service.memory(OWN)
        _run(client, lab, CONTAINERS)
        time.sleep(SETTLED)
        more = sum(service.memory(OWN).values()) - sum(before.values())
        clear(client)
    rows = [
        Row("idle, after a few containers", [sum(idle.values()) / 1000], "MB", targets=[Target(32.0)]),
        Row(f"for each of {CONTAINERS} running containers", [more / CONTAINERS], "kB", targets=[Target(40.0)]),
    ]
    each = {name: [used / 1000] for name, used in idle.items()}
    title = "Memory of all our processes (PSS); what containers use themselves is not ours"
    return Figure(title, rows, {"each process when idle (MB)": each})


def _run(client: Client, lab: Lab, containers: int) -> None:
    create = request("POST", "/container", nest(lab.image, "/bin/wait", state="running"))
    for _ in range(containers):
        client.ask(create)
