"""What does not notice that a store is dead: the images of another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from lab.guest.server import GuestServer
from lab.images import small_image

IMAGE = "/tmp/of-another-store"
SLOWER, SLACK = 10, 0.5
"""How many times as long as usual a request may take, and how many seconds more: two cores run all of this."""
PAUSE = 0.3
"""Seconds between two looks, so that a guest under emulation is not kept busy with nothing else."""


class Another:
    """An image that is the guest's own. `usual` is how many seconds it takes to attach and detach it."""

    def __init__(self, server: GuestServer) -> None:
        self.server = server
        self.usual = max(self.seconds() for _ in range(3))

    def seconds(self) -> float:
        begun = time.monotonic()
        self.server.get("/attach")
        made = self.server.post("/attach/loopback", {"path": IMAGE, "base": "root", "ro": True})
        self.server.delete(f"/attach/loopback/{made['id']}")
        return time.monotonic() - begun

    def is_served_as_usual(self) -> None:
        assert (seconds := self.seconds()) < SLOWER * self.usual + SLACK, (seconds, self.usual)

    def while_late(self, requests: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of requests that wait for the dead store, all at once; it is served meanwhile."""
        with ThreadPoolExecutor() as pool:
            late: list[Future[Any]] = [pool.submit(request) for request in requests]
            self.is_served_as_usual()
            while wait(late, PAUSE).not_done:
                self.is_served_as_usual()
            return [each.result() for each in late]


@contextlib.contextmanager
def another(server: GuestServer) -> Iterator[Another]:
    server.guest.put(small_image(), IMAGE)
    yield Another(server)
    server.guest.run("rm", IMAGE)
