"""The processes of this machine, and which of them a test run has started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lab.session import VARIABLE, Session

OUR_COMMANDS = ("imageapi", "qemu-storage-da")
"""How the name of a process of ours begins; the kernel cuts it at 15 characters."""


class Process(NamedTuple):
    """One that lives. `started` is in clock ticks since boot: with the pid it names a process for good."""

    pid: int
    parent: int
    started: int
    name: str

    @property
    def command(self) -> str:
        """Its command line; its name where it has none."""
        return self._read("cmdline").replace("\0", " ").strip() or f"[{self.name}]"

    def belongs_to(self, session: Session) -> bool:
        """Whether the run has started it, as far as can be told: one that only has our name counts too, unless
        somebody's shell started it."""
        if self.is_surely_of(session):
            return True
        environment = self._read("environ")
        by_hand = "HOME=" in environment or VARIABLE in environment
        return self.name.startswith(OUR_COMMANDS) and not (
            by_hand or session.concerns_a_neighbour("\n".join(self._ties()))
        )

    def is_surely_of(self, session: Session) -> bool:
        """Whether it descends from this process, or has the run's token in its environment, or works in the run's
        places."""
        if f"{VARIABLE}={session.token}" in self._read("environ") or os.getpid() in self._ancestors():
            return True
        return session.name in "\n".join(self._ties())

    def _ancestors(self) -> Iterator[int]:
        process: Process | None = self
        while process is not None and process.pid > 1:
            yield (pid := process.parent)
            process = find(pid)

    def _ties(self) -> Iterator[str]:
        """What ties it to places: its arguments, directories, open files, and the mounts it sees but we do not."""
        yield self._read("cmdline")
        for link in ("cwd", "root", "exe"):
            yield self._link(link)
        with contextlib.suppress(OSError):
            yield from (self._link(f"fd/{number}") for number in os.listdir(f"/proc/{self.pid}/fd"))
        if self._link("ns/mnt") != os.readlink("/proc/self/ns/mnt"):
            yield self._read("mountinfo")

    def _read(self, name: str) -> str:
        try:
            return Path(f"/proc/{self.pid}/{name}").read_text(errors="replace")
        except OSError:  # it has ended, or is another user's
            return ""

    def _link(self, name: str) -> str:
        try:
            return os.readlink(f"/proc/{self.pid}/{name}")
        except OSError:
            return ""


def processes() -> dict[int, Process]:
    """All that live. State Z is dead: an init that is slow to reap is nobody's fault."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return {pid: process for pid in pids if (process := find(pid)) is not None}


def find(pid: int) -> Process | None:
    """proc_pid_stat(5): the name stands in parentheses and may hold any character."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    except OSError:
        return None
    fields = after.split()
    if fields[0] in "ZX":
        return None
    return Process(pid, int(fields[1]), int(fields[19]), before.partition("(")[2])
