"""Mounts from a URI on the stock kernel of the guest lab."""

from __future__ import annotations

import pytest

from lab.archives import Member, archive
from lab.guest.guest import Guest
from lab.guest.server import GuestServer
from lab.images import small_image
from lab.server import box, eventually
from tools.images import busybox

pytestmark = pytest.mark.guest


def over(uri: str, **more: str) -> dict[str, object]:
    return {"kind": "overlay", "overlay": {"lower": [{"kind": "uri", "uri": {"uri": uri, **more}}]}}


def test_archives_and_images_are_fetched_and_run(guest: Guest, guest_server: GuestServer) -> None:
    guest.run("mkdir", "/tmp/www")
    program = Member("bin/sh", busybox().read_bytes(), mode=0o755)
    guest.write("/tmp/www/a.tar.zst", archive(program, compression="zst"))
    guest.put(small_image(), "/tmp/www/image")
    web = guest.start("python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", "/tmp/www", "8123")
    eventually(lambda: guest.run("ss", "-Hltn", "sport = :8123"), "the web server listens")
    base = "http://127.0.0.1:8123"
    for mount in (over(f"{base}/a.tar.zst"), over(f"{base}/image", format="squashfs")):
        made = guest_server.post("/container", box("/bin/sh -c 'exit 7'", mount=mount))
        assert guest_server.await_state(made["id"], "dead")["exit_code"] == 7
        guest_server.clear()
    guest.kill(web)
    guest.run("rm", "-r", "/tmp/www")
