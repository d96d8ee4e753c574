"""The host has run out of something at any call of a request: the answer says of what, nothing is left, and everything
works again as soon as there is enough, without a restart."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from imageapi.drivers import block
from lab.server import FOREVER, Server, box, eventually, hooked, running_as
from lab.shortage import VARIABLE, Shortage

pytestmark = pytest.mark.api

STRIDE = int(os.environ.get("IMAGEAPI_TEST_STRIDE", "5"))
"""Of so many calls one is tried as the first to fail; 1 tries all of them."""


class ScarceServer(Server):
    """A server that runs out of things when a test says so."""

    module = "lab.shortage"

    def __init__(self, run_dir: Path, *options: str) -> None:
        super().__init__(run_dir, *options)
        self.shortage = Shortage(run_dir / "shortage")

    @property
    def environment(self) -> dict[str, str]:
        return hooked(self.package, VARIABLE, self.shortage.path)

    def traces(self) -> list[str]:
        """What there is of objects under the run directory; the child in waiting's FIFO is left out."""
        places = ("mounts", "logs", "state/attach", "state/mount", "state/container", "supervisor")
        files = [f"{place}/{name}" for place in places for name in os.listdir(self.run_dir / place)]
        return sorted(file for file in files if not file.endswith(".out"))

    @property
    def fifos(self) -> int:
        return len(list((self.run_dir / "supervisor").glob("*.out")))

    @property
    def loops(self) -> set[str]:
        instance = (self.run_dir / "instance").read_text().strip()
        return set(block.marked(f"imageapi:{instance}:"))


@pytest.fixture
def scarce(run_dir: Path) -> Iterator[ScarceServer]:
    server = ScarceServer(run_dir)
    with contextlib.closing(server.shortage), running_as(server):
        yield server


Story = Callable[[ScarceServer], httpx.Response]


def create(server: ScarceServer) -> httpx.Response:
    return server.http.post("/container", json=box(FOREVER, name="new"))


def start(server: ScarceServer) -> httpx.Response:
    return server.http.get("/container/byname/old/running")


def delete(server: ScarceServer) -> httpx.Response:
    return server.http.delete("/container/byname/old?force=true")


def stop(server: ScarceServer) -> httpx.Response:
    return server.http.get("/container/byname/old/exited")


def nothing(server: ScarceServer) -> None:
    pass


def created(server: ScarceServer) -> None:
    server.post("/container", {**box(FOREVER, name="old"), "state": "created"})


def running(server: ScarceServer) -> None:
    server.post("/container", box(FOREVER, name="old"))


STORIES: dict[str, tuple[Callable[[ScarceServer], None], Story]] = {
    "create": (nothing, create),
    "start": (created, start),
    "stop": (running, stop),
    "delete": (running, delete),
}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("story", STORIES)
def test_at_any_call(scarce: ScarceServer, story: str, number: int) -> None:
    setting, tell = STORIES[story]
    after, failed = 0, 1
    while failed:
        setting(scarce)
        scarce.shortage.begin(number, after)
        answer = tell(scarce)
        during = scarce.http.get("/container")
        failed = scarce.shortage.end()
        where = f"{story}, {errno.errorcode[number]} after {after} calls: {answer.text}"
        assert answer.status_code in (200, 201, 503), where
        assert during.status_code == 200, where
        clear(scarce, where)
        after += STRIDE
    assert after > 1


def clear(server: ScarceServer, where: str) -> None:
    """All can be deleted, a container can be made again, and nothing is left."""
    server.clear()
    server.post("/container", box(FOREVER, name="after"))
    server.clear()
    for log in (server.run_dir / "logs").iterdir():
        log.unlink()
    wanted = ["supervisor/keep", "supervisor/lock", "supervisor/log", "supervisor/socket"]
    eventually(lambda: server.traces() == wanted, f"{where}: only {server.traces()}", 3)
    eventually(lambda: server.fifos <= 1, f"{where}: a FIFO is left", 3)
    assert server.loops == set(), where
