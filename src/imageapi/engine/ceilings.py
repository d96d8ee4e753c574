"""What the kernel has enough of for how many containers: looked at once, at the start."""

from __future__ import annotations

import logging
import resource
from typing import NamedTuple

from imageapi.linux import ceilings

log = logging.getLogger(__name__)

ENOUGH = 1000
"""Containers that a node should have room for."""


class Need(NamedTuple):
    """How many of what `name` bounds one container takes."""

    name: str
    each: int
    whose: str = ""


NEEDS = (
    Need("fs.mount-max", 3),
    Need("kernel.pid_max", 8),
    Need("kernel.threads-max", 8),
    Need("kernel.pty.max", 1),
    Need("kernel.keys.root_maxkeys", 1),
    Need("fs.inotify.max_user_instances", 5, " with systemd"),
    Need("fs.inotify.max_user_watches", 20, " with systemd"),
)
DESCRIPTORS = Need("LimitNOFILE", 2)


def warn() -> None:
    """Say in the log which ceilings a node with a thousand containers would reach, and for how many they are enough."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = [(need, ceilings.ceiling(need.name)) for need in NEEDS]
    for need, most in [*found, (DESCRIPTORS, descriptors)]:
        if most is not None and most < ENOUGH * need.each:
            few = f"{need.name} is {most}, which is enough for some {most // need.each} containers{need.whose}"
            log.warning("%s; raise it for more", few)
