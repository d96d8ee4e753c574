"""What every test has: a directory of its own, a site on it, and the proof that it left the machine as it found it."""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageapi.config import Site
from lab import session as test_session
from lab.machine import Machine, Trace

pytest_plugins = ("lab.fixtures", "lab.guest.fixtures")

MACHINE = pytest.StashKey[Machine]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before pytest chooses where `tmp_path` is: it goes with the other temporary files of this run."""
    machine = config.stash[MACHINE] = Machine(test_session.begin())
    if config.option.basetemp is None:
        config.option.basetemp = machine.session.disk / "pytest"


def pytest_unconfigure(config: pytest.Config) -> None:
    machine = config.stash.get(MACHINE, None)
    for stuck in machine.tidy() if machine else ():
        print(f"still mounted, and left for you: {stuck}")


def pytest_report_header(config: pytest.Config) -> str:
    session = config.stash[MACHINE].session
    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    return f"kernel {platform.release()}, {os.cpu_count()} cpus, {who}; places: {session.fast}, {session.disk}"


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """This machine. A fixture that starts what outlives a test does so `with machine.expecting():`."""
    return request.config.stash[MACHINE]


@pytest.fixture(scope="session", autouse=True)
def machine_unchanged_by_the_run(machine: Machine) -> Iterator[None]:
    """Services that outlive a test end with the run."""
    before = machine.look()
    yield
    machine.expected.clear()
    _require_unchanged(machine, before, "the run")


@pytest.fixture(scope="module", autouse=True)
def machine_unchanged_by_the_module(machine: Machine, machine_unchanged_by_the_run: None) -> Iterator[None]:
    """What tests that need nothing of the machine might leave is looked for once, after the last of a module: there are
    two thousand of them, and most take less time than a look."""
    before = machine.look()
    yield
    _require_unchanged(machine, before, "a test of the module")


@pytest.fixture(autouse=True)
def machine_unchanged(
    request: pytest.FixtureRequest, machine: Machine, machine_unchanged_by_the_module: None
) -> Iterator[None]:
    """Fails the test that leaves a mount, loop device, process, descriptor, file or control group behind."""
    if request.node.get_closest_marker("pure"):
        yield
        return
    before = machine.look()
    yield
    _require_unchanged(machine, before, "the test")


def _require_unchanged(machine: Machine, before: set[Trace], who: str) -> None:
    if left := machine.settle(before):
        pytest.fail(f"{who} has changed the machine\n" + "\n".join(left), pytrace=False)


@pytest.fixture
def run_dir(machine: Machine) -> Iterator[Path]:
    """A fresh directory in memory. What the test mounts in it, the test must umount."""
    yield from _directory(machine)


@pytest.fixture(scope="module")
def module_run_dir(machine: Machine, machine_unchanged_by_the_module: None) -> Iterator[Path]:
    """The same for all tests of a module."""
    yield from _directory(machine)


def _directory(machine: Machine) -> Iterator[Path]:
    path = machine.session.fast / f"run-{secrets.token_hex(3)}"
    path.mkdir(mode=0o755)
    yield path
    if mounted := machine.remove(path):
        pytest.fail("still mounted in the run directory\n" + "\n".join(mounted), pytrace=False)


@pytest.fixture
def site(machine: Machine, run_dir: Path) -> Site:
    """A site on the run directory, its directories made, its instance of its own."""
    site = Site(run_dir=str(run_dir), instance=machine.session.token + secrets.token_hex(2))
    for directory in (site.mounts_dir, site.logs_dir, site.supervisor_dir):
        os.mkdir(directory, 0o755)
    for private in (site.state_dir, site.helpers_dir):
        os.mkdir(private, 0o700)
    return site
