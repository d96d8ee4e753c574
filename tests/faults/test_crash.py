"""Whoever is killed at whatever step: nothing that was answered is lost, and nothing is left that nobody knows of."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pytest

from lab.book import AT_START, VICTIMS, WITH_HELPERS, FaultyServer
from lab.crashes import ON_A_HELPER, STORIES, Lab, attach, groups, sever, start, start_again
from lab.faults import Step
from lab.images import small_image
from lab.remote import BY_DAEMON, Store, on, over

pytestmark = [
    pytest.mark.api,
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),  # httpx leaves one that cannot connect
]


@contextlib.contextmanager
def _lab(server: FaultyServer, mount: dict[str, Any] | None = None) -> Iterator[Lab]:
    """A server that can be killed at any of its steps, with a container that must not notice."""
    server.start()
    try:
        lab = Lab(server, mount)
        yield lab
        lab.check_log()
        print(lab.report())
    finally:
        server.faults.disarm()
        server.revive()
        server.clear()
        server.stop()
        server.http.close()
        server.faults.close()


@pytest.fixture
def lab(run_dir: Path) -> Iterator[Lab]:
    """One whose containers are on an image of this host."""
    with _lab(FaultyServer(run_dir)) as lab:
        yield lab


@pytest.fixture(params=["on_ceph", "on_iscsi"])
def lab_on_a_helper(request: pytest.FixtureRequest, run_dir: Path) -> Iterator[Lab]:
    """One whose containers are on an image that a storage daemon serves. (On a Ceph it stays: a daemon that was killed
    is its user for another 30 s.)"""
    store: Store = request.getfixturevalue(request.param)
    name = f"crash-{secrets.token_hex(3)}"
    store.put(small_image(), name)
    with _lab(FaultyServer(run_dir, *BY_DAEMON), over(on(store, name))) as lab:
        yield lab


EVERY = os.environ.get("IMAGEAPI_EVERY_CRASH", "")
"""Each step in each story, however often it comes, with each victim: some 20 minutes with `1`, the second tenth of that
with `2/10`. What is printed at the end is shown with `-rP`."""
FEW = 30
"""Where a step takes long, every so many are tried."""

Fault = tuple[Step, str]


def _every(steps: list[Step], victims: Sequence[str]) -> Iterator[Fault]:
    """All that can be tried, or the part of it that is to be."""
    part, _, parts = EVERY.partition("/")
    return islice(product(steps, victims), int(part) - 1, None, int(parts or 1))


def _faults(steps: list[Step], victims: Iterable[str], seen: set[str]) -> Iterator[Fault]:
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
        for step, who in _every(steps, VICTIMS) if EVERY else some:
            lab.interrupt(story, step, who)


def test_a_start_that_is_cut_off_before_the_gate_is_open_has_not_been(lab: Lab) -> None:
    """The container is as it was, with the exit code of its run before."""
    assert lab.interrupt(start_again, Step("super write entries.save < container._open_gate", 1), "both")


def test_a_first_process_that_is_killed_before_its_exec_has_not_run(lab: Lab) -> None:
    """At the gate the start fails; right after the clone nobody has been told yet whom to reap."""
    assert lab.interrupt(start, Step("child recv init._pass_gate < init.run", 1), "itself")
    assert lab.interrupt(start, Step("child execve init._execute < init.run", 1), "itself")
    assert lab.interrupt(start, Step("memory clone lender._lend < lender.clone", 1), "itself")


def test_a_death_at_any_step_of_a_start_loses_nothing(lab: Lab) -> None:
    steps = lab.steps_of_a_start()
    some = list(_faults(steps, cycle(AT_START), set()))[::6]
    for step, who in _every(steps, AT_START) if EVERY else some:
        lab.interrupt_start(step, who)


@pytest.mark.ceph
@pytest.mark.parametrize("lab_on_a_helper", ["on_ceph"], indirect=True)
def test_the_end_of_a_first_try_is_not_taken_for_the_end_of_the_second(lab_on_a_helper: Lab) -> None:
    """The supervisor dies when the command runs and before it has said so; the server ends that, and tries again."""
    step = Step("super recv container._listen_to < container._on_tie", 1)
    assert lab_on_a_helper.interrupt(start_again, step, "helper and supervisor")


@pytest.mark.ceph
@pytest.mark.parametrize("lab_on_a_helper", ["on_ceph"], indirect=True)
def test_a_loop_device_that_was_not_noted_yet_is_taken_away(lab_on_a_helper: Lab) -> None:
    step = Step("worker LOOP_CONFIGURE export_loop.attach < exported._attach", 1)
    assert lab_on_a_helper.interrupt(attach, step, "helper and itself")


@pytest.mark.ceph
def test_a_death_of_a_storage_helper_at_any_step_loses_nothing(lab_on_a_helper: Lab) -> None:
    """Alone, and together with others; while it is replaced, too."""
    seen: set[str] = set()
    victims = cycle(WITH_HELPERS)
    for story in (*ON_A_HELPER, *((sever,) if EVERY else ())):
        steps = lab_on_a_helper.steps(story)
        some = list(_faults(steps, victims, seen))[::FEW]
        for step, who in _every(steps, (*WITH_HELPERS, *VICTIMS)) if EVERY else some:
            lab_on_a_helper.interrupt(story, step, who)
