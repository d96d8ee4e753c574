"""The server goes and comes back; the containers do not notice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from lab.processes import processes
from lab.server import (
    FOREVER,
    Server,
    alive,
    box,
    eventually,
    image,
    kill,
    other_release,
    posting,
    squashfs,
    writable,
)

pytestmark = pytest.mark.api

TALKING = "/bin/sh -c 'i=0; while true; do echo line $i; i=$((i+1)); sleep 0.01; done'"


@pytest.mark.parametrize("end", [Server.stop, Server.kill], ids=["stopped", "killed"])
def test_containers_outlive_the_server(server: Server, end: object) -> None:
    before = server.post("/container", box(TALKING, name="talker"))
    end(server)  # type: ignore[operator]
    assert alive(before["pid"])
    server.start()
    after = server.get("/container/byname/talker")
    assert after == before
    server.get("/container/0/exited")
    ended = server.await_state(0, "exited")
    lines = [line for line in Path(ended["logfile"]).read_text().splitlines() if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(len(lines))]


@pytest.mark.parametrize("end", [Server.stop, Server.kill], ids=["stopped", "killed"])
def test_all_that_was_made_is_there_again(server: Server, end: object) -> None:
    server.post("/attach/loopback", image())
    server.post("/mount/loopback", {"loopback_id": 0, "fs_type": "squashfs"})
    server.post("/container", {"mount": writable(), "command": FOREVER, "name": "later"})
    before = server.everything()
    end(server)  # type: ignore[operator]
    server.start()
    assert server.everything() == before
    following = max(one["id"] for one in server.get("/mount")) + 1
    assert server.post("/mount", squashfs())["id"] == following


def test_what_a_record_that_cannot_be_read_stands_for_is_left_alone(server: Server) -> None:
    """Until somebody who has read the report removes it."""
    made = server.post("/container", box(FOREVER, name="precious"))
    server.stop()
    state = server.run_dir / "state"
    torn, directory = state / "container" / "0.json", state / "mount" / "70.json"
    torn.write_text(torn.read_text()[:40])
    directory.mkdir()
    server.start()
    assert alive(made["pid"])
    assert "cannot be read" in server.refused("GET", "/container/0", 404)["message"]
    assert [str(torn), str(directory)] == sorted(found["problem"].split(" is no ")[0] for found in server.get("/check"))
    assert server.post("/mount", squashfs())["id"] == 71
    assert server.post("/container", box("/bin/true"))["id"] == 1
    torn.unlink()
    directory.rmdir()
    server.stop()
    server.start()
    assert (alive(made["pid"]), server.get("/check")) == (False, [])


def test_an_end_that_nobody_watched_is_known(server: Server) -> None:
    """And so is when it was, as the supervisor has noted it."""
    waits = """/bin/sh -c 'trap "exit 7" USR1; echo ready; while true; do sleep 0.01; done'"""
    made = server.post("/container", box(waits))
    eventually(lambda: "ready" in Path(made["logfile"]).read_text(), "the handler is installed")
    server.kill()
    os.kill(made["pid"], signal.SIGUSR1)
    note = server.run_dir / "supervisor" / "0.json"
    eventually(lambda: '"exit_code":7' in note.read_text(), "the container's end is noted")
    later = datetime.now(UTC).isoformat()
    server.start()
    ended = server.await_state(0, "dead")
    assert (ended["exit_code"], ended["pid"]) == (7, None)
    assert ended["finished_at"] < later


def test_the_supervisor_may_die_too(server: Server) -> None:
    made = server.post("/container", box(FOREVER))
    kill(server.supervisor)
    server.get("/container/0/exited")
    ended = server.await_state(0, "exited")
    assert (ended["exit_code"], alive(made["pid"])) == (137, False)


@pytest.mark.parametrize("removed", ["socket", "lock socket", ".", ".."])
def test_a_supervisor_is_found_though_its_files_were_removed(server: Server, removed: str) -> None:
    """While no server was there to tell it."""
    made, supervisor = server.post("/container", box(TALKING, name="talker")), server.supervisor
    server.kill()
    for path in removed.split():
        target = (server.run_dir / "supervisor" / path).resolve()
        subprocess.run(["rm", "-rf", target], check=False, capture_output=True)
    server.start()
    assert server.supervisor == supervisor
    if removed == "..":  # and with it the records
        eventually(lambda: not alive(made["pid"]), "what has no record is ended")
        return
    assert server.get("/container/0") == made
    assert server.post("/container", box("/bin/true"))["id"] == 1
    server.get("/container/0/exited")
    assert server.await_state(0, "exited")["exit_code"] == 137


def test_a_supervisor_makes_its_files_again_at_the_next_start(server: Server) -> None:
    """They are removed while a server is there, and what was parked among them is parked again: only by that the next
    supervisor learns how the container ended."""
    made = server.post("/container", box("/bin/sh -c 'trap \"exit 3\" USR1; while :; do sleep 0.01; done'"))
    subprocess.run(["rm", "-rf", server.run_dir / "supervisor"], check=False, capture_output=True)
    server.post("/container", box("/bin/true"))
    assert server.await_state(1, "exited")["exit_code"] == 0
    server.stop()
    kill(server.supervisor)
    os.kill(made["pid"], signal.SIGUSR1)
    eventually(lambda: not alive(made["pid"]), "the container has ended")
    server.start()
    assert server.await_state(0, "exited", "dead")["exit_code"] == 3


def test_a_server_of_another_release_upgrades_the_supervisor_in_place(server: Server, tmp_path: Path) -> None:
    before, supervisor = server.post("/container", box(TALKING, name="talker")), server.supervisor
    server.stop()
    server.package = other_release(tmp_path / "other")
    server.start()
    assert (server.supervisor, server.get("/container/0")) == (supervisor, before)
    assert "imageapi.runtime.successor" in Path(f"/proc/{supervisor}/cmdline").read_text()
    server.get("/container/0/exited")
    ended = server.await_state(0, "exited")
    assert ended["exit_code"] == 137
    lines = [line for line in Path(ended["logfile"]).read_text().splitlines() if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(len(lines))]


def test_a_start_that_was_under_way_is_undone_by_the_next_server(server: Server) -> None:
    """Nobody was told that it runs; and it may still fail, of which the next server would never hear."""
    server.post("/container", {"mount": writable(), "command": "/bin/nothing"})
    child = _child_in_waiting(server)
    os.kill(child, signal.SIGSTOP)
    asking = threading.Thread(target=_ask_in_vain, args=(server,))
    asking.start()
    eventually((server.run_dir / "supervisor" / "0.json").exists, "the start is under way")
    server.kill()
    asking.join()
    server.start()
    eventually(lambda: not alive(child), "what was to become the container is gone")
    assert server.get("/container/0")["state"] == "created"
    server.refused("GET", "/container/0/running", 422)


def test_an_end_is_forgotten_though_the_next_start_came_to_nothing(server: Server) -> None:
    """The supervisor dies over the second start: it is the first one's end that the next supervisor knows."""
    made = server.post("/container", box("/bin/true"))
    server.await_state(0, "exited")
    os.kill(server.supervisor, signal.SIGSTOP)
    record = server.run_dir / "state/container/0.json"
    before = json.loads(record.read_text())["run"]["attempt"]
    asking = threading.Thread(target=_ask_in_vain, args=(server,))
    asking.start()
    eventually(lambda: json.loads(record.read_text())["run"]["attempt"] > before, "the start is asked for")
    kill(server.supervisor)
    asking.join()
    assert made["id"] == 0
    server.await_state(0, "dead")
    server.delete("/container/0")
    eventually(lambda: not (server.run_dir / "supervisor/0.json").exists(), "its end is forgotten")


