"""Another mount namespace, held by a sleeping process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.ceph import wait_until


@contextmanager
def mount_namespace(propagation: str = "private") -> Iterator[int]:
    """The pid of a process in a copy of this mount namespace; `propagation` as unshare(1) takes it."""
    process = subprocess.Popen(["unshare", "--mount", "--propagation", propagation, "sleep", "600"])
    try:
        wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "the other namespace", 10)
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextmanager
def working_in(directory: str | os.PathLike[str]) -> Iterator[int]:
    """The pid of a process whose working directory is `directory`."""
    process = subprocess.Popen(["sleep", "600"], cwd=directory)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
