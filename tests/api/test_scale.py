"""A thousand containers, and two hundred images: nothing takes longer for them, and nothing is left of them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from lab.processes import processes
from lab.server import FOREVER, Server, box, copy_of_small_image, eventually, image, kill
from tools.bench.client import Client, request

pytestmark = [pytest.mark.api, pytest.mark.quiet]

T = TypeVar("T")

AT_ONCE = 8
"""Clients that make and delete them."""
SAMPLE = 40
"""How many of the first and of the last are timed, one after another. The quickest counts: this machine may have others
to work for as well."""
LIST, RESTART = 0.01, 3.0
"""Seconds for a list, and for a start that takes up all there is."""
PATIENCE = 20.0
"""Seconds in which that must have been so once."""
EACH = 40
"""kB of memory that a container may cost our processes."""


class Crowd:
    """`count` containers, the n-th of which is what `body` says."""

    def __init__(self, server: Server, count: int, body: Callable[[int], dict[str, Any]]) -> None:
        self._server = server
        self._body = body
        self.numbers = range(count)

    def make(self, numbers: Iterable[int], at_once: int = 1) -> list[float]:
        """The seconds that each took."""
        return self._each(self._make, numbers, at_once)

    def delete(self, numbers: Iterable[int], at_once: int = 1) -> None:
        self._each(self._delete, numbers, at_once)

    def _each(self, work: Callable[[httpx.Client, int], T], numbers: Iterable[int], at_once: int) -> list[T]:
        with self._server.client() as http, ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(partial(work, http), numbers))

    def _make(self, http: httpx.Client, number: int) -> float:
        body = self._body(number)
        begun = time.monotonic()
        answer = http.post("/container", json=body)
        taken = time.monotonic() - begun
        assert answer.status_code == 201, answer.text
        return taken

    @staticmethod
    def _delete(http: httpx.Client, number: int) -> None:
        answer = http.delete(f"/container/byname/box-{number}?force=true")
        assert answer.status_code == 200, answer.text


def memory(server: Server) -> int:
    """The proportional share of all processes of ours, in kB, when no worker is left."""
    eventually(lambda: not {"imageapi-worker", "imageapi-audit"} & {*_ours(server).values()}, "workers have ended")
    return sum(map(_share, _ours(server)))


def _ours(server: Server) -> dict[int, str]:
    found = processes()
    ours = {server.pid, server.supervisor}
    for _ in range(2):  # the server's zygote, and its workers
        ours |= {one.pid for one in found.values() if one.parent in ours and one.name.startswith("imageapi-")}
    return {pid: found[pid].name for pid in ours}


def _share(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0
    return sum(map(int, re.findall(r"^Pss:\s+(\d+)", text, re.MULTILINE)))


def quickest(seconds: Callable[[], float], limit: float) -> float:
    """The least of what `seconds` returns, asked until it is within the limit, or PATIENCE is over."""
    deadline = time.monotonic() + PATIENCE
    best = seconds()
    while best > limit and time.monotonic() < deadline:
        best = min(best, seconds())
    return best


def timed(what: Callable[[], object]) -> float:
    """The seconds that it takes."""
    begun = time.monotonic()
    what()
    return time.monotonic() - begun


def restarted(server: Server, end: Callable[[Server], None]) -> float:
    """The seconds of a start after such an end."""
    end(server)
    return timed(server.start)


def kill_both(server: Server) -> None:
    supervisor = server.supervisor
    server.kill()
    kill(supervisor)


def check(server: Server, crowd: Crowd) -> None:
    """Make all, look at them, restart in three ways, and delete all."""
    first = crowd.make(crowd.numbers[:SAMPLE])
    before = memory(server)
    crowd.make(crowd.numbers[SAMPLE:-SAMPLE], AT_ONCE)
    assert min(crowd.make(crowd.numbers[-SAMPLE:])) <= 2 * min(first)
    for path in ("/container", "/mount", "/attach", "/container?name=box-1", "/container/byname/box-1"):
        with Client(server.socket) as client:
            assert quickest(partial(timed, partial(client.ask, request("GET", path))), LIST) <= LIST, path
    assert (memory(server) - before) / (len(crowd.numbers) - SAMPLE) <= EACH
    there = server.get("/container")
    for end in (Server.stop, Server.kill, kill_both):
        assert quickest(partial(restarted, server, end), RESTART) <= RESTART
        assert server.get("/container") == there
    crowd.delete(crowd.numbers, AT_ONCE)
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


def test_a_thousand_containers_on_one_image(server: Server) -> None:
    check(server, Crowd(server, 1000, lambda number: box(FOREVER, name=f"box-{number}")))


def test_two_hundred_images(server: Server, tmp_path: Path) -> None:
    def body(number: int) -> dict[str, Any]:
        file = image(path=str(tmp_path / f"{number}.sqsh"))
        lower = {"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": file}}
        root = {"kind": "overlay", "overlay": {"lower": [lower]}}
        return {"mount": root, "command": FOREVER, "state": "running", "name": f"box-{number}"}

    for number in range(200):
        copy_of_small_image(tmp_path, f"{number}.sqsh")
    check(server, Crowd(server, 200, body))
