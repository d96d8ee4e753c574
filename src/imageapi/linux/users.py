"""Which processes use a path, as /proc shows it: only links are read, so that nothing here waits for a file system."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def using(*paths: str) -> list[int]:
    """The processes that have one of `paths`, or something below it, open or as working directory, root or program.
    Best effort: mapped files that are no longer open are not found."""
    real = [f"{os.path.realpath(os.path.dirname(path))}/{os.path.basename(path)}" for path in paths]
    return [pid for pid in _processes() if any(_at(link, path) for link in _links(pid) for path in real)]


def command(pid: int) -> str:
    """The name of a process (comm in proc(5)); "" when it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", errors="replace") as file:
        return file.read().strip()
    return ""


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _links(pid: int) -> Iterator[str]:
    proc = f"/proc/{pid}"
    names = [f"{proc}/{name}" for name in ("cwd", "root", "exe")]
    with contextlib.suppress(OSError):
        names += [f"{proc}/fd/{number}" for number in os.listdir(f"{proc}/fd")]
    for name in names:
        with contextlib.suppress(OSError):
            yield os.readlink(name)


def _at(link: str, path: str) -> bool:
    return link == path or link.startswith(f"{path}/")
