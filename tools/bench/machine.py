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
_STEAL = 7
"""The place of stolen time among those of a line of /proc/stat (proc_stat(5))."""
_GUEST = 8
"""Guest time and its nice part, from here on, are counted in user time already."""


class Machine(msgspec.Struct):
    """`steal` is the part of all processor time that the host of this machine gave to others (0 to 1)."""

    processor: str
    cores: int
    kernel: str
    governor: str
    python: str
    commit: str
    date: str
    load_before: float
    load_after: float = 0.0
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
        )

    def finish(self) -> Machine:
        spent = [now - before for now, before in zip(_processor_times(), self._times, strict=True)]
        self.machine.steal = spent[_STEAL] / max(1, sum(spent[:_GUEST]))
        self.machine.load_after = os.getloadavg()[0]
        self.machine.seconds = time.monotonic() - self._begun
        return self.machine


def _processor_times() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _commit() -> str:
    """That of the checkout, and whether files differ from it."""
    command = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
