"""The images that tests mount: each run works on copies in its own place, so that a loop device tells whose it is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from lab.session import current
from tools import images
from tools.images import Format


def systemd_image() -> Path:
    """A small Debian with systemd, as squashfs. Its first process is `/usr/lib/systemd/systemd`."""
    return _own_copy(images.systemd_image())


def small_image(format: Format = "squashfs") -> Path:
    """Busybox, a few files, and commands that cannot be run: see `tools.images.small_image`."""
    return _own_copy(images.small_image(format))


def formatted(image: Path, fs_type: str, size: str) -> Path:
    """An empty file system in a file."""
    subprocess.run(["truncate", "-s", size, image], check=True)
    from lab.server import eventually  # here, since guests, which import this module, have no httpx

    # mkfs.btrfs looks at whatever is mounted, and fails where another run's file system has just died
    eventually(lambda: subprocess.run([f"mkfs.{fs_type}", "-q", image]).returncode == 0, f"{image} is formatted")
    return image


def _own_copy(image: Path) -> Path:
    """A copy in this run's place in memory, made once a run; the image itself outside of a run."""
    session = current()
    if session is None:
        return image
    copy = session.images / image.name
    if not copy.exists():
        shutil.copyfile(image, copy)
    return copy
