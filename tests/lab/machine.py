"""What a test leaves behind: the machine is looked at before and after, and every difference is named.

Looked at are mounts, loop devices, control groups, processes, this process' descriptors, and files in the places where
ours appear. What belongs to another test run on the same machine is left out; so is what a service that outlives a
test is made of, once it is registered by `Machine.expecting`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lab import table
from lab.processes import Process, find, processes
from lab.session import CLAIM, PREFIX, USUAL, Session, neighbours
from tools import cache

DEADLINE = 5.0
"""Seconds that the kernel and ending processes have to finish what goes on after the test."""


class Trace(NamedTuple):
    """One thing that can be left behind. Two looks at the same thing give equal traces."""

    kind: str
    identity: str

    def __str__(self) -> str:
        return f"{self.kind} {self.identity}"


LASTING = ("mount", "loop device")
"""Kinds of which a test may not take away either."""


class Machine:
    """This machine, as one test run sees it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.expected: set[Trace] = set()
        self._lends = False

    def look(self) -> set[Trace]:
        """All traces that are there now."""
        found = {*self._mounts(), *self._loops(), *self._cgroups(), *_descriptors(), *self._files()}
        return found | {_process_trace(process) for process in processes().values()}

    def difference(self, before: set[Trace]) -> list[str]:
        """What is there now and was not, and what lasting thing is gone; a sentence each."""
        now = self.look()
        new = {trace for trace in now - before - self.expected if self._is_ours(trace)}
        gone = {trace for trace in before - now - self.expected if trace.kind in LASTING}
        return sorted([*(f"left behind: {_described(trace)}" for trace in new), *(f"taken away: {x}" for x in gone)])

    def settle(self, before: set[Trace], deadline: float | None = None) -> list[str]:
        """The difference that stays. What is only on its way out has until the deadline (seconds) to go."""
        end = time.monotonic() + (DEADLINE if deadline is None else deadline)
        if not self.difference(before):
            return []
        gc.collect()  # a descriptor held by a cycle of garbage is not leaked
        while (left := self.difference(before)) and time.monotonic() < end:
            time.sleep(0.02)
        return left

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Within it a service starts that outlives the test (a Ceph cluster): what appears is expected from now on.

        Its restart is expected only when it happens within one again.
        """
        before = self.look()
        yield
        self.expected |= {trace for trace in self.look() - before if self._is_ours(trace)}

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        """Within it a server is shared by tests: its workers, and what its supervisor keeps ready, come and go."""
        self._lends = True
        yield
        self._lends = False

    def _mounts(self) -> Iterator[Trace]:
        for line in table.lines():
            own, _, rest = line.partition(" - ")
            if not self._is_foreign(line):
                yield Trace("mount", f"{own} {' '.join(rest.split()[:2])}")

    def _loops(self) -> Iterator[Trace]:
        """One whose file was on what is not mounted any more has lost its path, and may be another run's."""
        pathless = any(neighbours(self.session))
        for device, file in backing_files():
            if not self._is_foreign(file) and not (pathless and _lacks_path(file)):
                yield Trace("loop device", f"{device} on {file}")

    def _is_foreign(self, text: str) -> bool:
        """Whether it is another run's, or of an image that is being built."""
        return self.session.concerns_a_neighbour(text) or str(cache.directory()) in text

    def _cgroups(self) -> Iterator[Trace]:
        others = [instance for place in neighbours(self.session) for instance in _instances(place)]
        for path in _groups():
            if not any(instance in path for instance in others):
                yield Trace("control group", path)

    def _files(self) -> Iterator[Trace]:
        """Those with our name in the usual places, and all that lies directly in this run's own."""
        usual = (path for place in ("/run", "/tmp", "/var/tmp", "/dev/shm") for path in Path(place).glob("imageapi*"))
        inside = (path for place in self.own_places for path in place.glob("*") if path.name != "pytest")
        for path in (*usual, *inside, *Path(USUAL).glob("*/*")):
            if not self.session.concerns_a_neighbour(str(path)):
                yield Trace("file", str(path))

    @property
    def own_places(self) -> set[Path]:
        return {self.session.fast, self.session.disk}

    def _is_ours(self, trace: Trace) -> bool:
        """Whether something new is of this run's making. Processes and control groups come and go on a machine by
        themselves."""
        if trace.kind == "process":
            process = _process_of(trace)
            lent = process is not None and self._lends and process.name.startswith("imageapi-")
            return process is not None and not lent and process.belongs_to(self.session)
        if trace.kind == "control group":
            return "imageapi" in trace.identity
        return True

    # ------------------------------------------------------------------------------------------ the end

    def tidy(self) -> list[str]:
        """At the end of a run: remove what failed or interrupted tests left of this run, and its places. A process that
        may be another run's is left alone.

        Returns what would not go.
        """
        for process in processes().values():
            if process.pid != os.getpid() and process.is_surely_of(self.session):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        for mountpoint in reversed(self._own_mounts()):
            subprocess.run(["umount", mountpoint], check=False, capture_output=True)
        for trace in self._loops():
            if self.session.name in trace.identity:
                subprocess.run(["losetup", "-d", trace.identity.split()[0]], check=False, capture_output=True)
        return [stuck for place in self.own_places for stuck in self.remove(place)]

    def _own_mounts(self) -> list[str]:
        mountpoints = (line.split()[4] for line in table.lines())
        return [mountpoint for mountpoint in mountpoints if f"/{self.session.name}/" in f"{mountpoint}/"]

    def remove(self, directory: Path) -> list[str]:
        """Remove a directory of this run's, unless something is still mounted in it: that would be emptied too. A
        supervisor that is just ending may write there once more.

        Returns the mountpoints in the way.
        """
        end = time.monotonic() + DEADLINE
        while not (mounted := [path for path in self._own_mounts() if f"{path}/".startswith(f"{directory}/")]):
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists() or time.monotonic() > end:
                break
            time.sleep(0.02)
        return mounted


