"""The life of a container as its record has it, and the times in it."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta

from imageapi.records import AnyRecord, Run
from imageapi.runtime.clock import written


def since_boot() -> float:
    """Seconds, by a clock that all processes share, nobody sets, and that goes on while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def age(start_time: int) -> float:
    """How long something is there that began so many clock ticks after the boot, in seconds: at most a tick less."""
    return since_boot() - start_time / os.sysconf("SC_CLK_TCK")


def time_of(start_time: int) -> str:
    """When that was, as `now` would have said it; up to a tick before."""
    return written(datetime.now(UTC) - timedelta(seconds=age(start_time)))


def run_of(record: AnyRecord) -> Run:
    """The container's life; it has one as soon as it is made."""
    if record.run is None:
        raise ValueError(f"{record.key} has not been made yet")
    return record.run
