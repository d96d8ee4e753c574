"""What the tests of the kernel's facts have: a directory, and a small image on a loop device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from imageapi.linux import loop, mount
from lab import images

Attach = Callable[..., str]
Mounted = Callable[..., Path]


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    """What a test hangs in here is undone when it ends, the last first."""
    with ExitStack() as undo:
        yield undo


@pytest.fixture
def attach(undo: ExitStack) -> Attach:
    """Attaches a file (the small squashfs) to a loop device."""

    def attach(file: Path | None = None, name: str = "test", *, read_only: bool = True, **options: Any) -> str:
        fd = os.open(file or images.small_image("squashfs"), os.O_RDONLY if read_only else os.O_RDWR)
        try:
            device, _ = loop.attach(fd, name, read_only=read_only, **options)
        finally:
            os.close(fd)
        undo.callback(loop.detach, device)
        return device

    return attach


@pytest.fixture
def spot(run_dir: Path) -> Path:
    """A place to mount something at."""
    (run_dir / "spot").mkdir()
    return run_dir / "spot"


@pytest.fixture
def tmpfs(run_dir: Path, undo: ExitStack) -> Path:
    """A tmpfs, with two directories in it."""
    place = run_dir / "tmpfs"
    place.mkdir()
    mount.mount("tmpfs", str(place), "tmpfs", 0, None)
    undo.callback(mount.umount, str(place))
    for name in ("one", "two"):
        (place / name).mkdir()
    return place
