"""Whoever is killed at whatever step: nothing that was answered is lost, and nothing is left that nobody knows of."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from lab.crashes import AT_START, STORIES, VICTIMS, FaultyServer, Lab
from lab.faults import Step

pytestmark = [
    pytest.mark.api,
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),  # httpx leaves one that cannot connect
]


@pytest.fixture
def lab(run_dir: Path) -> Iterator[Lab]:
    """A server that can be killed at any of its steps, with a container that must not notice."""
    server = FaultyServer(run_dir)
    server.start()
    try:
        lab = Lab(server)
        yield lab
        lab.check_log()
    finally:
        server.faults.disarm()
        server.revive()
        server.clear()
        server.stop()
        server.http.close()
        server.faults.close()


def _new(steps: list[Step], seen: set[str]) -> Iterator[Step]:
    """Those that no other story has had, each once. `make soak` takes all, with every victim."""
    for step in steps:
        if step.name not in seen:
            seen.add(step.name)
            yield step


def test_a_death_at_any_step_of_a_request_loses_nothing(lab: Lab) -> None:
    seen: set[str] = set()
    victims = cycle(VICTIMS)
    for story in STORIES:
        for step in _new(lab.steps(story), seen):
            lab.interrupt(story, step, next(victims))


def test_a_death_at_any_step_of_a_start_loses_nothing(lab: Lab) -> None:
    victims = cycle(AT_START)
    for step in list(_new(lab.steps_of_a_start(), set()))[::4]:
        lab.interrupt_start(step, next(victims))
