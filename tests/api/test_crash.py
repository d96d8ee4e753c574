"""Whoever is killed at whatever step: nothing that was answered is lost, and nothing is left that nobody knows of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import cycle, product
from pathlib import Path

import pytest

from lab.crashes import AT_START, STORIES, VICTIMS, FaultyServer, Lab, groups
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


EVERY = "IMAGEAPI_EVERY_CRASH" in os.environ
"""Each step in each story, however often it comes, with each victim: some 20 minutes."""


def _faults(steps: list[Step], victims: Iterable[str], seen: set[str]) -> Iterator[tuple[Step, str]]:
    """Steps that no other story has had, each with the next victim."""
    for step in steps:
        if step.name not in seen:
            seen.add(step.name)
            yield step, next(iter(victims))


def test_a_death_at_any_step_of_a_request_loses_nothing(lab: Lab) -> None:
    seen: set[str] = set()
    victims = cycle(VICTIMS)
    for story in STORIES:
        steps = lab.steps(story)
        some = list(_faults(steps, victims, seen))[:: 4 if story is groups else 1]  # these take long
        for step, who in product(steps, VICTIMS) if EVERY else some:
            lab.interrupt(story, step, who)


def test_a_death_at_any_step_of_a_start_loses_nothing(lab: Lab) -> None:
    steps = lab.steps_of_a_start()
    some = list(_faults(steps, cycle(AT_START), set()))[::6]
    for step, who in product(steps, AT_START) if EVERY else some:
        lab.interrupt_start(step, who)
