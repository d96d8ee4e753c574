"""What is dear to make and made once for a test run, when the first test asks for it."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import iscsi
from lab.ceph import Cluster
from lab.machine import Machine
from lab.remote import OnCeph, OnTarget


@pytest.fixture(scope="session")
def ceph(machine: Machine) -> Iterator[Cluster]:
    """A running cluster with the pool `rbd`. A test that restarts a part of it does so within `machine.expecting()`."""
    with machine.expecting():
        cluster = Cluster(str(machine.session.fast / "ceph"))
        cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def on_ceph(machine: Machine, ceph: Cluster) -> OnCeph:
    """The cluster, as a store of images."""
    return OnCeph(ceph, machine)


@pytest.fixture(scope="session")
def on_iscsi(machine: Machine) -> Iterator[OnTarget]:
    """A running target, as a store of images."""
    with machine.expecting():
        target = iscsi.Server(str(machine.session.fast / "target"))
        target.start()
        store = OnTarget(target, machine)
    yield store
    target.stop()


@pytest.fixture(scope="session")
def small_squashfs(machine: Machine) -> Iterator[Path]:
    """A squashfs of 2 MiB that does not compress, with the file /etc/hello."""
    tree, image = machine.session.disk / "small-squashfs", machine.session.disk / "small.sqsh"
    with machine.expecting():
        (tree / "etc").mkdir(parents=True)
        (tree / "etc/hello").write_text("hello\n")
        (tree / "noise").write_bytes(random.Random(1).randbytes(2 << 20))
        subprocess.run(["mksquashfs", tree, image, "-quiet", "-no-progress", "-no-xattrs"], check=True, timeout=60)
    yield image
    image.unlink()
    shutil.rmtree(tree)
