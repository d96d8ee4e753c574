"""The control groups of containers with systemd: for each life one of the same name in every hierarchy.

A first process is born in that of version 2, and makes the others itself. So as long as that one is busy, the others
may still appear: it is removed first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from itertools import dropwhile
from typing import NamedTuple

from imageapi.errors import Unsupported
from imageapi.linux import cgroup
from imageapi.runtime.keep import Keep
from imageapi.runtime.loop import Loop

FIRST_PAUSE, LAST_PAUSE = 0.02, 20.0
"""A group is busy until the kernel is done with its last process, in version 1 until somebody has reaped it: seconds
between the first two tries, doubled each time until it is given up."""


class Place(NamedTuple):
    """A hierarchy, with a descriptor of the directory in which groups are made."""

    hierarchy: cgroup.Hierarchy
    directory: int


class Groups(NamedTuple):
    """Where groups are made, version 2 first, and what it takes to remove them."""

    places: Sequence[Place]
    keep: Keep
    loop: Loop

    def paths(self, name: str) -> list[str]:
        return [f"{one.hierarchy.directory}/{name}" for one in self.places]

    def make_birthplace(self, name: str) -> int:
        """A descriptor of a new group of version 2. Raises: OSError; errors.Unsupported."""
        for hierarchy, directory in self.places[:1]:
            if hierarchy.is_v2:
                cgroup.make(directory, name)
                return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        raise Unsupported("systemd needs cgroup2, which is not mounted on this host; mount it, and start again")

    def sweep(self, prefix: str, used: Collection[str]) -> None:
        """Remove the groups of lives that are not known: their supervisor died before it could note them. Of such a
        life the first process may not have ended yet."""
        found = {name for one in self.places for name in cgroup.groups(one.directory) if name.startswith(prefix)}
        for name in found - {os.path.basename(path) for path in used}:
            if self.places[0].hierarchy.is_v2:
                cgroup.kill(self.places[0].directory, name)
            self.remove(self.paths(name))

    def remove(self, paths: Sequence[str], pause: float = FIRST_PAUSE) -> None:
        """Remove the groups of one life, in their order, as soon as its processes have ended."""
        with self.keep.outside():
            left = list(dropwhile(_remove, paths))
        if left and pause < LAST_PAUSE:
            self.loop.after(pause, lambda: self.remove(left, 2 * pause))


def name_of(mark: str) -> str:
    """A mark as the name of a group."""
    return mark.replace(":", "-").replace("/", "-")


def open_places() -> list[Place]:
    """The hierarchies in which this process can make groups; not all, where it is in a container itself."""
    return sorted(_open_places(), key=lambda one: not one.hierarchy.is_v2)


def _open_places() -> Iterator[Place]:
    for one in cgroup.hierarchies():
        with contextlib.suppress(FileNotFoundError):
            yield Place(one, os.open(one.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _remove(path: str) -> bool:
    """Whether it is gone."""
    parent, name = os.path.split(path)
    try:
        directory = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return cgroup.remove(directory, name)
    finally:
        os.close(directory)