def _child_in_waiting(server: Server) -> int:
    children = Path(f"/proc/{server.supervisor}/task/{server.supervisor}/children")

    def found() -> int | None:
        pids = map(int, children.read_text().split())
        return next((pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "imageapi-child\n"), None)

    return int(eventually(found, "there is a child in waiting"))


def _ask_in_vain(server: Server) -> None:
    with server.client() as http, contextlib.suppress(httpx.TransportError):
        http.get("/container/0/running")


def test_ids_that_were_shown_are_not_used_again_after_a_restart(server: Server) -> None:
    server.post("/mount", squashfs())
    server.delete("/mount/0")
    server.kill()
    server.start()
    assert server.post("/mount", squashfs())["id"] == 1


def test_a_stop_goes_on_where_it_was(server: Server) -> None:
    """A command that takes its time to end ends though its server is killed meanwhile."""
    slow = """/bin/sh -c 'trap "sleep 0.5; exit 0" TERM; echo ready; while true; do sleep 0.01; done'"""
    made = server.post("/container", box(slow))
    eventually(lambda: "ready" in Path(made["logfile"]).read_text(), "the handler is installed")
    server.get("/container/0/exited")
    server.kill()
    server.start()
    assert server.await_state(0, "exited")["exit_code"] == 0


def test_a_second_server_on_the_same_directory_is_refused(server: Server, tmp_path: Path) -> None:
    options = ("--run-dir", str(server.run_dir), "--socket-path", str(tmp_path / "socket"))
    second = subprocess.run([sys.executable, "-m", "imageapi.server", *options], capture_output=True, text=True)
    assert second.returncode == 1
    assert f"in use by process {server.pid}" in second.stderr
    assert server.get("/container") == []


