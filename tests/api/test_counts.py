"""What a request costs, by counts that are the same on every machine: a clock is no test.

Each bound is a little above what was counted when it was set, which stands beside it: one that is passed means that
something costs more than it did, and is to be looked at.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from lab.counting import counted, switches
from lab.processes import processes
from lab.server import FOREVER, Server, box, eventually, writable
from lab.session import current

pytestmark = pytest.mark.api

BRIEF = "/bin/true"
AT_REST = ("python", "imageapi-zygote", "imageapi-super", "imageapi-child")
"""The names of all processes of a server that has nothing to do."""


def of_ours(server: Server) -> dict[int, str]:
    """The processes of a server, of its supervisor and of what they forked, but for those of containers."""
    run = current()
    assert run is not None
    found = [one for one in processes().values() if one.name.startswith("imageapi") or one.pid == server.pid]
    return {one.pid: one.name for one in found if one.belongs_to(run)}


def one_of(server: Server, name: str) -> int:
    [pid] = [pid for pid, found in of_ours(server).items() if found == name]
    return pid


def warm(server: Server) -> None:
    """Once through all of it, so that whatever is made on first use is there."""
    made = server.post("/container", box(BRIEF))
    server.await_state(made["id"], "exited")
    server.delete(f"/container/{made['id']}")


def test_what_a_create_and_a_delete_of_a_nest_ask_of_a_worker(server: Server, tmp_path: Path) -> None:
    warm(server)
    with counted([one_of(server, "imageapi-worker")], tmp_path / "create") as create:
        made = server.post("/container", {"mount": writable(), "command": BRIEF})
    assert create.total() <= 45, create  # 39
    with counted([one_of(server, "imageapi-worker")], tmp_path / "delete") as delete:
        server.delete(f"/container/{made['id']}")
    assert delete.total() <= 43, delete  # 37
    assert create["mount"] == delete["umount2"] == 2
    assert not create["readlink"] + delete["readlink"], "all processes are looked at only when one holds something"


def test_how_often_a_request_writes(server: Server, tmp_path: Path) -> None:
    """Each of four records twice, as intent and as done; then one that says that it goes, and the ids to come. What a
    start is told in the form of descriptors, where its root is, is opened as well."""
    warm(server)
    with counted([server.pid], tmp_path / "create") as create:
        made = server.post("/container", box(BRIEF))
        server.await_state(made["id"], "exited")
    assert create["openat"] == 4 + 4 + 1 + 2, create  # and the end of the container
    with counted([server.pid], tmp_path / "delete") as delete:
        server.delete(f"/container/{made['id']}")
    assert (delete["openat"], delete["unlink"]) == (2 + 1, 4), delete  # and the last line of the log
    assert sum(calls[name] for calls in (create, delete) for name in ("rename", "fsync", "fdatasync")) == 0


def test_a_container_costs_no_process_but_its_own(server: Server) -> None:
    warm(server)
    before = Counter(dict.fromkeys(AT_REST, 1))
    eventually(lambda: Counter(of_ours(server).values()) == before, "nothing but what lasts is left")
    made = [server.post("/container", box(FOREVER)) for _ in range(5)]
    eventually(lambda: Counter(of_ours(server).values()) == before, "only the containers' own processes are more")
    for one in made:
        server.delete(f"/container/{one['id']}?force=true")


@pytest.mark.quiet
def test_nobody_wakes_up_when_nothing_happens(server: Server) -> None:
    warm(server)
    running = server.post("/container", box(FOREVER))
    eventually(lambda: "imageapi-worker" not in of_ours(server).values(), "idle workers have ended")
    quiet = 3.0
    eventually(lambda: not _woken(server, quiet), "nobody wakes up any more", 10 * quiet)
    server.delete(f"/container/{running['id']}?force=true")


def _woken(server: Server, seconds: float) -> dict[int, int]:
    """Who of ours has run within so many seconds, and how often."""
    before = {pid: switches(pid) for pid in of_ours(server)}
    time.sleep(seconds)
    after = {pid: switches(pid) for pid in of_ours(server)}
    return {pid: count - before.get(pid, 0) for pid, count in after.items() if count != before.get(pid)}


SERVICE = "imageapi.server; imageapi.server.lean.load_event_loop(); import imageapi.service"


@pytest.mark.parametrize(
    ("module", "most", "never"),
    [
        ("imageapi.server", 200, {"asyncio", "ssl", "hashlib", "shutil", "json", "urllib3", "tarfile"}),  # 190
        (SERVICE, 295, {"ssl", "hashlib", "random", "difflib", "urllib.parse", "ipaddress", "multiprocessing"}),  # 287
        ("imageapi.drivers.mount.uri", 165, {"urllib3", "ssl", "tarfile", "hashlib", "lzma", "zlib"}),  # 153
    ],
)
def test_what_a_start_imports(module: str, most: int, never: set[str]) -> None:
    command = [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert len(found) <= most
    assert not never & {*found}


def test_what_a_worker_brings_along_for_kinds_that_are_not_used() -> None:
    """The common kinds are loaded before the fork; others, and what only they need, when they are used."""
    load = "from imageapi.engine import zygote; [zygote.driver(*kind) for kind in zygote.COMMON]"
    command = [sys.executable, "-c", f"import sys; {load}; print(*sys.modules)"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "imageapi.drivers.mount.overlay" in found
    assert not {"imageapi.drivers.mount.uri", "imageapi.drivers.storage_daemon", "subprocess", "hashlib"} & {*found}


def test_a_kind_is_loaded_for_all_workers_when_it_is_first_used(server: Server, tmp_path: Path) -> None:
    directory = {"path": str(tmp_path), "base": "root"}
    warm(server)
    before = switches(one_of(server, "imageapi-zygote"))
    server.delete(f"/mount/{server.post('/mount/bind', directory)['id']}")
    eventually(lambda: switches(one_of(server, "imageapi-zygote")) > before, "the zygote has something to do")
