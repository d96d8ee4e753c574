"""What matters most, on the oldest kernel that is tested: Debian 12's own. (All guests have it with
IMAGEAPI_GUEST_KERNEL=6.1.) Below Linux 6.15 nobody learns how a process ended but its parent; below 6.9 a pidfd has no
inode of its own, and below 6.8 a mount no number that is given once: start times and devices stand for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lab.ceph import Cluster
from lab.guest.fixtures import unchanged
from lab.guest.guest import Guest
from lab.guest.server import GuestServer, running
from lab.images import small_image
from lab.server import FOREVER, box, eventually

pytestmark = pytest.mark.guest

GUEST = {"version": "6.1"}
IMAGE = "/run/small.sqsh"
COUNTING = "/bin/sh -c 'i=0; while true; do echo line $i; i=$((i+1)); sleep 0.1; done'"


@pytest.fixture(scope="module")
def server_of_module(guest_of_module: Guest) -> Iterator[GuestServer]:
    guest = guest_of_module
    with unchanged(guest):
        guest.put(small_image(), IMAGE)
        with running(guest) as server:
            server.http.close()
            yield server
            server.reconnect()
        guest.run("rm", IMAGE)


@pytest.fixture
def server(server_of_module: GuestServer) -> Iterator[GuestServer]:
    """It has nothing, and so it is at the end."""
    server_of_module.reconnect()
    yield server_of_module
    server_of_module.clear()
    assert server_of_module.leaks() == []
    server_of_module.http.close()


def on_overlay(lower: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "overlay", "overlay": {"lower": [lower]}}


def on_loop() -> dict[str, Any]:
    image = {"path": IMAGE, "base": "root", "ro": True}
    return on_overlay({"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": image}})


def supervisor(server: GuestServer) -> int:
    return int(server.guest.run("pgrep", "--exact", "imageapi-super"))


def goes_on(server: GuestServer, made: dict[str, Any]) -> None:
    """The container is the one that it was, by all that is told of it, and its log has no gap and grows."""

    def said() -> list[str]:
        log = server.guest.read(made["logfile"]).decode().splitlines()
        return [line for line in log if line.startswith("line ")]

    assert server.get(f"/container/{made['id']}") == made
    before = len(said())
    eventually(lambda: len(said()) > before, "it goes on")
    assert (lines := said()) == [f"line {number}" for number in range(len(lines))]


def test_it_starts_stops_and_outlives_the_server(server: GuestServer) -> None:
    assert server.guest.run("uname", "-r").startswith("6.1.")
    made = server.post("/container", box(COUNTING, mount=on_loop()))
    server.kill()
    server.start()
    goes_on(server, made)
    server.get(f"/container/{made['id']}/exited")
    assert server.await_state(made["id"], "exited")["exit_code"] == 137
    server.get(f"/container/{made['id']}/running")
    server.guest.run("kill", "-9", str(server.await_state(made["id"], "running")["pid"]))
    assert server.await_state(made["id"], "dead")["exit_code"] == 137


def test_it_outlives_the_supervisor_and_its_end_is_not_guessed(server: GuestServer) -> None:
    """How it ended is known if somebody looked before the host's init had reaped it."""
    made = [server.post("/container", box(FOREVER, mount=on_loop())) for _ in range(2)]
    lasting, ending = (server.get(f"/container/{each['id']}") for each in made)
    server.guest.kill(supervisor(server))
    eventually(lambda: server.guest.complete("pgrep", "--exact", "imageapi-super").returncode == 0, "there is another")
    assert server.get(f"/container/{lasting['id']}") == lasting
    server.guest.run("kill", "-9", str(ending["pid"]))
    ended = server.await_state(ending["id"], "dead")
    assert ("is not known" if ended["exit_code"] is None else "killed by signal 9") in ended["problem"]
    server.get(f"/container/{lasting['id']}/exited")
    assert {server.await_state(lasting["id"], "exited")["exit_code"], ended["exit_code"]} <= {None, 137}


@pytest.mark.ceph
def test_the_kernel_maps_an_rbd_image(server: GuestServer, guest_ceph: Cluster) -> None:
    guest_ceph.import_image(str(small_image()), "oldest.sqsh")
    options = {"secret": guest_ceph.admin_key, "ro": True}
    image = {"monitors": [guest_ceph.monitor], "pool": "rbd", "image": "oldest.sqsh", "options": options}
    mount = on_overlay({"kind": "rbd", "rbd": {"fs_type": "squashfs", "rbd": image}})
    made = server.post("/container", box("/bin/cat /data/message", mount=mount))
    server.await_state(made["id"], "exited")
    assert "written when the image was made" in server.guest.read(made["logfile"]).decode()
    server.clear()
    assert server.guest.sh("ls /sys/bus/rbd/devices") == ""
