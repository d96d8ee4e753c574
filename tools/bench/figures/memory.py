"""Memory: of all our processes while nothing happens, and for each container that runs."""

from __future__ import annotations

import time

from tools.bench.client import Client, request
from tools.bench.lab import Lab
from tools.bench.measure import Figure, Row, Target
from tools.bench.service import Service, clear, nest

CONTAINERS = 200
SETTLED = 4.0
"""Seconds after which the server has come to rest: idle workers have ended."""


def figure(lab: Lab) -> Figure:
    with lab.service() as (service, client):
        idle = _used_and_idle(service, client, lab)
        full = _memory(service, lab, client, CONTAINERS)
        clear(client)
    each = Row(f"for each of {CONTAINERS} running containers", [(full - idle) / CONTAINERS], "kB", "", [Target(40.0)])
    return Figure(
        "Memory of all our processes (PSS); what containers use themselves is not ours",
        [Row("idle, after a few containers", [idle / 1000], "MB", targets=[Target(32.0)]), each],
    )


def _used_and_idle(service: Service, client: Client, lab: Lab) -> float:
    """kB when everything has been used once, and is gone."""
    _run(client, lab, 20)
    clear(client)
    return _settled(service)


def _memory(service: Service, lab: Lab, client: Client, containers: int) -> float:
    _run(client, lab, containers)
    return _settled(service)


def _run(client: Client, lab: Lab, containers: int) -> None:
    create = request("POST", "/container", nest(lab.image, "/bin/wait", state="running"))
    for _ in range(containers):
        client.ask(create)


def _settled(service: Service) -> float:
    time.sleep(SETTLED)
    return service.memory()
