"""Who is to die at a step does, wherever the process is whose step it is; a kill that hits nothing is told."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageapi.linux import namespaces
from lab import deaths

pytestmark = pytest.mark.kernel

KILLED = -9


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page"


@pytest.fixture
def killer(page: Path) -> Iterator[deaths.Deaths]:
    killer = deaths.Deaths(page, lambda: ())
    yield killer
    killer.close()


def _first_process_asks(page: Path) -> int:
    """How a process ends that is the first of a pid namespace, and comes to the step that is awaited."""
    pid, pidfd = namespaces.clone(namespaces.CLONE_NEWPID)
    if pid == 0:
        deaths.ask(page)
        os._exit(0)
    os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_first_process_of_a_pid_namespace_is_killed(killer: deaths.Deaths, page: Path) -> None:
    killer.order([deaths.ITSELF])
    assert _first_process_asks(page) == KILLED
    assert killer.end()


def test_it_has_another_killed_whom_it_does_not_see(killer: deaths.Deaths, page: Path) -> None:
    with subprocess.Popen(["sleep", "1000"]) as victim:
        killer.order([victim.pid])
        assert _first_process_asks(page) == 0
    assert victim.returncode == KILLED
    assert killer.end()


def test_a_kill_that_hits_nothing_is_told(killer: deaths.Deaths, page: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    killer.order([ended.pid])
    assert _first_process_asks(page) == 0
    with pytest.raises(AssertionError, match="not there"):
        killer.end()


def test_nobody_is_killed_without_an_order_or_twice(killer: deaths.Deaths, page: Path) -> None:
    assert _first_process_asks(page) == 0
    assert not killer.end()
    killer.order([deaths.ITSELF])
    assert [_first_process_asks(page), _first_process_asks(page)] == [KILLED, 0]
