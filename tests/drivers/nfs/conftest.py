"""What the tests of the NFS driver have: a server of the guest's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.guest.guest import Guest
from lab.guest.server import GuestServer, running
from lab.nfs import NfsServer


@pytest.fixture
def storage(guest: Guest) -> NfsServer:
    """An NFS server that the guest reaches."""
    server = NfsServer(guest)
    with guest.expecting():
        server.start()
    return server


@pytest.fixture
def impatient_server(guest: Guest) -> Iterator[GuestServer]:
    """A server in the guest that waits for nothing longer than six seconds."""
    with running(guest, "--operation-timeout", "6s") as server:
        yield server
