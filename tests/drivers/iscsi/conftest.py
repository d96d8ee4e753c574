"""What the tests of the iscsi driver have: a target with an image, and a site that attaches with the storage daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from drivers.iscsi.on_target import Lab, fill
from imageapi.config import Site
from lab.iscsi import Server
from lab.machine import Machine


@pytest.fixture(scope="package")
def lab(machine: Machine, small_squashfs: Path) -> Iterator[Lab]:
    """A running server with targets. A test that starts it again does so within `machine.expecting()`."""
    server = Server(str(machine.session.fast / "iscsi"), ["[::1]:3269", "127.0.0.1:3268"])
    with machine.expecting():
        server.start()
        fill(server, small_squashfs)
    yield Lab(server, small_squashfs.read_bytes())
    server.stop()


@pytest.fixture
def site(site: Site) -> Site:
    """One that attaches with the storage daemon whatever the kernel has."""
    return Site(run_dir=site.run_dir, instance=site.instance, iscsi_backend="daemon")
