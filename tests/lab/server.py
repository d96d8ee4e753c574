"""A server of one test: the real process, on a Unix socket in the test's run directory, and a client for it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab.images import small_image
from lab.machine import Machine
from lab.processes import find

SOURCE = Path(__file__).parents[2] / "src"
PATIENCE = 20.0
"""Seconds until what should happen is given up."""


def eventually(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """What `condition` returns once that is true.

    Raises: AssertionError naming `what` was waited for.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.005)
    return value


class Api:
    """What tests ask of a server, over its Unix socket."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.http = self.client()

    def client(self) -> httpx.Client:
        """A client of its own, for a thread of its own."""
        transport = httpx.HTTPTransport(uds=str(self.socket), verify=False)  # or it reads all certificates: 20 ms
        return httpx.Client(transport=transport, base_url="http://localhost/imageapi/v1", timeout=60)

    def reconnect(self) -> None:
        """With the server of before, all connections have ended."""
        self.http.close()
        self.http = self.client()

    def get(self, path: str) -> Any:
        return _good(self.http.get(path), 200)

    def post(self, path: str, body: Any) -> Any:
        return _good(self.http.post(path, json=body), 201)

    def delete(self, path: str) -> Any:
        return _good(self.http.delete(path), 200)

    def refused(self, method: str, path: str, code: int, body: Any = None) -> dict[str, Any]:
        """The problem that a request is answered with; it must have this code."""
        answer = self.http.request(method, path, json=body)
        problem: dict[str, Any] = answer.json()
        assert (answer.status_code, problem.get("code")) == (code, code), problem
        assert answer.headers["content-type"] == "application/json"
        assert problem["message"]
        return problem

    def await_state(self, container: int | str, *states: str) -> Any:
        """The container once it is in one of the states."""
        return eventually(
            lambda: (box := self.get(f"/container/{container}"))["state"] in states and box,
            f"container {container} is {' or '.join(states)}",
        )

    def everything(self) -> list[Any]:
        """All that the server has."""
        return [item for collection in ("container", "mount", "attach") for item in self.get(f"/{collection}")]

    def leaks(self) -> list[Any]:
        """What the server's own report finds. Devices that a neighbour's dead storage makes hang are none of ours."""
        return [one for one in self.get("/check") if not one["problem"].startswith("could not look at")]

    def clear(self) -> None:
        """Delete all, from the top. What a client has hung up on may still be on its way out, or in."""
        eventually(self._emptied, "all that was made can be deleted")

    def _emptied(self) -> bool:
        for box in self.get("/container"):
            self.http.delete(f"/container/{box['id']}?force=true")
        for collection in ("mount", "attach"):
            for one in reversed(self.get(f"/{collection}")):
                self.http.delete(f"/{collection}/{one['id']}")
        return self.everything() == []


@contextlib.contextmanager
def posting(server: Api, path: str, body: Any) -> Iterator[Future[httpx.Response]]:
    """A POST whose answer is not waited for within: the future of it."""
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        yield pool.submit(client.post, path, json=body)


def _good(answer: httpx.Response, code: int) -> Any:
    assert answer.status_code == code, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


class Server(Api):
    """`imageapi-server` with a run directory of its own. It may be stopped, killed and started again."""

    module = "imageapi.server"
    """What is run."""
    package = SOURCE
    """Where its code is."""

    def __init__(self, run_dir: Path, *options: str) -> None:
        super().__init__(run_dir / "api.sock")
        self.run_dir = run_dir
        self.enter: list[str] = []
        """The beginning of the command, one that executes what follows: what the process has it has from there."""
        self.log = run_dir / "server.log"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.package)}

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def command(self) -> list[str]:
        where = ("--scheme", "unix", "--socket-path", str(self.socket), "--run-dir", str(self.run_dir))
        return [sys.executable, "-m", self.module, *where, *self._options]

    def start(self, *, pass_fds: Sequence[int] = ()) -> None:
        """Returns when it answers."""
        self.launch(pass_fds)
        eventually(self._listens, "the server listens")
        self.get("/container")

    def launch(self, pass_fds: Sequence[int] = ()) -> None:
        """Start it, and wait for nothing."""
        command = [*self.enter, *self.command]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd="/", env=self.environment, pass_fds=pass_fds
            )

    def _listens(self) -> bool:
        """It does so before it has looked at what the last one left; what is asked meanwhile is answered after."""
        assert self.runs, f"the server ended:\n{self.log.read_text()}"
        return self._accepts()

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def stop(self) -> None:
        """The normal end: containers run on."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE)
            self._process = None
            self.reconnect()

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends by itself."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self.reconnect()
        return not self.runs

    @property
    def supervisor(self) -> int:
        """The pid of this run directory's supervisor: the holder of its lock (proc_locks(5))."""
        lock = os.stat(self.run_dir / "supervisor" / "lock")
        device = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return next(int(fields[4]) for fields in held if fields[5] == device)


