"""An RBD image through the kernel's driver, and a container on it: in the guest, whose kernel has the driver.

The guest is emulated, so the values are for comparison with those of another day, not with other figures.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Figure, Row

if TYPE_CHECKING:  # they need what only the tests do: other figures do without
    from lab.ceph import Cluster
    from lab.guest.server import GuestServer

ROUNDS = 20
FIRST = "POST until the first instruction, a container on it"
OPTIONS: dict[str, dict[str, Any]] = {"messenger 1": {}, "messenger 2, secure": {"ms_mode": "secure"}}


def figure(lab: Lab) -> Figure:
    rows: dict[str, Row] = {}
    with _served(lab) as (server, ceph):
        ceph.import_image(str(lab.image), "image.sqsh")
        for name, more in OPTIONS.items():
            definition = _definition(ceph, more)
            _round(rows, name, server, "/attach/rbd", definition)
        below = {"fs_type": "squashfs", "mount_options": ["ro"], "rbd": _definition(ceph, {})}
        mount = {"kind": "overlay", "overlay": {"lower": [{"kind": "rbd", "rbd": below}]}}
        box = {"command": "/bin/stamp", "state": "running", "mount": mount}
        rows[FIRST] = Row(FIRST, _until_first_instruction(server, box))
        _round(rows, "a container on it", server, "/container", {**box, "command": "/bin/wait"}, "?force=true")
    return Figure("Attach an RBD image through the kernel, in the emulated guest", list(rows.values()))


@contextlib.contextmanager
def _served(lab: Lab) -> Iterator[tuple[GuestServer, Cluster]]:
    """A guest in which the server runs, and a cluster that it reaches."""
    from lab.ceph import Cluster
    from lab.guest.guest import restored
    from lab.guest.network import SERVER, network
    from lab.guest.server import GuestServer
    from lab.guest.state import booted

    with (
        network() as own,
        Cluster(str(lab.directory("ceph")), SERVER, enter=own.enter).running() as ceph,
        restored(booted(), own, lab.directory("guest")) as guest,
    ):
        server = GuestServer(guest)
        server.start()
        yield server, ceph
        server.remove()


def _definition(ceph: Cluster, more: dict[str, Any]) -> dict[str, Any]:
    options = {"name": "admin", "secret": ceph.admin_key, "ro": True, **more}
    return {"monitors": [ceph.monitor], "pool": "rbd", "image": "image.sqsh", "options": options}


def _round(rows: dict[str, Row], name: str, server: GuestServer, path: str, body: Any, how: str = "") -> None:
    """The first round is not counted."""
    made = rows[f"POST, {name}"] = Row(f"POST, {name}")
    gone = rows[f"DELETE, {name}"] = Row(f"DELETE, {name}")
    for _ in range(ROUNDS + 1):
        taken, answer = _timed(lambda: server.post(path, body))
        made.values.append(taken)
        taken, _ = _timed(lambda: server.delete(f"{path}/{answer['id']}{how}"))  # noqa: B023 - called at once
        gone.values.append(taken)
    del made.values[0], gone.values[0]


def _until_first_instruction(server: GuestServer, box: Any) -> list[float]:
    """Measured in the guest. The first round is not counted."""
    from lab.guest.server import RUN_DIR

    command = ("python3", "-m", "tools.bench.within", f"{RUN_DIR}/api.sock", str(ROUNDS + 1))
    told = server.guest.run("env", "PYTHONPATH=/imageapi", *command, stdin=json.dumps(box))
    return [int(line) / MILLISECOND for line in told.splitlines()][1:]


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.monotonic_ns()
    answer = function()
    return (time.monotonic_ns() - begun) / MILLISECOND, answer
