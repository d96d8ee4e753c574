"""The host runs out of something: the answer says of what and what to do, nothing is left, everything else is answered,
and all works again as soon as there is room, without a restart."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import room
from lab.machine import Machine
from lab.processes import processes
from lab.room import Filler
from lab.server import FOREVER, PATIENCE, Server, alive, box, eventually, image, running, running_as, squashfs, writable

pytestmark = pytest.mark.api

GATED = "/bin/sh -c 'mkfifo /gate; read line </gate; exit 3'"
"""Ends when something is written to its gate."""
STEPS = 40
"""By so many pages or inodes a start has all it needs."""


def traces(server: Server) -> list[str]:
    """What there is of objects under the run directory, logs apart; the child in waiting's FIFO is left out."""
    places = ("mounts", "state/attach", "state/mount", "state/container", "supervisor")
    files = [f"{place}/{name}" for place in places for name in os.listdir(server.run_dir / place)]
    return sorted(file for file in files if not file.endswith(".out"))


def gate(made: dict[str, Any]) -> Path:
    """The FIFO of a container that makes one."""
    path = Path(f"/proc/{made['pid']}/root/gate")
    eventually(path.is_fifo, "the container has made its gate")
    return path


def logs(server: Server) -> set[str]:
    return set(os.listdir(server.run_dir / "logs"))


@pytest.mark.parametrize(("options", "what"), [("size=4m", "space"), ("size=16m,nr_inodes=150", "inodes")])
def test_a_full_run_directory_at_any_step_of_a_create(run_dir: Path, options: str, what: str) -> None:
    with room.tmpfs(run_dir / "small", options) as place, room.running_in(place) as server:
        server.post("/container", box(FOREVER, name="old"))
        filler = Filler(place)
        use_up: Callable[[int], None] = getattr(filler, what)
        before, known, left = traces(server), logs(server), 0
        for left in range(STEPS):
            use_up(left)
            answer = server.http.post("/container", json=box(FOREVER, name="new"))
            if answer.status_code == 201:
                break
            problem = answer.json()
            assert (answer.status_code, problem["errno"]) == (503, "ENOSPC"), problem
            assert "no space or no inodes are left in" in problem["message"]
            eventually(lambda: traces(server) == before, f"nothing is left with {left} {what}: {traces(server)}")
            assert logs(server) == known
            assert [one["name"] for one in server.get("/container")] == ["old"]
        assert 0 < left < STEPS - 1
        server.delete("/container/byname/new?force=true")
        use_up(0)
        server.refused("POST", "/container", 503, box(FOREVER))
        filler.release()
        server.post("/container", box(FOREVER))


def test_in_a_full_run_directory_everything_can_be_ended_and_deleted(run_dir: Path) -> None:
    with room.tmpfs(run_dir / "small", "size=4m") as place, room.running_in(place) as server:
        own = server.post("/container", box(GATED, name="own"))
        server.post("/container", box(FOREVER, name="asked"))
        server.post("/mount", writable())
        opened = gate(own)
        Filler(place).space()
        server.kill()
        server.start()
        opened.write_text("go\n")
        assert server.await_state("byname/own", "dead")["exit_code"] == 3
        server.get("/container/byname/asked/exited")
        server.await_state("byname/asked", "exited")
        server.kill()
        server.start()
        assert [one["exit_code"] for one in server.get("/container")] == [3, 137]
        for path in ("/container/byname/own", "/container/byname/asked", "/mount/3"):
            server.delete(path)
        assert server.everything() == []
        assert os.listdir(place / "mounts") == []


