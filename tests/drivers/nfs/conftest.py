"""What the tests of the NFS driver have: a server of the guest's own."""

from __future__ import annotations

import pytest

from lab.guest.guest import Guest
from lab.nfs import NfsServer


@pytest.fixture
def storage(guest: Guest) -> NfsServer:
    """An NFS server that the guest reaches."""
    server = NfsServer(guest)
    with guest.expecting():
        server.start()
    return server
