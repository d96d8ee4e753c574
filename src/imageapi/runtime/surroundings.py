"""What all containers of a supervisor share: where their files, output and control groups are, and how to tend them."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import NamedTuple

from imageapi.linux import cgroup
from imageapi.runtime import output
from imageapi.runtime.child import Nursery
from imageapi.runtime.keep import Keep
from imageapi.runtime.loop import Loop

EBUSY_PAUSE, EBUSY_TRIES = 0.02, 100
"""A cgroup is busy until the kernel is done with its last process: seconds between tries, and how many."""


class Surroundings(NamedTuple):
    """What all lives share. `hierarchies` are cgroup hierarchies, each with a descriptor of the directory in which
    groups are made; `freezer` is that of the version 1 freezer's root."""

    directory: int
    logs: output.Place
    keep: Keep
    nursery: Nursery
    loop: Loop
    boot_id: str
    instance: str
    mark_prefix: str
    hierarchies: Sequence[tuple[cgroup.Hierarchy, int]]
    freezer: int | None

    def sweep_groups(self, used: Collection[str]) -> None:
        """Remove the cgroups of lives that are not known: their supervisor died before it could note them."""
        strays = [
            f"{hierarchy.directory}/{name}"
            for hierarchy, directory in self.hierarchies
            for name in cgroup.groups(directory)
            if name.startswith(group_name(self.mark_prefix))
        ]
        self.remove_groups([path for path in strays if path not in used])

    def remove_groups(self, paths: Sequence[str], tries: int = EBUSY_TRIES) -> None:
        """Remove cgroups whose processes have ended."""
        with self.keep.outside():
            busy = [path for path in paths if not _remove_group(path)]
        if busy and tries:
            self.loop.after(EBUSY_PAUSE, lambda: self.remove_groups(busy, tries - 1))

    def uuid(self, container: int) -> str:
        """An id that no other container has, on any host, and this one has until the next boot."""
        digits = f"{self.boot_id.replace('-', '')[:16]}{self.instance:>8.8}{container:08x}"
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def group_name(mark: str) -> str:
    """A mark as the name of a cgroup."""
    return mark.replace(":", "-").replace("/", "-")


def _remove_group(path: str) -> bool:
    parent, name = os.path.split(path)
    try:
        directory = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return cgroup.remove(directory, name)
    finally:
        os.close(directory)
