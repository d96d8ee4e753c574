"""Processes of the service that end at a bad moment, and what a restart must still know."""

from __future__ import annotations

import pytest

from lab.processes import processes
from lab.server import FOREVER, Server, alive, box, eventually, image, kill, squashfs, writable

pytestmark = pytest.mark.api


def zygote(server: Server) -> int:
    return next(one.pid for one in processes().values() if one.parent == server.pid)


def workers(server: Server) -> list[int]:
    parent = zygote(server)
    return [one.pid for one in processes().values() if one.parent == parent and one.name == "imageapi-worker"]


def test_a_worker_that_was_killed_while_it_waited_fails_nothing(server: Server) -> None:
    server.post("/attach/loopback", image())
    for pid in workers(server):
        kill(pid)
    server.post("/mount", squashfs())


def test_a_server_whose_zygote_is_gone_ends_and_the_next_goes_on(server: Server) -> None:
    """It could do nothing any more: whoever watches over it starts another, which finds all as it was."""
    made = server.post("/container", box(FOREVER))
    before = server.everything()
    kill(zygote(server))
    eventually(lambda: not server.runs, "the server has ended")
    assert "workers are forked from" in server.log.read_text()
    assert alive(made["pid"])
    server.stop()
    server.start()
    assert server.everything() == before


def test_why_something_is_wrong_is_known_after_a_restart(server: Server) -> None:
    server.post("/container", box("/bin/sh -c 'exit 3'"))
    server.await_state(0, "dead")
    server.post("/container", {"mount": writable(), "command": FOREVER})
    server.delete(f"/mount/{server.get('/container/1')['mount']['id']}?force=true")
    before = server.get("/container")
    assert all("problem" in one for one in before)
    server.stop()
    server.start()
    assert server.get("/container") == before