@contextlib.contextmanager
def running(run_dir: Path, *options: str) -> Iterator[Server]:
    """A server, and at the end nothing of it: what the test left in it is deleted."""
    server = Server(run_dir, *options)
    with running_as(server):
        yield server


@contextlib.contextmanager
def running_as(server: Server) -> Iterator[None]:
    """The same for a server of another kind."""
    try:
        server.start()
        yield
        if not server.runs:
            server.start()
        server.clear()
        assert not (left := server.leaks()), left
    finally:
        server.stop()
        server.http.close()


@contextlib.contextmanager
def shared(machine: Machine, run_dir: Path, *options: str) -> Iterator[Server]:
    """A server for the tests of a module that only ask and are refused; each gets it `lent`."""
    with machine.lending(), running(run_dir, *options) as server:
        yield server


@contextlib.contextmanager
def lent(server: Server) -> Iterator[Server]:
    """A shared server, which has nothing when the test is over."""
    yield server
    server.clear()
    server.reconnect()


@pytest.fixture
def server(run_dir: Path) -> Iterator[Server]:
    """A server of the test's own."""
    with running(run_dir) as server:
        yield server


# --------------------------------------------------------------------------------------------- what tests ask for


def image(**more: Any) -> dict[str, Any]:
    """A loop attachment of the small image, as its kind route takes it."""
    return {"path": str(small_image()), "base": "root", "ro": True, **more}


def squashfs(**more: Any) -> dict[str, Any]:
    """A mount of the small image, all in one."""
    mount = {"fs_type": "squashfs", "mount_options": ["ro"], "loopback": image(**more)}
    return {"kind": "loopback", "loopback": mount}


def writable() -> dict[str, Any]:
    """An overlay on the small image, all in one."""
    return {"kind": "overlay", "overlay": {"lower": [squashfs()]}}


def box(command: str, **more: Any) -> dict[str, Any]:
    """A container on an overlay on the small image, all in one, and running."""
    return {"mount": writable(), "command": command, "state": "running", **more}


def hooked(package: Path, variable: str, orders: Path) -> dict[str, str]:
    """The environment of a server whose module is of this lab, and reads its orders in a file that a variable names."""
    path = ":".join(map(str, (package, SOURCE.parent / "tests", SOURCE.parent)))
    return {**os.environ, variable: str(orders), "PYTHONPATH": path}


def other_release(place: Path) -> Path:
    """A copy of the package that says it is of another release."""
    shutil.copytree(SOURCE, place)
    file = place / "imageapi/__init__.py"
    file.write_text(re.sub(r'__version__ = "(.*)"', r'__version__ = "\1+other"', file.read_text()))
    return place


FOREVER = "/bin/sleep 1000000"


def copy_of_small_image(directory: Path, name: str = "image.sqsh") -> Path:
    """An image file of the test's own, to be spoilt."""
    return Path(shutil.copy(small_image(), directory / name))


def alive(pid: int) -> bool:
    """Whether the process lives: a zombie does not."""
    return find(pid) is not None


def kill(pid: int) -> None:
    """SIGKILL, and wait for the end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid), f"process {pid} is gone")
