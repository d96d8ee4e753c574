"""A call into the kernel that does not come back: its request ends in time, and it is undone when it does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.processes import processes
from lab.server import FOREVER, Server, box, eventually, image, running

pytestmark = pytest.mark.api


@pytest.fixture
def hasty(run_dir: Path) -> Iterator[Server]:
    """A server that waits 300 ms for a step."""
    with running(run_dir, "--operation-timeout", "300ms") as server:
        yield server


@contextmanager
def hanging(server: Server) -> Iterator[None]:
    """The workers stop wherever they are, as in a call that does not return."""
    zygote = next(one.pid for one in processes().values() if one.parent == server.pid)
    workers = [one.pid for one in processes().values() if one.parent == zygote and one.name == "imageapi-worker"]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)


def test_a_create_that_hangs_is_504_and_undone_when_it_returns(hasty: Server) -> None:
    hasty.post("/attach/loopback", image())  # so that there is a worker
    with hanging(hasty):
        problem = hasty.refused("POST", "/container", 504, box(FOREVER, name="web"))
        assert "did not finish in 0.3s" in problem["message"]
        stuck = hasty.get(f"/mount/{problem['id']}")  # the attachment is shared: the mount is the first to be made
        assert (stuck["refs"], "undone when it does" in stuck["problem"]) == (0, True)
        assert hasty.get("/container") == []
        assert hasty.http.get("/container/byname/web").status_code == 404
    eventually(lambda: hasty.get("/mount") == [], "what hung is undone")
    assert hasty.get("/attach/0")["refs"] == 1


def test_a_delete_that_hangs_is_504_and_done_when_it_returns(hasty: Server) -> None:
    hasty.post("/attach/loopback", image())
    with hanging(hasty):
        hasty.refused("DELETE", "/attach/0", 504)
        assert "problem" in hasty.get("/attach/0")
        hasty.refused("DELETE", "/attach/0", 409)
    eventually(lambda: hasty.get("/attach") == [], "the delete has been done")


def test_others_are_served_meanwhile(hasty: Server) -> None:
    hasty.post("/attach/loopback", image())
    with hanging(hasty):
        hasty.refused("DELETE", "/attach/0", 504)
        other = hasty.post("/attach/loopback", image())
        hasty.delete(f"/attach/{other['id']}")
    eventually(lambda: hasty.get("/attach") == [], "the delete has been done")
