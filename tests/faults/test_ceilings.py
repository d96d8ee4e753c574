"""The kernel's ceilings, on the guest's own kernel: a create at one is refused with the number to raise."""

from __future__ import annotations

import pytest

from lab.guest.guest import Guest
from lab.guest.server import GuestServer
from lab.images import small_image

pytestmark = pytest.mark.guest


def test_at_the_ceiling_of_mounts(guest: Guest, guest_server: GuestServer) -> None:
    usual = guest.sh("cat /proc/sys/fs/mount-max").strip()
    definition = {"kind": "tmpfs", "tmpfs": {"size": "1m"}}
    guest_server.post("/mount", definition)
    guest.sh(f"sysctl -q -w fs.mount-max=$(wc -l < /proc/{guest_server.pid}/mountinfo)")
    problem = guest_server.refused("POST", "/mount", 503, definition)
    assert "raise fs.mount-max, which is" in problem["message"]
    assert len(guest_server.get("/mount")) == 1
    guest.sh(f"sysctl -q -w fs.mount-max={usual}")
    guest_server.post("/mount", definition)


def test_without_a_way_to_loop_devices(guest: Guest, guest_server: GuestServer) -> None:
    """Nothing of an image is kept where there is no loop device for it; another kind is."""
    guest.put(small_image(), "/tmp/image")
    attachment = {"path": "/tmp/image", "base": "root", "ro": True}
    guest.sh("mv /dev/loop-control /dev/loop-away")
    problem = guest_server.refused("POST", "/attach/loopback", 501, attachment)
    assert "loop" in problem["message"]
    guest_server.post("/mount", {"kind": "tmpfs", "tmpfs": {"size": "1m"}})
    guest.sh("mv /dev/loop-away /dev/loop-control")
    guest_server.post("/attach/loopback", attachment)
    guest_server.clear()
    guest.run("rm", "/tmp/image")
