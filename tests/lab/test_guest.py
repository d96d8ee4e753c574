"""The guest lab is what the other tests take it for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.ceph import Cluster
from lab.guest.guest import Guest
from lab.guest.link import GuestError
from lab.guest.server import GuestServer
from lab.images import small_image
from lab.server import box

pytestmark = pytest.mark.guest


def test_commands_and_files_go_in_and_out(guest: Guest, tmp_path: Path) -> None:
    noise = bytes(range(256)) * 4096
    (tmp_path / "noise").write_bytes(noise)
    path = guest.put(tmp_path / "noise", "/tmp/noise")
    assert guest.read(path) == noise
    assert guest.run("wc", "-c", stdin=noise).strip() == str(len(noise))
    guest.run("rm", path)


def test_a_command_that_fails_or_hangs_says_so(guest: Guest) -> None:
    with pytest.raises(GuestError, match="ended with 3: said why"):
        guest.sh("echo said why >&2; exit 3")
    with pytest.raises(TimeoutError, match="sleep"):
        guest.run("sleep", "1000", timeout=0.1)
    assert guest.run("echo", "goes on") == "goes on\n"


def test_what_is_left_is_named(guest: Guest) -> None:
    before = guest.look()
    guest.sh("mkdir /mnt/x; mount -t tmpfs left-mount /mnt/x; touch /tmp/left-file; mkdir /sys/fs/cgroup/left-group")
    pid = guest.start("sleep", "54321")
    left = "\n".join(guest.left(before, settle=0))
    assert all(name in left for name in ("left-mount", "file /tmp/left-file", "left-group", "sleep 54321"))
    guest.kill(pid)
    guest.sh("umount /mnt/x; rmdir /mnt/x /sys/fs/cgroup/left-group; rm /tmp/left-file")


def test_two_guests_draw_different_numbers_and_know_the_time(guest: Guest) -> None:
    assert guest.run("date", "-u", "+%Y") >= "2024"
    assert guest.run("cat", "/proc/sys/kernel/random/uuid") != guest.run("cat", "/proc/sys/kernel/random/uuid")


def test_a_container_runs_in_the_guest(guest: Guest, guest_server: GuestServer) -> None:
    path = guest.put(small_image(), "/tmp/image")
    image = {"path": path, "base": "root", "ro": True}
    mount = {"kind": "loopback", "loopback": {"fs_type": "squashfs", "mount_options": ["ro"], "loopback": image}}
    made = guest_server.post("/container", box("/bin/sh -c 'exit 7'", mount=mount))
    assert guest_server.await_state(made["id"], "dead")["exit_code"] == 7
    guest_server.clear()
    guest.run("rm", path)


def test_ceph_is_reached_from_the_guest(guest: Guest, guest_ceph: Cluster) -> None:
    guest.run("timeout", "5", "bash", "-c", f"</dev/tcp/{guest_ceph.monitor}/3300")
