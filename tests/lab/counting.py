"""What processes ask of the kernel: their system calls, as strace(1) sees them, and how often they woke up."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from lab.server import eventually

_CALL = re.compile(r"^\d+ +(\w+)\(")


@contextlib.contextmanager
def counted(pids: Iterable[int], record: Path) -> Iterator[Counter[str]]:
    """The calls that these processes, and what they fork, end within the `with`; filled in at its end."""
    found: Counter[str] = Counter()
    attach = [argument for pid in pids for argument in ("-p", str(pid))]
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", str(record), *attach])
    try:
        for pid in attach[1::2]:
            eventually(partial(_traced, pid, tracer.pid), f"strace has process {pid}")
        yield found
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait()
    found.update(_calls(record.read_text()))


def _traced(pid: str, tracer: int) -> bool:
    return f"TracerPid:\t{tracer}\n" in Path(f"/proc/{pid}/status").read_text()


def _calls(text: str) -> Iterator[str]:
    """A call that others' lines interrupt is counted once, where it begins."""
    return (found[1] for line in text.splitlines() if (found := _CALL.match(line)))


def switches(pid: int) -> int:
    """How often the threads of a process have been given a processor so far (proc_pid_status(5))."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        total += sum(int(number) for number in re.findall(r"ctxt_switches:\t(\d+)", status.read_text()))
    return total
