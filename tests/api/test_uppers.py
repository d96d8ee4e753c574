"""Where an overlay's writes go, and what of them stays, through the API."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from imageapi.linux import mountinfo
from lab.images import small_image
from lab.server import FOREVER, Server, box, squashfs

pytestmark = pytest.mark.api


@pytest.fixture
def disk(run_dir: Path) -> Path:
    """The image of an ext4, to be written."""
    return Path(shutil.copy(small_image("ext4"), run_dir / "disk.ext4"))


def on(disk: Path, *options: str) -> dict[str, Any]:
    """The ext4 on a disk, all in one."""
    attach = {"kind": "loopback", "loopback": {"path": str(disk), "base": "root"}}
    return {"kind": "attach", "attach": {"fs_type": "ext4", "mount_options": options, "attach": attach}}


def over(upper: Any, **more: Any) -> dict[str, Any]:
    """An overlay on the small image, all in one, that writes to `upper`."""
    return {"kind": "overlay", "overlay": {"lower": [squashfs()], "upper": upper, **more}}


def say(text: str) -> str:
    return f"/bin/sh -c 'echo {text} >>/data/message; cat /data/message'"


def run(server: Server, mount: Any, command: str) -> str:
    """What a container writes to its log, once it has ended and is deleted with all that it stood on."""
    made = server.post("/container", {"mount": mount, "command": command, "state": "running"})
    server.await_state(made["id"], "exited")
    server.delete(f"/container/{made['id']}")
    assert server.everything() == []
    return Path(made["logfile"]).read_text()


@pytest.mark.parametrize("options", [{}, {"volatile": True}])
def test_what_is_written_to_a_disk_stays_when_all_is_deleted(server: Server, disk: Path, options: Any) -> None:
    run(server, over(on(disk), upper_path="/node1", options=options), say("first"))
    log = run(server, over(on(disk), upper_path="/node1", options=options), say("second"))
    assert log.count("first\n") == log.count("second\n") == 1
    assert "first" not in run(server, over(on(disk), upper_path="/node2"), say("third"))


def test_what_was_written_has_reached_the_disk_when_the_container_has_ended(server: Server, disk: Path) -> None:
    for state, command in (("exited", say("unmistakable")), ("exited", FOREVER)):
        made = server.post("/container", {"mount": over(on(disk)), "command": command, "state": "running"})
        Path(made["mount"]["mountpoint"], "written").write_text(f"by {made['id']}, unmistakable")
        server.get(f"/container/{made['id']}/exited")
        server.await_state(made["id"], state)
        assert f"by {made['id']}, unmistakable".encode() in disk.read_bytes()
        server.delete(f"/container/{made['id']}")


def test_a_tmpfs_has_room_for_so_much(server: Server) -> None:
    upper = {"kind": "tmpfs", "tmpfs": {"size": "1M"}}
    made = server.post("/container", box("/bin/dd if=/dev/zero of=/large bs=1M count=2", mount=over(upper)))
    server.await_state(made["id"], "dead")
    assert "No space left" in Path(made["logfile"]).read_text()
    assert [one["size"] for one in server.get("/mount/tmpfs")] == ["1M"]
    server.delete(f"/container/{made['id']}")
    assert server.everything() == []


def test_a_place_is_written_by_one_overlay_at_a_time(server: Server, disk: Path) -> None:
    upper = server.post("/mount", on(disk))
    first = server.post("/mount", over({"id": upper["id"]}, upper_path="/a"))
    problem = server.refused("POST", "/container", 409, box(FOREVER, mount=over({"id": upper["id"]}, upper_path="a/")))
    assert (problem["path"], problem["holders"]) == ("$.mount.overlay.upper", [f"mount {first['id']} (overlay)"])
    second = server.post("/mount", over({"id": upper["id"]}))
    assert [one["overlay"]["upper"]["id"] for one in (first, second)] == [upper["id"]] * 2
    server.refused("DELETE", f"/mount/{upper['id']}", 409)
    server.delete(f"/mount/{first['id']}")
    server.post("/mount/overlay", {"lower": [squashfs()], "upper": upper["id"], "upper_path": "/a"})


def test_two_mounts_of_one_upper_are_no_way_around_that(server: Server, disk: Path) -> None:
    attached = server.post("/attach/loopback", {"path": str(disk), "base": "root"})
    first, second = (server.post("/mount/loopback", {"id": attached["id"], "fs_type": "ext4"}) for _ in range(2))
    server.post("/mount", over(first["id"]))
    assert "writes to this place" in server.refused("POST", "/mount", 409, over(second["id"]))["message"]


def test_an_upper_that_cannot_be_written_is_refused_before_anything_is_made(server: Server, disk: Path) -> None:
    for upper in (squashfs(), on(disk, "ro")):
        problem = server.refused("POST", "/mount", 422, over(upper))
        assert (problem["path"], "read-only" in problem["message"]) == ("$.overlay.upper", True)


# ------------------------------------------------------------------------------------------------ staging mounts

SHOW_ROOT = "/bin/grep ' / ' /proc/self/mounts"


def options_of_root(server: Server, mount: Any) -> set[str]:
    """The options of the root mount that a container sees."""
    line = next(line for line in run(server, mount, SHOW_ROOT).splitlines() if " / " in line)
    return set(line.split(" / ")[1].split()[1].split(","))


def test_the_hosts_users_gain_nothing_by_set_user_id_and_containers_lose_nothing(server: Server, disk: Path) -> None:
    """The mountpoints are open to everybody on the host."""
    inside_bind = {"kind": "bind", "bind": {"path": "/", "base": "mount", "mount": over(on(disk))}}
    for mount in (squashfs(), over(on(disk)), inside_bind):
        made = server.post("/mount", mount)
        found = mountinfo.at(made["mountpoint"])
        assert found is not None
        assert {"nosuid", "nodev"} <= set(found.options.split(","))
        server.delete(f"/mount/{made['id']}")
        assert "nosuid" not in options_of_root(server, mount)
    assert "nosuid" in options_of_root(server, on(disk, "nosuid"))
