"""A store that hangs while the server ends and starts: it costs nobody but who needs it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imageapi.engine.pool import PER_STORE
from lab.fuse import Shown, shown
from lab.server import FOREVER, Server, box, eventually, image, posting, running

pytestmark = pytest.mark.api

AT_ONCE = 5.0
"""Seconds for what does not wait for a store; an operation that does is given up after 25."""


@pytest.fixture
def dying(tmp_path: Path) -> Iterator[Shown]:
    """An image of a store that a test may have hang."""
    with shown(tmp_path) as image:
        yield image


@pytest.fixture
def server(run_dir: Path, dying: Shown) -> Iterator[Server]:
    with running(run_dir, "--operation-timeout", "25s", "--cleanup-timeout", "1s") as server:
        yield server
        dying.work()


def on(path: Path, name: str) -> dict[str, Any]:
    lower = {"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": image(path=str(path))}}
    return {"mount": {"kind": "overlay", "overlay": {"lower": [lower]}}, "command": FOREVER, "name": name}


def at_once(what: Callable[[], object]) -> None:
    begun = time.monotonic()
    what()
    assert time.monotonic() - begun < AT_ONCE


def _hang(dying: Shown) -> None:
    """The kernel trusts for a second what it has been told of the file."""
    dying.hang()
    time.sleep(1.1)


@pytest.mark.parametrize("end", [Server.stop, Server.kill], ids=["stopped", "killed"])
def test_a_server_starts_though_a_store_hangs(server: Server, dying: Shown, end: Callable[[Server], None]) -> None:
    """All its objects are there, those on other stores can be made and deleted; and it ends again."""
    server.post("/container", on(dying.path, "there") | {"state": "running"})
    server.post("/container", box(FOREVER, name="here"))
    before = server.everything()
    dying.hang()
    for _ in range(2):
        at_once(lambda: end(server))
        at_once(server.start)
        assert server.everything() == before
    at_once(lambda: server.delete(f"/container/{server.post('/container', box(FOREVER))['id']}?force=true"))
    at_once(lambda: server.delete("/container/byname/here?force=true"))


@pytest.mark.parametrize("end", [Server.stop, Server.kill], ids=["stopped", "killed"])
def test_what_hangs_in_its_making_holds_up_neither_the_end_nor_the_next_start(
    server: Server, dying: Shown, end: Callable[[Server], None]
) -> None:
    _hang(dying)
    client = server.client()
    client.timeout = 1
    with pytest.raises(Exception, match="timed out"):
        client.post("/attach/loopback", json=image(path=str(dying.path)))
    client.close()
    at_once(lambda: end(server))
    at_once(server.start)
    server.post("/container", box(FOREVER, name="here"))
    dying.work()
    server.delete("/container/byname/here?force=true")
    eventually(lambda: server.everything() == [], "nothing is left of what hung")


def test_what_hangs_in_one_directory_takes_no_places_from_another(server: Server, dying: Shown) -> None:
    _hang(dying)
    writable = image(path=str(dying.path), ro=False)  # so that each is attached by itself
    with contextlib.ExitStack() as late:
        late.callback(dying.work)
        answers = [late.enter_context(posting(server, "/attach/loopback", writable)) for _ in range(PER_STORE)]
        eventually(lambda: len(server.get("/progress")) == PER_STORE, "all places of the directory are taken")
        at_once(lambda: server.delete(f"/container/{server.post('/container', box(FOREVER))['id']}?force=true"))
        dying.work()
        assert all(answer.result().status_code == 201 for answer in answers)
    server.clear()


def test_what_stands_on_a_file_system_that_has_died_can_be_deleted(server: Server, dying: Shown) -> None:
    """The kernel asks that file system when it is asked whose a loop device is."""
    server.post("/container", on(dying.path, "there") | {"state": "running"})
    alone = server.post("/attach/loopback", image(path=str(dying.path), ro=False))
    dying.die()
    server.delete(f"/attach/loopback/{alone['id']}")
    server.kill()
    server.start()
    server.delete("/container/byname/there?force=true")
    assert server.everything() == []
