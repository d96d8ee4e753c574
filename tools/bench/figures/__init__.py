"""The figures, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tools.bench.figures import cold, cycles, guest, many, memory, nest, rbd, read, start, stop, systemd
from tools.bench.lab import Lab
from tools.bench.measure import Figure

FIGURES: Mapping[str, Callable[[Lab], Figure]] = {
    "nest": nest.figure,
    "start": start.figure,
    "stop": stop.figure,
    "read": read.figure,
    "cycles": cycles.figure,
    "memory": memory.figure,
    "cold": cold.figure,
    "many": many.figure,
    "rbd": rbd.figure,
    "systemd": systemd.figure,
    "guest": guest.figure,
}
