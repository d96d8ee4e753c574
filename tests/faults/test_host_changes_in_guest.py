"""What somebody else does to our objects, on the stock kernel of the guest lab."""

from __future__ import annotations

from functools import partial

import pytest

from lab.guest.guest import Guest
from lab.guest.server import GuestServer
from lab.images import small_image
from lab.server import eventually

pytestmark = pytest.mark.guest


def test_it_is_seen_and_reported_and_can_be_deleted(guest: Guest, guest_server: GuestServer) -> None:
    guest.put(small_image(), "/tmp/seen.sqsh")
    attached = guest_server.post("/attach/loopback", {"path": "/tmp/seen.sqsh", "base": "root", "ro": True})
    mounted = guest_server.post("/mount/loopback", {"loopback_id": attached["id"], "fs_type": "squashfs"})
    tmpfs = guest_server.post("/mount", {"kind": "tmpfs", "tmpfs": {"size": "1M"}})
    assert guest_server.get("/check") == []

    guest.run("umount", tmpfs["mountpoint"])
    guest.run("mount", "-t", "tmpfs", "stranger", tmpfs["mountpoint"])
    guest.run("umount", mounted["mountpoint"])
    guest.run("losetup", "-d", attached["device_file"])
    gone = {f"/attach/{attached['id']}": "", f"/mount/{mounted['id']}": "", f"/mount/{tmpfs['id']}": "stranger (tmpfs)"}
    for path, words in gone.items():
        eventually(partial(_says, guest_server, path, words), f"{path} is said to be gone")
    assert len(guest_server.get("/check")) == 3

    refused = guest_server.refused("DELETE", f"/mount/{tmpfs['id']}", 409)
    assert "stranger (tmpfs)" in refused["message"]
    guest.run("umount", tmpfs["mountpoint"])
    guest_server.clear()
    assert guest_server.get("/check") == []
    guest.run("rm", "/tmp/seen.sqsh")


def _says(server: GuestServer, path: str, words: str) -> bool:
    problem = server.get(path).get("problem", "")
    return "gone from the kernel" in problem and words in problem