def _lacks_path(file: str) -> bool:
    """Whether a file is said to be directly in the root, and is not: its path ends at a mount that is not there."""
    return file == "/" or (os.path.dirname(file) == "/" and not os.path.lexists(file))


def backing_files() -> Iterator[tuple[str, str]]:
    """The loop devices that have a file, and which; another run's may go meanwhile. One without has no directory
    `loop`: a busy machine has hundreds of those. Asked is sysfs, since a device on dead storage hangs."""
    for name in os.listdir("/sys/block"):
        if name.startswith("loop") and os.path.isdir(f"/sys/block/{name}/loop"):
            with contextlib.suppress(OSError):
                yield f"/dev/{name}", Path(f"/sys/block/{name}/loop/backing_file").read_text().strip()


def _process_trace(process: Process) -> Trace:
    return Trace("process", f"{process.pid} started at tick {process.started}")


def _described(trace: Trace) -> str:
    """With what is no part of its identity, since that may change: a process's command line, and what a directory has,
    which tells who has made it."""
    if trace.kind == "file" and os.path.isdir(trace.identity):
        return f"{trace}: {sorted(str(path.relative_to(trace.identity)) for path in Path(trace.identity).rglob('*'))}"
    process = _process_of(trace)
    return f"{trace}: {process.command}" if process else str(trace)


def _process_of(trace: Trace) -> Process | None:
    return find(int(trace.identity.split()[0])) if trace.kind == "process" else None


def _descriptors() -> Iterator[Trace]:
    """All but those that keep an image from being removed, until the process ends."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            target = os.readlink(f"/proc/self/fd/{number}")
            if not target.endswith(cache.NOTE):
                yield Trace("descriptor", f"{number} of the test process: {target}")


def _groups() -> Iterator[str]:
    mounts = (line.split() for line in table.lines("/proc/mounts"))
    for hierarchy in [fields[1] for fields in mounts if fields[2] in ("cgroup", "cgroup2")]:
        yield from (f"{parent}/{name}" for parent, names, _ in os.walk(hierarchy) for name in names)


def _instances(place: Path) -> Iterator[str]:
    """What marks the control groups of another run: its token (with what precedes it in a mark or a group's name), and
    the random id of each server it has started. Nothing deeper is read: it may be a dead mount."""
    token = place.name.removeprefix(PREFIX)
    yield from (f"imageapi{separator}{token}" for separator in ":-_")
    usual = [Path(USUAL, "instance")] if (place / CLAIM).exists() else []
    for file in (*place.glob("*/instance"), *place.glob("pytest/*/instance"), *usual):
        with contextlib.suppress(OSError):
            yield file.read_text().strip() or token
