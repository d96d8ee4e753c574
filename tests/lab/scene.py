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
from lab.server import kill

BESIDE = 0.3
"""How often a server dies besides, while something else is wrong."""
KILLED = ("server", "both")
"""Who dies then."""


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

    def kill(self, who: str) -> None:
        """The `server`, or `both`, it and its supervisor: the server first, so that no client is told of the other
        death."""
        self.server.kill()
        if who == "both":
            kill(self.server.supervisor)

    def die_besides(self) -> None:
        """Now and then: somebody is killed, and the next server finds what is wrong."""
        who = self.random.choice(KILLED)
        if self.random.random() < BESIDE:
            self.kill(who)
            self.server.start()
            self.deaths[f"{who} besides"] += 1
