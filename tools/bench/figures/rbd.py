"""An RBD image attached by the storage daemon, from a real Ceph on loopback."""

from __future__ import annotations

import time
from typing import Any

from lab.ceph import Cluster
from tools.bench.client import Client, request
from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Figure, Row, Target
from tools.bench.service import clear

ROUNDS = 20
ATTACHED = 20
AS_FAST = 1.1
"""Times the time alone: what runs of the same differ by."""


def figure(lab: Lab) -> Figure:
    alone = Row("POST with none attached", targets=[Target(45.0)])
    crowded = Row(f"POST with {ATTACHED} attached", targets=[Target(AS_FAST, ratio=True)], against=alone.name)
    with Cluster().running() as ceph, lab.service("--rbd-backend", "daemon") as (_, client):
        ceph.import_image(str(lab.image), "image.sqsh")
        attach = request("POST", "/attach/rbd", _definition(ceph))
        alone.values = _rounds(client, attach, ROUNDS // 2)
        for _ in range(ATTACHED):
            client.ask(attach)
        crowded.values = _rounds(client, attach, ROUNDS)
        clear(client)
        alone.values += _rounds(client, attach, ROUNDS // 2)  # before and after: the machine has its moods
    return Figure("Attach an RBD image by the storage daemon", [alone, crowded])


def _definition(ceph: Cluster) -> dict[str, Any]:
    options = {"name": "admin", "secret": ceph.admin_key, "ro": True}
    return {"monitors": [ceph.monitor], "pool": "rbd", "image": "image.sqsh", "options": options}


def _rounds(client: Client, attach: bytes, number: int) -> list[float]:
    return [_round(client, attach) for _ in range(number)]


def _round(client: Client, attach: bytes) -> float:
    sent = time.monotonic_ns()
    made = client.ask(attach).json()
    taken = time.monotonic_ns() - sent
    client.ask(request("DELETE", f"/attach/rbd/{made['id']}"))
    return taken / MILLISECOND
