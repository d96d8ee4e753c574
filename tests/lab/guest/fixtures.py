"""The guest lab for tests: mark them `guest`, and ask for `guest` or `guest_server`.

    @pytest.mark.guest
    def test_maps(guest: Guest, guest_server: GuestServer, guest_ceph: Cluster) -> None:
        guest.run("modprobe", "rbd")                                   # a command in the guest
        image = guest.put(small_image(), "/tmp/image.sqsh")            # a file of this machine
        guest_server.post("/attach/rbd", {"monitors": [guest_ceph.monitor], …})

Each test has a fresh guest: it is restored from a state saved after boot, in a quarter of a second. Commands run in it
as root; the kernel is Debian's own, with rbd, nfs, nfsd, iscsi_tcp, nbd and dm-multipath loaded, and NFS' and tgt's
servers are installed. This checkout is at /imageapi, read only. Servers on this side listen on 10.99.0.1 or fd99::1 in
the lab's network (`lab_network.enter` is the prefix of a command that runs there), and the guest reaches them by that
address. What a test sets up in the guest outside of the API, and does not take down, it sets up
`with guest.expecting():`; anything else that is left there fails the test.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.ceph import Cluster
from lab.guest.guest import Guest, restored
from lab.guest.network import SERVER, Network, network
from lab.guest.server import GuestServer, serving
from lab.guest.state import State, booted
from lab.machine import Machine

GUESTS = pytest.StashKey[list[str]]()
"""The kernels of the guests that were started."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The guest tier says what it ran."""
    started: list[str] = terminalreporter.config.stash.get(GUESTS, [])
    for kernel, guests in Counter(started).items():
        terminalreporter.write_line(f"guest tier: {guests} guests, kernel {kernel}")


@pytest.fixture(scope="session")
def lab_network(machine: Machine) -> Iterator[Network]:
    """Where servers for guests listen."""
    with contextlib.ExitStack() as until_the_end:
        with machine.expecting():
            found = until_the_end.enter_context(network())
        yield found


@pytest.fixture(scope="session")
def guest_state() -> State:
    """The state that guests are restored from."""
    return booted()


@pytest.fixture(scope="session")
def guest_serving(machine: Machine, guest_state: State, lab_network: Network) -> Iterator[tuple[State, int]]:
    """The state in which the server runs, and the server's pid."""
    directory = machine.session.disk / "guest"
    with machine.expecting():
        directory.mkdir()
    yield serving(guest_state, lab_network, directory)
    shutil.rmtree(directory)


@pytest.fixture
def guest(lab_network: Network, run_dir: Path, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A fresh guest, which the test must leave as it was. For a test with `guest_server` the server runs in it."""
    with_server = "guest_server" in request.fixturenames
    state = request.getfixturevalue("guest_serving")[0] if with_server else request.getfixturevalue("guest_state")
    directory = run_dir / "guest"
    directory.mkdir()
    _count(request, state)
    with restored(state, lab_network, directory) as guest, unchanged(guest):
        yield guest


def _count(request: pytest.FixtureRequest, state: State) -> None:
    request.config.stash.setdefault(GUESTS, []).append(state.shape.root.release)


@contextlib.contextmanager
def unchanged(guest: Guest) -> Iterator[None]:
    """Within it a test must leave the guest as it was."""
    before = guest.look()
    yield
    if left := guest.left(before):
        pytest.fail("the test has changed the guest\n" + "\n".join(left), pytrace=False)


@pytest.fixture(scope="module")
def guest_of_module(machine: Machine, lab_network: Network, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """One for all tests of a module, whose GUEST says how it is booted: arguments of `booted`."""
    directory = machine.session.disk / "guest-of-module"
    with machine.expecting():
        directory.mkdir()
        state = booted(**request.module.GUEST)
    _count(request, state)
    with restored(state, lab_network, directory) as guest:
        yield guest
    shutil.rmtree(directory)


@pytest.fixture
def guest_server(guest: Guest, guest_serving: tuple[State, int]) -> Iterator[GuestServer]:
    """A server in the guest. What the test left in it is deleted at the end."""
    server = GuestServer(guest, pid=guest_serving[1])
    yield server
    server.remove()


@pytest.fixture(scope="session")
def guest_ceph(machine: Machine, lab_network: Network) -> Iterator[Cluster]:
    """A Ceph cluster that guests reach, with the pool `rbd`."""
    with machine.expecting():
        cluster = Cluster(str(machine.session.fast / "guest-ceph"), SERVER, enter=lab_network.enter)
        cluster.start()
    yield cluster
    cluster.stop()
