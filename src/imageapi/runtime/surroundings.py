"""What all containers of a supervisor share: where their files, output and control groups are, and how to tend them."""

from __future__ import annotations

from typing import NamedTuple

from imageapi.runtime import output
from imageapi.runtime.child import Nursery
from imageapi.runtime.groups import Groups
from imageapi.runtime.keep import Keep
from imageapi.runtime.loop import Loop


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
