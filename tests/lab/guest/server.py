"""The real server, in the guest. Tests speak to it as to one on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx

from lab.guest.guest import Guest, restored
from lab.guest.link import GuestError
from lab.guest.network import Network
from lab.guest.state import State
from lab.images import small_image
from lab.server import SOURCE, Api, eventually
from tools import images

RUN_DIR = "/run/imageapi"
LOG = "/run/imageapi-server.log"
STARTS = 60.0
"""Seconds; under emulation two or three."""
PID = "pid"
"""The file beside a saved state that has the server's pid."""


class GuestServer(Api):
    """`imageapi-server` of this checkout. It may be stopped, killed and started again."""

    def __init__(self, guest: Guest, *options: str, pid: int = 0) -> None:
        """With `pid` it runs already."""
        super().__init__(guest.api_socket)
        self.guest = guest
        self.pid = pid
        self._options = options

    def start(self) -> None:
        """Returns when it answers."""
        command = ["python3", "-m", "imageapi.server", "--scheme", "unix", "--socket-path", f"{RUN_DIR}/api.sock"]
        self.pid = self.guest.start(*command, "--run-dir", RUN_DIR, *self._options, log=LOG)
        eventually(self._answers, "the server in the guest answers", STARTS)

    def _answers(self) -> bool:
        """What forwards to the server is there before it: the connection is then closed without an answer."""
        try:
            return self.http.get("/container").status_code == 200
        except httpx.TransportError:
            if self.guest.complete("test", "-d", f"/proc/{self.pid}").returncode:
                raise GuestError(f"the server ended:\n{self.log()}") from None
            return False

    def log(self) -> str:
        """What it wrote."""
        return self.guest.read(LOG).decode()

    def stop(self) -> None:
        """The normal end: containers run on."""
        self._end("TERM")

    def kill(self) -> None:
        """SIGKILL."""
        self._end("KILL")

    def _end(self, signal: str) -> None:
        if self.pid:
            self.guest.kill(self.pid, signal)
            self.pid = 0
            self.reconnect()

    def remove(self) -> None:
        """Delete all that the test left in it, end it, and remove its files."""
        if not self.pid:
            self.start()
        self.clear()
        self.stop()
        self.http.close()
        self.guest.run("rm", "-rf", "--one-file-system", RUN_DIR, LOG)
        self.guest.run("mkdir", RUN_DIR)


@contextlib.contextmanager
def running(guest: Guest, *options: str) -> Iterator[GuestServer]:
    """A server with options of its own, in a guest without one. What the test left in it is deleted at the end."""
    server = GuestServer(guest, *options)
    server.start()
    yield server
    server.remove()


# ----------------------------------------------------------------------------------- a state in which it runs


def serving(state: State, network: Network, directory: Path) -> tuple[State, int]:
    """A state like `state` in which the server runs and has served, and its pid. It is made on first use of this code,
    since starting it under emulation takes seconds; `directory` is for what is there only meanwhile."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in (*sorted(SOURCE.rglob("*.py")), Path(__file__))))
    made_of = f"{state.directory} {state.memory.stat().st_mtime_ns} {code.hexdigest()}"
    saved = State(state.shape, images.cached("guest-serving", "d", made_of, partial(_save, state, network, directory)))
    return saved, int((saved.directory / PID).read_text())


def _save(state: State, network: Network, directory: Path, to: Path) -> None:
    """Its code is in the guest's memory, since what is shared keeps a state from being saved; what was compiled of it
    here is known by its times."""
    saved = State(state.shape, to)
    to.mkdir()
    for name in ("memory", "devices"):
        subprocess.run(["cp", "--sparse=always", state.directory / name, to / name], check=True)
    with restored(saved, network, directory, keep=True) as guest:
        guest.sh("cp -a /imageapi/src /lab/src; umount /imageapi")
        server = GuestServer(guest)
        server.start()
        _serve_once(server)
        (to / PID).write_text(str(server.pid))
        guest.save(saved)


def _serve_once(server: GuestServer) -> None:
    """What is imported for the first request, and for the first look at the host, is imported; after a look that took
    long the server waits ten times as long, and no guest shall begin with that. The connection is closed before the
    state is saved."""
    path = server.guest.put(small_image(), "/tmp/image")
    mount = {"fs_type": "squashfs", "mount_options": ["ro"], "loopback": {"path": path, "base": "root", "ro": True}}
    for _ in range(2):
        made = server.post("/mount/loopback", mount)
        server.guest.run("umount", made["mountpoint"])
        eventually(partial(_has_problem, server, made["id"]), "its end is seen", 3 * STARTS)
        server.delete(f"/mount/loopback/{made['id']}")
    server.guest.run("rm", path)
    server.http.close()


def _has_problem(server: GuestServer, mount: int) -> bool:
    return "problem" in server.get(f"/mount/{mount}")
