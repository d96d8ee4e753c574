"""What all containers of a supervisor share: where their files, output and control groups are, and how to tend them."""

from __future__ import annotations

import os
from functools import partial
from typing import NamedTuple

from imageapi.config import Site
from imageapi.linux import cgroup, memory
from imageapi.runtime import output
from imageapi.runtime.child import Nursery
from imageapi.runtime.groups import Groups, open_places
from imageapi.runtime.init import Inheritance
from imageapi.runtime.keep import Keep
from imageapi.runtime.loop import Loop

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Surroundings(NamedTuple):
    """What all lives share. `freezer` is a descriptor of the version 1 freezer's root."""

    directory: int
    logs: output.Place
    keep: Keep
    nursery: Nursery
    loop: Loop
    boot_id: str
    instance: str
    mark_prefix: str
    groups: Groups
    freezer: int | None

    def uuid(self, container: int) -> str:
        """An id that no other container has, on any host, and this one has until the next boot."""
        digits = f"{self.boot_id.replace('-', '')[:16]}{self.instance:>8.8}{container:08x}"
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def mark(site: Site) -> str:
    """The source of the keep's mount."""
    return f"{site.mark_prefix}supervisor"


def open_all(site: Site) -> Surroundings:
    """What can be had only in the host's mount namespace is opened; making the keep, at last, leaves that."""
    place = cgroup.freezer()
    freezer = None if place is None else os.open(place, _DIRECTORY)
    places = open_places()
    given = Inheritance(
        directory=os.open(site.supervisor_dir, _DIRECTORY),
        logs=os.open(site.logs_dir, _DIRECTORY),
        groups=[one.directory for one in places if not one.hierarchy.is_v2],
        code=memory.code(),
        adjust_oom=_read("/proc/self/oom_score_adj") != "0",
    )
    boot_id = _read("/proc/sys/kernel/random/boot_id")
    keep = Keep(f"{site.supervisor_dir}/keep", mark(site))
    return Surroundings(
        directory=given.directory,
        logs=output.Place(given.logs, site.log_limit, partial(_reopen, keep, site.logs_dir)),
        keep=keep,
        nursery=Nursery(given, keep, []),
        loop=(loop := Loop()),
        boot_id=boot_id,
        instance=site.instance,
        mark_prefix=site.mark_prefix,
        groups=Groups(places, keep, loop),
        freezer=freezer,
    )


def _reopen(keep: Keep, path: str, descriptor: int) -> None:
    """Have `descriptor` be of the directory that is at `path` now; it is made where there is none. Raises: OSError."""
    with keep.outside():
        os.makedirs(path, exist_ok=True)
        found = os.open(path, _DIRECTORY)
    os.dup2(found, descriptor, inheritable=False)
    os.close(found)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read().strip()
