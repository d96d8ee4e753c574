"""What the faults of a soak are done to, and how often each has been."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.book import FaultyServer
from lab.ceph import Cluster
from lab.room import Filler

BESIDE = 0.3
"""How often a server dies besides, while something else is wrong."""


@dataclass
class Scene:
    """A server at work. `images` is where a fault makes image files of its own; `mounts` are what clients' containers
    are on; `filler` uses up the file system of the run directory; without a `cluster` there is no Ceph."""

    server: FaultyServer
    random: random.Random
    images: Path
    mounts: list[dict[str, Any]]
    victims: tuple[str, ...]
    releases: list[Path]
    filler: Filler
    cluster: Cluster | None = None
    steps: list[str] = field(default_factory=list)
    """What has been seen to be done by anybody."""
    tries: int = 0
    """Steps that were waited for."""
    faults: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)

    def die_besides(self) -> None:
        """Now and then: the server is killed, and the next finds what is wrong."""
        if self.random.random() < BESIDE:
            self.server.kill()
            self.server.start()
            self.deaths["server besides"] += 1
