"""The service that is measured: the real server with a run directory of its own, and the processes it is made of."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.bench.client import Client, Refused, request

SERVER = Path(sys.executable).parent / "imageapi-server"
PATIENCE = 30.0
"""Seconds until something that should happen is given up."""
LOOK = 0.0005
"""Seconds between two looks at whether the server listens: without any this would take a processor from it."""
COLLECTIONS = ("container", "mount", "attach")


class Service:
    """A server that runs. `started` and `answered` are when it was executed and when its first answer was there (ns of
    CLOCK_MONOTONIC)."""

    answered: int

    def __init__(self, directory: Path, *options: str) -> None:
        self.run_dir = directory
        self.socket = directory / "socket"
        command = [str(SERVER), "--run-dir", str(directory), "--socket-path", str(self.socket), "--log-level", "WARN"]
        self.started = time.monotonic_ns()
        self._process = subprocess.Popen([*command, *options])

    @property
    def pid(self) -> int:
        return self._process.pid

    def connect(self) -> Client:
        """A connection, as soon as there can be one.

        Raises: TimeoutError; Refused when the server has ended.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return Client(self.socket)
            if self._process.poll() is not None:
                raise Refused("the server has ended; its words are above")
            time.sleep(LOOK)
        raise TimeoutError("the server does not listen")

    def stop(self) -> None:
        """End it, and wait until the last of its processes has ended.

        Raises: TimeoutError when one stays.
        """
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while self.processes():
            if time.monotonic() > deadline:
                raise TimeoutError(f"still there after the server's end: {self.processes()}")
            time.sleep(0.01)

    def processes(self) -> list[int]:
        """The pids of server, zygote, workers, supervisor and its child in waiting. All of them have the server's
        command line, in which the run directory stands; what a container executes has its own."""
        return [pid for pid in map(int, _numbers("/proc")) if str(self.run_dir) in _text(pid, "cmdline")]

    def memory(self, field: str = "Pss") -> dict[str, float]:
        """The PSS of these processes in kB (proc_pid_smaps(5)), by their names: what they share is counted once. What
        another program shares with them, as this one does the interpreter's code, is counted in part; `Pss_Anon` leaves
        out all that is of files."""
        used: dict[str, float] = {}
        for pid in self.processes():
            if found := re.search(rf"^{field}: +(\d+)", _text(pid, "smaps_rollup"), re.MULTILINE):
                name = _text(pid, "comm").strip()
                used[name] = used.get(name, 0) + int(found[1])
        return used

    def check_nothing_left(self, client: Client) -> None:
        """Raises: Refused, naming what a figure has left: in a list, mounted, or attached to a loop device."""
        listed = [one for kind in COLLECTIONS for one in client.ask(request("GET", f"/{kind}")).json()]
        mounted = [line for line in _text("self", "mountinfo").splitlines() if f"{self.run_dir}/mounts/" in line]
        backing = Path("/sys/block").glob("loop*/loop/backing_file")
        attached = [path for path in backing if str(self.run_dir.parent) in _read(path)]
        if left := [*map(str, listed), *mounted, *map(str, attached)]:
            raise Refused(f"left behind: {'; '.join(left[:3])} ({len(left)} things)")


@contextlib.contextmanager
def running(place: Path, *options: str) -> Iterator[tuple[Service, Client]]:
    """A service, and a connection to it. In the end what was made in it must be gone, and then it goes too."""
    service = Service(Path(tempfile.mkdtemp(prefix="run-", dir=place)), *options)
    try:
        with service.connect() as client:
            try:
                client.ask(request("GET", "/container"))
                service.answered = time.monotonic_ns()
                yield service, client
                service.check_nothing_left(client)
            finally:
                with service.connect() as another:  # the first may have an answer under way that nobody waits for
                    clear(another)
    finally:
        service.stop()
        shutil.rmtree(service.run_dir)


def clear(client: Client) -> None:
    """Delete all that is there, from the top."""
    for kind in COLLECTIONS:
        for one in reversed(client.ask(request("GET", f"/{kind}")).json()):
            with contextlib.suppress(Refused):
                client.ask(request("DELETE", f"/{kind}/{one['id']}?force=true"))


def stamps(logfile: str) -> list[int]:
    """The moments (ns of CLOCK_MONOTONIC) that a container's command has written so far."""
    return [int(line) for line in Path(logfile).read_text().splitlines() if line.isdigit()]


def await_stamps(logfile: str, count: int) -> list[int]:
    """The same, once there are so many.

    Raises: TimeoutError.
    """
    deadline = time.monotonic() + PATIENCE
    while len(found := stamps(logfile)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"there are {len(found)} times in {logfile}, not {count}")
    return found


def nest(image: Path, command: str, **more: Any) -> dict[str, Any]:
    """A container on an overlay on a squashfs on a loop device, all in one."""
    attachment = {"path": str(image), "base": "root", "ro": True}
    lower = {"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": attachment}}
    return {"mount": {"kind": "overlay", "overlay": {"lower": [lower]}}, "command": command, **more}


def _numbers(directory: str) -> list[str]:
    return [path.name for path in Path(directory).iterdir() if path.name.isdigit()]


def _text(pid: int | str, name: str) -> str:
    return _read(Path(f"/proc/{pid}/{name}"))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process, or the loop device, has gone
        return ""
