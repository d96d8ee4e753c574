"""A guest of one test, restored from the saved state, and what a test does with it."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.guest.link import GuestError, Link
from lab.guest.network import Network
from lab.guest.qemu import DIE_WITH_US, Qemu
from lab.guest.state import State
from lab.server import eventually

SETTLE = 5.0
"""Seconds that the guest has to finish what goes on after a test."""

MOUNT_CHECKOUT = "mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,ro,msize=262144 checkout /imageapi"
"""It would keep the state from being saved, so it comes after a restore."""


class Guest:
    """A small Debian that runs a stock kernel, with this checkout at /imageapi, read only."""

    def __init__(self, link: Link, machine: Qemu, directory: Path) -> None:
        self.link = link
        self.machine = machine
        self.api_socket = directory / "api"
        self._expected: set[str] = set()

    @functools.cached_property
    def kernel(self) -> tuple[int, ...]:
        """Its version: (6, 12)."""
        return tuple(int(part) for part in self.run("uname", "-r").split(".")[:2])

    # ------------------------------------------------------------------------------------------------- commands

    def run(self, *argv: str, stdin: str | bytes = b"", timeout: float = 60.0, check: bool = True) -> str:
        """Run a command, and return what it printed.

        Raises: GuestError with what it complained, unless not `check`; TimeoutError.
        """
        done = self.complete(*argv, stdin=stdin, timeout=timeout)
        if check and done.returncode:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise GuestError(f"{' '.join(argv)} ended with {done.returncode}: {said}")
        return done.stdout.decode(errors="replace")

    def complete(
        self, *argv: str, stdin: str | bytes = b"", timeout: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command, and return all that it left. Raises: TimeoutError."""
        return self.link.run(list(argv), stdin.encode() if isinstance(stdin, str) else stdin, timeout)

    def sh(self, script: str, timeout: float = 60.0) -> str:
        """Run lines of shell; the first that fails ends them. Raises: GuestError, TimeoutError."""
        return self.run("sh", "-ec", script, timeout=timeout)

    def start(self, *argv: str, log: str = "/dev/null") -> int:
        """Run a command in the background, and return its pid; `log` gets what it writes."""
        script = 'log=$0; setsid "$@" </dev/null >>"$log" 2>&1 & echo $!'
        return int(self.run("sh", "-c", script, log, *argv))

    def await_end(self, pid: int, seconds: float = 20.0) -> None:
        """Raises: GuestError, when the process still lives."""
        self.run("timeout", str(seconds), "tail", f"--pid={pid}", "-s", "0.02", "-f", "/dev/null", timeout=seconds + 9)

    def kill(self, pid: int, signal: str = "KILL") -> None:
        """End a process, and wait for its end."""
        self.run("kill", f"-{signal}", str(pid))
        self.await_end(pid)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call `module:function` of the checkout (`src` and `tests`) in the guest, with what JSON can carry."""
        return self.link.call(name, *arguments)

    def reboot(self) -> None:
        """Ask systemd to, and return when it is up again."""
        self.run("systemctl", "reboot")
        self.machine.await_event("RESET")
        self.link.wake()
        self.run(*MOUNT_CHECKOUT.split())

    def save(self, state: State) -> None:
        """Make this a state, whose memory it was restored from to `keep`. The guest stops."""
        self.link.close()
        self.machine.save(state.devices)

    # ---------------------------------------------------------------------------------------------------- files

    def put(self, source: Path, path: str) -> str:
        """Copy a file of this machine into the guest, and return where it is. Some 100 MB/s."""
        return self.write(path, source.read_bytes())

    def write(self, path: str, content: str | bytes) -> str:
        self.run("sh", "-c", 'cat >"$0"', path, stdin=content)
        return path

    def read(self, path: str) -> bytes:
        """Raises: GuestError, when there is none."""
        done = self.complete("cat", path)
        if done.returncode:
            raise GuestError(done.stderr.decode(errors="replace").strip())
        return done.stdout

    # -------------------------------------------------------------------------------------------- what is left

    def look(self) -> set[str]:
        """Mounts, devices, keys, sessions, processes, control groups, and files in the usual places."""
        return set(self.call("lab.guest.traces:traces"))

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """What appears within it belongs to the test's own surroundings (a server it starts), and may stay."""
        before = self.look()
        yield
        self._expected |= self.look() - before

    def left(self, before: set[str], settle: float = SETTLE) -> list[str]:
        """What is there now, and was not, and does not go within so many seconds."""
        end = time.monotonic() + settle
        while (new := self.look() - before - self._expected) and time.monotonic() < end:
            time.sleep(0.05)
        return [self.call("lab.guest.traces:described", trace) for trace in sorted(new)]


@contextlib.contextmanager
def restored(state: State, network: Network, directory: Path, *, keep: bool = False) -> Iterator[Guest]:
    """A guest, and at the end nothing of it. Its sockets and logs are in `directory`. With `keep` the state's own
    memory is written to, so that `Guest.save` can make another state of it."""
    port = network.new_port()
    machine = Qemu(state.shape, state.memory, directory, prefix=network.enter)
    disk = _copy(state.disk, directory / "disk") if state.disk else None
    machine.start(incoming=True, share=keep, ports=(f"tcp:127.0.0.1:{port}-:80",), disk=disk)
    with contextlib.ExitStack() as undo:
        undo.callback(machine.stop)
        machine.load(state.devices)
        link = Link(machine)
        undo.callback(link.close)
        link.wake()
        guest = Guest(link, machine, directory)
        guest.run(*MOUNT_CHECKOUT.split())
        undo.enter_context(_forwarded(guest.api_socket, port, network))
        yield guest


def _copy(disk: Path, to: Path) -> Path:
    subprocess.run(["cp", "--sparse=always", disk, to], check=True)
    return to


@contextlib.contextmanager
def _forwarded(path: Path, port: int, network: Network) -> Iterator[None]:
    """A Unix socket of this side for a port on the other: clients need not enter the lab's network."""
    listen = f"UNIX-LISTEN:{path},fork,unlink-early"
    relay = subprocess.Popen([*DIE_WITH_US, *network.enter, "socat", listen, f"TCP:127.0.0.1:{port}"])
    try:
        eventually(path.exists, "HTTP is forwarded to the guest")
        yield
    finally:
        relay.kill()
        relay.wait()