def test_a_run_directory_that_becomes_read_only(run_dir: Path) -> None:
    with room.subvolume(run_dir / "disk", run_dir / "image") as place, room.running_in(place) as server:
        own = server.post("/container", box(GATED, name="own"))
        server.post("/container", box(FOREVER, name="asked"))
        server.post("/container", box(FOREVER, name="made", state="created"))
        server.post("/mount", writable())
        before, opened = server.get("/mount"), gate(own)
        room.set_read_only(place, on=True)
        for method, path, body in (
            ("POST", "/container", box(FOREVER)),
            ("GET", "/container/byname/made/running", None),
            ("DELETE", "/container/byname/made", None),
            ("DELETE", "/container/byname/asked?force=true", None),
            ("DELETE", "/mount/4", None),
        ):
            problem = server.refused(method, path, 503, body)
            assert "is read-only; remount it read-write" in problem["message"], problem
        assert server.get("/mount") == before
        assert server.leaks() == []
        opened.write_text("go\n")
        server.get("/container/byname/asked/exited")
        assert server.await_state("byname/own", "dead")["exit_code"] == 3
        assert server.await_state("byname/asked", "exited")["exit_code"] == 137
        room.set_read_only(place, on=False)
        records = place / "state/container"
        eventually(lambda: '"exit_code":3' in (records / "0.json").read_text(), "the end is written")
        eventually(lambda: '"exit_code":137' in (records / "1.json").read_text(), "the other one, too")
        server.get("/container/byname/made/running")
        server.kill()
        server.start()
        assert [one["exit_code"] for one in server.get("/container")] == [3, 137, None]
        server.delete("/mount/4")


