"""The steps of the tutorial that only a kernel with the rbd driver can show, from its text, in the guest."""

from __future__ import annotations

import json
import re

import pytest

from lab.ceph import Cluster
from lab.guest.server import GuestServer
from lab.images import small_image
from tutorial import text

pytestmark = [pytest.mark.tutorial, pytest.mark.guest, pytest.mark.ceph]

MODPROBE = re.compile(r"modprobe rbd overlay")
DATA = re.compile(r"-d '([^']+)'")
LOG = (r"libceph: mon0 \(1\)\S+:6789 session established", r"libceph: client\d+ fsid \S+", r"rbd: rbd0: capacity \d+ ")
DEVICE = re.compile(r"b\S+ +1 root \S+ +253, +0 .* /dev/rbd0\n")


def commands_that(begin: str) -> list[text.Command]:
    return [command for command in text.commands() if command.line.startswith(begin)]


def test_the_device_and_the_kernels_log(guest_server: GuestServer, guest_ceph: Cluster) -> None:
    """The module is loaded, the image of the text attached with its own request; then its dmesg, and its ls twice: once
    the device is there, and after the last deletion it is not."""
    guest = guest_server.guest
    guest_ceph.import_image(str(small_image()), "systemd.sqsh")
    (load,) = MODPROBE.findall(text.TEXT)
    guest.sh(load)
    attach = next(command for command in commands_that("curl") if command.line.rstrip(" |jq").endswith("/attach/rbd"))
    data = DATA.search(attach.line)
    assert data
    body = data[1].replace(text.ADDRESS, guest_ceph.monitor).replace(text.MASK, guest_ceph.admin_key)
    made = guest_server.post("/attach/rbd", json.loads(body))
    assert attach.answer() | {"monitors": [guest_ceph.monitor]} == {name: made[name] for name in attach.answer()}
    (log,) = commands_that("dmesg")
    for pattern, theirs, ours in zip(LOG, log.shown.split(" [")[:3], guest.sh(log.line).splitlines(), strict=True):
        assert re.search(pattern, theirs)
        assert re.search(pattern, ours)
    there, gone = commands_that("ls -l /dev/rbd0")
    assert DEVICE.fullmatch(there.shown + "\n")
    assert DEVICE.fullmatch(guest.sh(there.line))
    guest_server.delete(f"/attach/rbd/{made['id']}")
    refused = guest.complete("sh", "-c", gone.line)
    assert "No such file or directory" in refused.stderr.decode()
    guest_ceph.rbd("rm", "--no-progress", "rbd/systemd.sqsh")
