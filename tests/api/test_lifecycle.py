"""Objects from their making to their end, through the API, on the real kernel."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lab.server import FOREVER, Server, alive, box, copy_of_small_image, image, squashfs, writable

pytestmark = pytest.mark.api


def test_step_by_step_and_back(server: Server) -> None:
    attached = server.post("/attach/loopback", image())
    assert (attached["id"], attached["refs"]) == (0, 1)
    mounted = server.post("/mount/loopback", {"id": 0, "fs_type": "squashfs", "mount_options": ["ro"]})
    assert (mounted["id"], mounted["loopback_id"]) == (0, 0)
    assert "etc" in os.listdir(mounted["mountpoint"])
    overlay = server.post("/mount/overlay", {"lower": [0]})
    assert (overlay["id"], overlay["lower"]) == (1, [0])
    Path(overlay["mountpoint"], "written").write_text("here")
    assert Path(overlay["upperdir"], "written").read_text() == "here"
    for path in ("/mount/overlay/1", "/mount/loopback/0", "/attach/loopback/0"):
        server.delete(path)
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


def test_one_post_and_one_delete(server: Server) -> None:
    made = server.post("/container", box(FOREVER, name="web"))
    assert made["state"] == "running"
    assert made["mount"]["overlay"]["lower"][0]["attach"]["attach"]["loopback"]["path"]
    assert alive(made["pid"])
    server.get("/container/byname/web/exited")
    server.await_state(0, "exited")
    server.delete("/container/byname/web")
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


def test_references_count_holders_and_reading_changes_none(server: Server) -> None:
    server.post("/attach/loopback", image())
    server.post("/mount/loopback", {"loopback_id": 0, "fs_type": "squashfs"})
    server.post("/mount/overlay", {"lower": [0]})
    for _ in range(3):
        assert server.get("/attach/0")["refs"] == 2
        assert server.get("/mount/0")["refs"] == 2
        assert server.get("/mount/1")["refs"] == 1


def test_what_is_held_is_not_deleted_and_the_holders_are_named(server: Server) -> None:
    server.post("/container", {"mount": writable(), "command": FOREVER, "name": "web"})
    for path, holder in (("/attach/0", "mount 0 (attach)"), ("/mount/0", "mount 1 (overlay)"), ("/mount/1", "web")):
        problem = server.refused("DELETE", path, 409)
        assert holder in problem["message"]
        assert any(holder in one for one in problem["holders"])
    assert len(server.everything()) == 4


def test_a_read_only_image_is_shared_by_nested_requests(server: Server) -> None:
    for _ in range(3):
        server.post("/container", {"mount": writable(), "command": FOREVER})
    assert len(server.get("/attach")) == 1
    assert server.get("/mount/0")["refs"] == 3
    server.delete("/container/0")
    server.delete("/container/1")
    assert server.get("/mount/0")["refs"] == 1
    server.delete("/container/2")
    assert server.everything() == []


def test_any_number_of_containers_stands_on_one_mount(server: Server) -> None:
    mount = server.post("/mount", writable())
    for number in range(12):
        made = server.post("/container", {"mount": {"id": mount["id"]}, "command": FOREVER})
        assert (made["id"], made["state"]) == (number, "created")
    assert server.get(f"/mount/{mount['id']}")["refs"] == 13


def test_ids_are_counted_from_zero_and_not_used_again(server: Server) -> None:
    assert [server.post("/mount", squashfs())["id"] for _ in range(2)] == [0, 1]
    server.delete("/mount/1")
    assert server.post("/mount", squashfs())["id"] == 2


def test_ids_of_a_failed_create_are_used_again(server: Server) -> None:
    server.refused("POST", "/container", 422, box("/no/such/command"))
    assert server.everything() == []
    assert server.post("/container", box(FOREVER))["id"] == 0
    assert [one["id"] for one in server.get("/mount")] == [0, 1]


def test_a_command_that_ends_well_is_exited_and_one_that_fails_is_dead(server: Server) -> None:
    server.post("/container", box("/bin/sh -c 'echo hello; exit 0'"))
    server.post("/container", box("/bin/sh -c 'exit 3'"))
    server.post("/container", box("/bin/sh -c 'kill -9 $$; exit 4'"))
    good, bad, _ = (server.await_state(number, "exited", "dead") for number in range(3))
    assert (good["state"], good["exit_code"], good["pid"]) == ("exited", 0, None)
    assert "problem" not in good
    assert (bad["state"], bad["exit_code"]) == ("dead", 3)
    assert "status 3" in bad["problem"]
    assert good["started_at"] <= good["finished_at"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", good["created_at"])
    assert "hello\n" in Path(good["logfile"]).read_text()


def test_an_ended_container_is_started_again(server: Server) -> None:
    server.post("/container", box("/bin/sh -c 'mkdir /once && exit 3; exec sleep 1000'"))
    assert "problem" in server.await_state(0, "dead")
    again = server.get("/container/0/running")
    assert again["state"] == "running"
    assert "problem" not in again
    log = Path(again["logfile"]).read_text()
    assert log.count("starting container") == 2


def test_the_log_outlives_the_container(server: Server) -> None:
    made = server.post("/container", {"mount": writable(), "command": FOREVER})
    server.delete("/container/0")
    lines = Path(made["logfile"]).read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "container(0): container created",
        "container(0): container deleted",
    ]


def test_force_kills_and_deletes(server: Server) -> None:
    made = server.post("/container", box(FOREVER))
    assert server.refused("DELETE", "/container/0", 409)["message"]
    deleted = server.delete("/container/0?force=true")
    assert deleted["id"] == 0
    assert not alive(made["pid"])
    assert server.everything() == []


def test_force_on_what_is_stood_on_changes_nothing(server: Server) -> None:
    server.post("/container", box(FOREVER))
    before = server.everything()
    for path in ("/mount/1?force=true", "/mount/0?force=true", "/attach/0?force=true"):
        server.refused("DELETE", path, 409)
    assert server.everything() == before


def test_force_on_what_only_records_hold(server: Server) -> None:
    """A container that does not run has no hold in the kernel: its mount goes, and it says what it has lost."""
    server.post("/container", {"mount": writable(), "command": FOREVER})
    server.delete("/mount/1?force=true")
    box = server.get("/container/0")
    assert "mount 1" in box["problem"]
    assert server.get("/attach") == []
    server.refused("GET", "/container/0/running", 409)
    server.delete("/container/0")
    assert server.everything() == []


def test_state_requests_that_change_nothing(server: Server) -> None:
    server.post("/container", {"mount": writable(), "command": FOREVER})
    assert server.get("/container/0/exited")["state"] == "created"
    first = server.get("/container/0/running")
    assert server.get("/container/0/running")["pid"] == first["pid"]
    server.refused("GET", "/container/0/paused", 501)
    server.refused("GET", "/container/0/flying", 422)
    server.get("/container/0/exited")
    server.await_state(0, "exited")
    assert server.get("/container/0/exited")["state"] == "exited"


def test_a_bind_of_a_directory_in_a_mount(server: Server) -> None:
    bind = {"kind": "bind", "bind": {"path": "/data", "base": "mount", "mount": squashfs(), "ro": True}}
    made = server.post("/mount", bind)
    assert os.listdir(made["mountpoint"])
    server.delete(f"/mount/{made['id']}")
    assert server.everything() == []


def test_an_image_inside_an_image(server: Server, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    directory.mkdir()
    copy_of_small_image(directory)
    store = {"kind": "bind", "bind": {"path": str(directory), "base": "root", "ro": True}}
    inner = {"path": "/image.sqsh", "base": "mount", "mount": store, "ro": True}
    nest = {"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": inner}}
    made = server.post("/mount", nest)
    assert "etc" in os.listdir(made["mountpoint"])
    server.delete(f"/mount/{made['id']}")
    assert server.everything() == []
