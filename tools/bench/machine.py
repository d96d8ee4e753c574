"""What the machine is, and what it was doing meanwhile."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

import msgspec

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_LOOK = 0.5
"""Seconds for which it is watched what others do."""
_IDLE, _WAITING = 3, 4
_STEAL = 7
"""The places of idle, waiting and stolen time in a line of /proc/stat (proc_stat(5))."""
_GUEST = 8
"""Guest time and its nice part, from here on, are counted in user time already."""


class Machine(msgspec.Struct):
    """`busy_before` and `busy_after` are the parts of all processor time that others used just then, and `steal` is the
    part that this machine's host gave to others during the run (0 to 1)."""

    processor: str
    cores: int
    kernel: str
    governor: str
    python: str
    commit: str
    date: str
    load_before: float
    busy_before: float
    load_after: float = 0.0
    busy_after: float = 0.0
    steal: float = 0.0
    seconds: float = 0.0


class Watch:
    """Looks at the machine from its making until `finish`."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._times = _processor_times()
        self.machine = Machine(
            processor=_processor(),
            cores=os.cpu_count() or 1,
            kernel=os.uname().release,
            governor=_GOVERNOR.read_text().strip() if _GOVERNOR.exists() else "none",
            python=platform.python_version(),
            commit=_commit(),
            date=time.strftime("%Y-%m-%d %H:%M"),
            load_before=os.getloadavg()[0],
            busy_before=_busy(),
        )

    def finish(self) -> Machine:
        self.machine.steal = _parts(self._times)[_STEAL]
        self.machine.load_after = os.getloadavg()[0]
        self.machine.busy_after = _busy()
        self.machine.seconds = time.monotonic() - self._begun
        return self.machine


def _processor_times() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]


def _parts(before: list[int]) -> list[float]:
    """How all processor time since then divides (0 to 1)."""
    spent = [now - then for now, then in zip(_processor_times(), before, strict=True)]
    return [part / max(1, sum(spent[:_GUEST])) for part in spent]


def _busy() -> float:
    before = _processor_times()
    time.sleep(_LOOK)
    parts = _parts(before)
    return 1 - parts[_IDLE] - parts[_WAITING]


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _commit() -> str:
    """That of the checkout, and whether files differ from it."""
    command = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