def test_an_end_that_only_the_supervisor_saw_is_kept_until_it_can_be_written(run_dir: Path) -> None:
    """No server runs, the run directory is read-only, and then the supervisor is replaced as well."""
    with room.subvolume(run_dir / "disk", run_dir / "image") as place, room.running_in(place) as server:
        made = server.post("/container", box(GATED))
        way = gate(made)
        server.kill()
        room.set_read_only(place, on=True)
        way.write_text("go\n")
        eventually(lambda: not alive(made["pid"]), "the container has ended")
        ended = subprocess.run(
            [sys.executable, "-m", "imageapi.server", "--run-dir", place, "--socket-path", place / "api.sock"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode != 0
        room.set_read_only(place, on=False)
        server.start()
        assert server.await_state(0, "dead")["exit_code"] == 3


def test_no_processes(run_dir: Path, machine: Machine) -> None:
    with room.in_group(f"imageapi-{machine.session.token}-room") as group, running(run_dir) as server:
        server.post("/container", box(FOREVER, name="old"))
        server.post("/mount", writable())
        before = server.everything()
        (group / "pids.max").write_text("1")
        eventually(lambda: "imageapi-worker" not in names(group), "no worker is left from before")
        for method, path, body in (
            ("POST", "/container", box(FOREVER)),
            ("POST", "/mount", squashfs(readPartitions=True)),
            ("DELETE", "/mount/2", None),
        ):
            problem = server.refused(method, path, 503, body)
            assert problem["errno"] == "EAGAIN", problem
            assert "TasksMax" in problem["message"]
        assert server.everything() == before
        server.get("/container/byname/old/exited")
        server.await_state("byname/old", "exited")
        (group / "pids.max").write_text("max")
        server.get("/container/byname/old/running")
        server.delete("/mount/2")


def names(group: Path) -> set[str]:
    """What the processes of a cgroup are called."""
    pids = (group / "cgroup.procs").read_text().split()
    return {process.name for process in processes().values() if str(process.pid) in pids}


@pytest.fixture
def few_descriptors(run_dir: Path) -> Iterator[Server]:
    """A server that has, as all that it starts has, 64 descriptors."""
    server = Server(run_dir)
    server.enter = ["prlimit", "--nofile=64:64"]
    with running_as(server):
        yield server


def test_a_server_with_too_few_descriptors_does_not_start(run_dir: Path) -> None:
    command = ["prlimit", "--nofile=24:24", sys.executable, "-m", "imageapi.server", "--run-dir", str(run_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "LimitNOFILE is 24" in ended.stderr


def test_the_supervisor_has_descriptors_left_for_all_but_starts(few_descriptors: Server) -> None:
    server = few_descriptors
    made = 0
    while (answer := server.http.post("/container", json=box(FOREVER))).status_code == 201:
        made += 1
        assert made < 64
    assert answer.json()["errno"] == "EMFILE", answer.text
    assert made > 5
    server.kill()
    server.start()
    assert len(server.get("/container")) == made
    for container in range(3):
        server.get(f"/container/{container}/exited")
        server.await_state(container, "exited")
        server.delete(f"/container/{container}")
    eventually(lambda: server.http.post("/container", json=box(FOREVER)).status_code == 201, "there is room for one")


def test_connections_do_not_take_the_descriptors_of_the_work(few_descriptors: Server) -> None:
    """What is opened beyond those that may be is answered, and the others go on."""
    opened: list[socket.socket] = []
    try:
        while (said := _knock(few_descriptors, opened)) is None:
            assert len(opened) < 64
        assert b"503" in said.split(b"\r\n")[0]
        assert b"LimitNOFILE" in said
        few_descriptors.post("/mount", writable())
    finally:
        for one in opened:
            one.close()
    eventually(lambda: _is_let_in(few_descriptors), "another is let in")


def test_of_a_burst_of_connections_none_goes_without_an_answer(few_descriptors: Server) -> None:
    """Those that there are no descriptors for wait until there are."""
    with contextlib.ExitStack() as opened:
        burst = [opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(300)]
        for client in burst:
            client.settimeout(PATIENCE)
            client.connect(str(few_descriptors.socket))
            client.send(b"GET /imageapi/v1/container HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        for client in burst:
            assert client.recv(4096)[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 503")
            client.close()


def _is_let_in(server: Server) -> bool:
    with server.client() as client:
        return client.get("/container").status_code == 200


def _knock(server: Server, opened: list[socket.socket]) -> bytes | None:
    """Open one more connection; what it is told without having asked for anything."""
    client = socket.socket(socket.AF_UNIX)
    opened.append(client)
    client.settimeout(0.05)
    client.connect(str(server.socket))
    try:
        return client.recv(4096)
    except TimeoutError:
        return None


def test_a_full_log_disk_keeps_no_container_from_running(run_dir: Path) -> None:
    printing = "/bin/sh -c 'mkfifo /gate; while :; do read word </gate && seq 1 20000 && echo $word; done'"
    (run_dir / "run").mkdir()
    with room.tmpfs(run_dir / "run" / "logs", "size=1m") as disk, running(run_dir / "run") as server:
        made = server.post("/container", box(printing, name="before"))
        way = gate(made)
        filler = Filler(disk)
        filler.space()
        late = server.post("/container", box(FOREVER, name="late"))
        assert late["state"] == "running"
        assert "lines of its log are lost: no space" in late["problem"]
        assert late["logfile"] in late["problem"]
        way.write_text("lost\n")
        eventually(lambda: "lines of its log are lost" in problem(server), "it is told")
        filler.release()
        way.write_text("kept\n")
        log = Path(made["logfile"])
        eventually(lambda: log.read_text().endswith("kept\n"), "it is written again")
        assert "bytes that it printed here are lost: No space left on device" in log.read_text()
        eventually(lambda: not problem(server), "nothing is wrong any more")
        assert server.get("/container/byname/late/exited")["state"] == "stopping"


def problem(server: Server) -> str:
    return str(server.get("/container/byname/before").get("problem", ""))


def test_a_log_takes_as_much_as_was_chosen(run_dir: Path) -> None:
    """Also under a supervisor that was started for a server with another choice."""
    with running(run_dir, "--log-limit", "1MiB") as server:
        made = server.post(
            "/container", box("/bin/sh -c 'mkfifo /gate; seq 1 300000; read line </gate; seq 1 300000; sleep 1000'")
        )
        log, old = Path(made["logfile"]), Path(f"{made['logfile']}.1")
        eventually(lambda: old.exists() and ends(log, b"\n300000\n"), "all is printed")
        assert 1 << 20 <= old.stat().st_size < (1 << 20) + (64 << 10)
        assert log.stat().st_size < 1 << 20
        server.stop()
        server._options = ("--log-limit", "100KB")
        server.start()
        gate(made).write_text("go\n")
        eventually(lambda: 100_000 <= old.stat().st_size < 100_000 + (64 << 10), "the new limit holds")


def ends(log: Path, text: bytes) -> bool:
    """Whether it does. A log that was put aside is there again when there is more to write."""
    try:
        return log.read_bytes().endswith(text)
    except FileNotFoundError:
        return False


def test_a_request_for_too_many_objects_is_refused_at_once(server: Server) -> None:
    server.post("/mount", squashfs())
    refusal = server.refused("POST", "/mount/overlay", 422, {"lower": [0] * 400_000})
    assert "at most 1000 objects" in refusal["message"]
    several = [{"kind": "tmpfs", "tmpfs": {"size": "1m"}}] * 1001
    server.refused("POST", "/mount", 422, {"kind": "overlay", "overlay": {"lower": several}})
    assert [one["id"] for one in server.get("/mount")] == [0]
    server.post("/attach/loopback", image())
