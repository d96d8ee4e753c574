"""What the tests of the rbd driver have: an image, and a site that attaches with the storage daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from imageapi.config import Site
from lab.ceph import Cluster


@pytest.fixture(scope="package")
def image(ceph: Cluster, small_squashfs: Path) -> str:
    """An image of the cluster that holds a squashfs, with a snapshot `one`."""
    ceph.import_image(str(small_squashfs), "small.sqsh")
    ceph.snapshot("small.sqsh", "one", protect=True)
    return "small.sqsh"


@pytest.fixture
def site(site: Site) -> Site:
    """One that attaches with the storage daemon whatever the kernel has."""
    return Site(run_dir=site.run_dir, instance=site.instance, rbd_backend="daemon")
