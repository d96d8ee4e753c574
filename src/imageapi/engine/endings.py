"""How the end of a container is told: whether it is as it should be, and what is said of it if not."""

from __future__ import annotations

import os
import signal

from imageapi.errors import from_oserror
from imageapi.records import AnyRecord, Run

HALTED = (128 + 1, 128 + 2)
"""How a pid namespace ends whose first process called reboot(2): by SIGHUP to restart, by SIGINT to halt."""
LINES_LOST = "lines of its log are lost"


def is_clean(record: AnyRecord, run: Run, exit_code: int | None) -> bool:
    """Whether a container has ended as it should: asked to, by itself with status 0, or as a halted system does."""
    return run.stop_requested or exit_code == 0 or (record.spec.systemd and exit_code in HALTED)


def complaint(run: Run, exit_code: int | None, *, bereft: bool) -> str:
    """What is to be said of an end that nobody asked for; `bereft`: its image had no storage helper then."""
    if exit_code is None:
        return "it ended while nobody watched, so that its exit code is not known"
    how = f"was killed by signal {exit_code - 128}" if exit_code > 128 else f"exited with status {exit_code}"
    if exit_code == 128 + signal.SIGBUS:
        how += " (SIGBUS: a page of a file could not be had, mostly of its image: see to the store of that)"
    if bereft:
        how += " while its image could not be read, since its storage helper had ended"
    return f"its command {how}; {run.logfile} has its output"


def log_problem(run: Run, trouble: int) -> str | None:
    """What is to be said of a log that does not take what belongs in it: `trouble` is an errno, or 0."""
    if not trouble:
        return None
    lost = OSError(trouble, os.strerror(trouble), run.logfile)
    return from_oserror(lost, LINES_LOST).message


def is_log_problem(problem: str) -> bool:
    """Whether that was said."""
    return problem.startswith(f"{LINES_LOST}: ")
