"""Whole lives of containers, one after the other and eight at a time."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

from tools.bench.client import Client, Refused, request
from tools.bench.lab import Lab
from tools.bench.measure import Figure, Row, Target
from tools.bench.service import nest

SECONDS = 2.0
"""How long one measurement goes on."""
TIMES = 3
CLIENTS = 8
PAUSE = 0.001
"""Seconds between two questions whether a container has exited: what the clients ask should not be what is measured."""


def figure(lab: Lab) -> Figure:
    one = Row("one client", unit="/s", targets=[Target(120.0, at_least=True)])
    many = Row(f"{CLIENTS} clients", unit="/s", targets=[Target(200.0, at_least=True)])
    with lab.service() as (service, _):
        for row, clients in (one, 1), (many, CLIENTS):
            for _ in range(TIMES):
                row.values.append(_rate(service.socket, lab.image, clients))
    return Figure("Create, start, first instruction, exit, delete: cycles a second", [one, many])


def _rate(socket: Path, image: Path, clients: int) -> float:
    """Cycles a second of so many clients, each a process of its own.

    Raises: Refused, with the first error of a client and the number of them.
    """
    with multiprocessing.get_context("fork").Pool(clients) as pool:
        told = pool.starmap(_client, [(socket, image)] * clients, chunksize=1)
    if errors := [error for _, error in told if error]:
        raise Refused(f"{len(errors)} of {clients} clients failed, the first with: {errors[0]}")
    return sum(rate for rate, _ in told)


def _client(socket: Path, image: Path) -> tuple[float, str]:
    """The rate of one client, and what went wrong with it."""
    create = request("POST", "/container", nest(image, "/bin/stamp", state="running"))
    done, begun = 0, time.monotonic()
    try:
        with Client(socket) as client:
            while (taken := time.monotonic() - begun) < SECONDS:
                _cycle(client, create)
                done += 1
    except (Refused, OSError) as error:
        return 0.0, str(error)
    return done / taken, ""


def _cycle(client: Client, create: bytes) -> None:
    box: Any = client.ask(create).json()
    client.await_state(box["id"], "exited", PAUSE)
    client.ask(request("DELETE", f"/container/{box['id']}"))
