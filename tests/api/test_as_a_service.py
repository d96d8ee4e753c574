"""The server as a service of systemd's: what it says, how it reloads, its sockets, and the host's end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from imageapi.linux import mountinfo
from lab.server import FOREVER, Server, alive, box, eventually, running, squashfs

pytestmark = pytest.mark.api


class Manager:
    """What systemd is for its service. `words` are those that have been heard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.words: list[str] = []
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(str(path))
        self._channel.settimeout(20)

    def hear(self, word: str) -> list[str]:
        """The words of the next datagram that has this one."""
        while True:
            said = self._channel.recv(4096).decode().split("\n")
            self.words += said
            if word in said:
                return said

    def close(self) -> None:
        self._channel.close()


@pytest.fixture
def manager(run_dir: Path) -> Iterator[Manager]:
    manager = Manager(run_dir / "notify")
    yield manager
    manager.close()


@pytest.fixture
def service(run_dir: Path, manager: Manager) -> Iterator[Server]:
    """A server that a manager watches, and an environment file for it."""
    (run_dir / "environment").write_text("IMAGEAPI_LOGLEVEL=INFO\n")
    server = Server(run_dir, "--environment-file", str(run_dir / "environment"))
    server.enter = ["env", f"NOTIFY_SOCKET={manager.path}", "WATCHDOG_USEC=600000"]
    with contextlib.closing(server.http):
        server.start()
        yield server
        if server.runs:
            server.clear()
            server.stop()


def test_it_says_when_it_is_ready_that_it_lives_and_when_it_ends(service: Server, manager: Manager) -> None:
    assert f"MAINPID={service.pid}" in manager.hear("READY=1")
    manager.hear("WATCHDOG=1")
    service.post("/container", box(FOREVER))
    manager.hear("STATUS=1 containers run, on 2 mounts and 1 attachments")
    pid = service.get("/container/0")["pid"]
    service.stop()
    assert any(word.startswith("EXTEND_TIMEOUT_USEC=") for word in manager.hear("STOPPING=1"))
    assert alive(pid)
    service.enter = []
    service.start()


def test_a_reload_takes_the_log_level_of_the_environment_file(service: Server, manager: Manager) -> None:
    manager.hear("READY=1")
    for text, told in (
        ("IMAGEAPI_LOGLEVEL=DEBUG", "the log level is DEBUG now"),
        ("IMAGEAPI_LOGLEVEL=LOUD", "is not taken"),
        ("IMAGEAPI_LOGLEVEL='", "is not taken"),
    ):
        (service.run_dir / "environment").write_text(text)
        os.kill(service.pid, signal.SIGHUP)
        manager.hear("RELOADING=1")
        manager.hear("READY=1")
        eventually(lambda told=told: told in service.log.read_text(), told)  # type: ignore[misc]
    assert service.get("/container") == []


def test_a_signal_ends_what_is_under_way_and_takes_nothing_new(server: Server) -> None:
    """A container's start that waits for its storage is answered, though the end has begun."""
    slow = box("/bin/sh -c 'sleep 0.2; exit 3'", name="slow")
    with ThreadPoolExecutor(1) as pool, server.client() as client:
        answer = pool.submit(client.post, "/container", json=slow)
        eventually(lambda: server.get("/progress") or answer.done(), "the create is under way")
        os.kill(server.pid, signal.SIGTERM)
        assert answer.result().status_code == 201
    eventually(lambda: not server.runs, "the server has ended")
    assert not server.socket.exists()
    server.reconnect()
    server.start()
    assert server.await_state("byname/slow", "dead")["exit_code"] == 3


# ------------------------------------------------------------------------------------------------ socket activation


def test_it_serves_on_the_sockets_it_is_handed(run_dir: Path) -> None:
    """One of each family. What comes while no server runs waits for the next one: nobody is turned away."""
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as http:
        server = Server(run_dir)
        unix.bind(str(server.socket))
        unix.listen()
        server.enter = handing_over(unix, http)
        server.start(pass_fds=(unix.fileno(), http.fileno()))
        made = server.post("/container", box(FOREVER))
        address = f"http://127.0.0.1:{http.getsockname()[1]}/imageapi/v1"
        assert httpx.get(f"{address}/container/0").json() == made
        server.stop()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(httpx.get, f"{address}/container/0", timeout=60)
            assert server.socket.exists()
            server.start(pass_fds=(unix.fileno(), http.fileno()))
            assert waiting.result().json() == made
        descriptors = Path(f"/proc/{server.supervisor}/fd").iterdir()
        assert f"socket:[{os.fstat(http.fileno()).st_ino}]" not in [os.readlink(one) for one in descriptors]
        server.clear()
        server.stop()
        server.http.close()


def handing_over(*sockets: socket.socket) -> list[str]:
    """A command that executes another with these sockets as systemd hands them over: sd_listen_fds(3)."""
    moves = " ".join(f"{3 + place}<&{one.fileno()}" for place, one in enumerate(sockets))
    return ["bash", "-c", f'export LISTEN_FDS={len(sockets)} LISTEN_PID=$$; exec "$0" "$@" {moves}']


# ------------------------------------------------------------------------------------------------ the host's end


def test_a_shutdown_stops_all_and_releases_all(server: Server) -> None:
    polite = """/bin/sh -c 'trap "echo asked; exit 0" TERM; echo ready; while true; do sleep 0.01; done'"""
    boxes = [server.post("/container", box(command)) for command in (polite, FOREVER)]
    server.post("/container", box(FOREVER, state="created", name="later"))
    server.post("/mount", squashfs())
    logs = [Path(one["logfile"]) for one in boxes]
    eventually(lambda: "ready" in logs[0].read_text(), "the handler is installed")
    server.stop()
    assert all(alive(one["pid"]) for one in boxes)
    subprocess.run([*server.command, "--shutdown"], check=True, timeout=60)
    assert not any(alive(one["pid"]) for one in boxes)
    assert "asked" in logs[0].read_text()
    for log in logs:
        assert "stopping container: the host is going down" in log.read_text()
        assert log.read_text().rstrip().endswith("container deleted")
    assert mounted_below(server.run_dir) == []
    server.start()
    assert server.everything() == []
    assert server.post("/container", box(FOREVER))["id"] == 3, "no id is used twice"


def test_a_shutdown_goes_on_where_one_does_not_end(run_dir: Path) -> None:
    """One that does not listen is killed; what the kernel does not let go is named, and all else is released."""
    with running(run_dir, "--stop-timeout", "200ms", "--cleanup-timeout", "500ms") as server:
        deaf = server.post("/container", box("/bin/sh -c 'trap : TERM; while true; do sleep 0.01; done'"))
        held = server.post("/mount", squashfs())
        with open(f"{held['mountpoint']}/data/message"):
            server.stop()
            done = subprocess.run([*server.command, "--shutdown"], capture_output=True, text=True, timeout=60)
            assert done.returncode == 1
            assert "not all is released: mount" in done.stderr
            assert not alive(deaf["pid"])
        subprocess.run([*server.command, "--shutdown"], check=True, timeout=60)
        assert mounted_below(run_dir) == []


def test_a_shutdown_beside_a_server_is_refused(server: Server) -> None:
    made = server.post("/container", box(FOREVER))
    done = subprocess.run([*server.command, "--shutdown"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"process {server.pid}; stop that server" in done.stderr
    assert alive(made["pid"])


def mounted_below(directory: Path) -> list[str]:
    return [one.mountpoint for one in mountinfo.read() if one.mountpoint.startswith(f"{directory}/mounts/")]
