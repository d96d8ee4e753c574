"""A mounted image, and a supervisor that runs containers on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imageapi.config import Site
from lab.images import small_image
from lab.supervised import Supervised, overlay, squashfs


@pytest.fixture
def image(run_dir: Path) -> Iterator[Path]:
    """The small image, read-only."""
    with squashfs(small_image(), run_dir / "image") as mountpoint:
        yield mountpoint


@pytest.fixture
def root(image: Path, run_dir: Path) -> Iterator[Path]:
    """A writable view of the small image."""
    with overlay(image, run_dir / "overlay") as mountpoint:
        yield mountpoint


@pytest.fixture
def supervised(site: Site, root: Path) -> Iterator[Supervised]:
    """A supervisor; its containers have the writable root."""
    running = Supervised(site, root)
    yield running
    running.close()