def test_a_server_whose_supervisor_cannot_work_says_so_and_ends(run_dir: Path) -> None:
    """Something lies where the supervisor keeps its things: that is a sentence at the start, not a hang later."""
    (run_dir / "supervisor").mkdir()
    (run_dir / "supervisor" / "keep").write_text("in the way")
    options = ("--run-dir", str(run_dir), "--socket-path", str(run_dir / "socket"))
    ended = subprocess.run([sys.executable, "-m", "imageapi.server", *options], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("imageapi-server: the supervisor does not work")
    assert str(run_dir / "supervisor" / "log") in ended.stderr
    assert not (run_dir / "socket").exists()


@contextlib.contextmanager
def starting(server: Server) -> Iterator[tuple[int, Future[httpx.Response]]]:
    """A create that waits for the supervisor, which is stopped: that one's pid, and the answer."""
    supervisor, mounts = server.supervisor, server.run_dir / "mounts"
    before = len(list(mounts.iterdir()))
    os.kill(supervisor, signal.SIGSTOP)
    with posting(server, "/container", box(FOREVER)) as answer:
        eventually(lambda: len(list(mounts.iterdir())) > before, "it is being made")
        yield supervisor, answer


def test_a_server_without_supervisor_and_zygote_waits_for_neither(server: Server) -> None:
    """Of an end that was asked for nobody can tell any more."""
    kept, killed = (server.post("/container", box(FOREVER, name=name))["pid"] for name in ("kept", "killed"))
    with outlived(killed), server.client() as http, ThreadPoolExecutor(1) as pool:
        pool.submit(http.delete, "/container/byname/killed?force=true")
        eventually(lambda: _is_being_deleted(server, "killed"), "it waits for its end")
        zygote = next(one.pid for one in processes().values() if one.parent == server.pid)
        for pid in (server.supervisor, zygote):
            os.kill(pid, signal.SIGKILL)
        assert server.ends_within(10)
    server.start()
    assert server.get("/container/byname/kept")["pid"] == kept


@contextlib.contextmanager
def outlived(pid: int) -> Iterator[None]:
    """Within it a container's first process that is killed does not come to its end: it waits for one that has entered
    its pid namespace, which nobody reaps."""
    entered = subprocess.Popen(["nsenter", "-t", str(pid), "-p", "sleep", "1000"])
    try:
        eventually(lambda: [one for one in processes().values() if one.parent == entered.pid], "one has entered")
        os.kill(entered.pid, signal.SIGSTOP)
        yield
    finally:
        os.kill(entered.pid, signal.SIGCONT)
        entered.kill()
        entered.wait()


def _is_being_deleted(server: Server, name: str) -> bool:
    """A start is refused then."""
    answer = server.http.get(f"/container/byname/{name}/running")
    return "being deleted" in answer.text


def test_a_server_that_ends_refuses_at_once_and_answers_what_is_under_way(server: Server) -> None:
    with starting(server) as (supervisor, answer):
        os.kill(server.pid, signal.SIGTERM)
        eventually(lambda: not server.socket.exists(), "nobody is let in any more")
        assert server.runs
        os.kill(supervisor, signal.SIGCONT)
        assert answer.result().status_code == 201
    assert server.ends_within(10)


def test_what_is_gone_is_told_of_it_and_of_its_users(server: Server) -> None:
    """Somebody unmounts what is ours while no server runs: it is said, and all of it can still be deleted."""
    mounted = server.post("/mount", squashfs())
    server.post("/container", {"mount": {"id": 0}, "command": FOREVER})
    server.kill()
    subprocess.run(["umount", mounted["mountpoint"]], check=True)
    server.start()
    assert "gone from the kernel" in server.get("/mount/0")["problem"]
    assert "mount 0 (attach), which it needs" in server.get("/container/0")["problem"]
    assert "problem" not in server.get("/attach/0")
    server.refused("GET", "/container/0/running", 409)
    server.delete("/container/0")
    server.delete("/mount/0")
    assert server.everything() == []
