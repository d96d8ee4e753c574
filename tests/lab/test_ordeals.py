"""What the soak does to a host, once each, with nobody else at work; and what its clients make of a refusal."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from lab import faults, meddling, ordeals
from lab.book import Book, FaultyServer, Refused
from lab.crashes import check_clean
from lab.machine import Machine
from lab.room import Filler, tmpfs
from lab.scene import Scene
from lab.server import running_as, writable

pytestmark = pytest.mark.api

TIMES = 2
"""So that in one or the other a server dies before it, or right after."""


@pytest.fixture
def scene(machine: Machine, run_dir: Path) -> Iterator[Scene]:
    """Without a Ceph, and a second release."""
    with tmpfs(run_dir / "small", "size=16m,nr_inodes=1000") as place:
        server = FaultyServer(place)
        server.log = run_dir / "server.log"
        with running_as(server):
            draws = random.Random(1)
            yield Scene(server, draws, machine.session.images, [writable()], ("server",), [], Filler(place))
        server.faults.close()


@pytest.mark.parametrize("harm", meddling.ALL, ids=lambda harm: harm.__name__)
def test_what_somebody_does_is_told_and_can_be_deleted(scene: Scene, harm: Callable[[Scene], None]) -> None:
    for number in range(TIMES):
        scene.faults["done"] = number
        harm(scene)
        assert scene.server.everything() == []
        check_clean(scene.server)


@pytest.mark.parametrize(
    "ordeal",
    [ordeals.loop_devices_grabbed, ordeals.full_run_directory, ordeals.client_that_hangs_up],
    ids=lambda ordeal: ordeal.__name__,
)
def test_what_the_host_does_is_got_over(scene: Scene, ordeal: Callable[[Scene], None]) -> None:
    for _ in range(TIMES):
        ordeal(scene)
        assert scene.server.everything() == []
        check_clean(scene.server)


def test_a_create_that_is_refused_for_lack_of_something_has_left_nothing(scene: Scene) -> None:
    refusing = httpx.MockTransport(lambda _: httpx.Response(503, json={"message": "no room"}))
    with httpx.Client(transport=refusing, base_url="http://localhost") as client:
        book = Book(scene.server, http=client)
        with pytest.raises(Refused, match="no room"):
            book.create("vain")
    assert [failure.code for failure in book.failures] == [503]
    book.check([])
    with pytest.raises(AssertionError, match="vain"):
        book.check([{"name": "vain"}])


def test_of_the_steps_only_whole_lines_count(tmp_path: Path) -> None:
    page = tmp_path / "page"
    recording = faults.Faults(page, lambda: ())
    recording.record()
    with page.open("r+b") as file:
        file.seek(1 << 16)
        file.write(b"\x22\0\0\0" + b"12 server mkdir rundir.make\n1304\n11 worker unlink collect.rele\0\0se\n")
    assert [step.name for step in recording.recorded()] == ["server mkdir rundir.make"]
    recording.close()
