"""Kernel and disks that this machine lacks, in the guest: file systems that are modules, and partition tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab import partitions
from lab.ceph import Cluster
from lab.guest.guest import Guest
from lab.guest.server import GuestServer
from lab.images import small_image

pytestmark = pytest.mark.guest

DISK = "/tmp/disk"


def mount(fs_type: str, path: str = DISK, **more: Any) -> dict[str, Any]:
    """An attach-mount of an image, all in one."""
    image = {"path": path, "base": "root", "readPartitions": "partition" in more, "ro": more.pop("ro", False)}
    return {"fs_type": fs_type, "loopback": image, **more}


def message(guest: Guest, made: Any) -> str:
    return guest.read(f"{made['mountpoint']}/data/message").decode()


@pytest.fixture
def server(guest: Guest, guest_server: GuestServer) -> GuestServer:
    return guest_server


MAKE = {
    "vfat": "truncate -s 40M /tmp/disk; mkfs.vfat /tmp/disk",
    "iso9660": "mkdir -p /tmp/t; echo kept >/tmp/t/file; genisoimage -quiet -R -o /tmp/disk /tmp/t; rm -r /tmp/t",
    "btrfs": "truncate -s 128M /tmp/disk; mkfs.btrfs -q /tmp/disk",
    "xfs": "truncate -s 300M /tmp/disk; mkfs.xfs -q /tmp/disk",
    "erofs": "mkdir -p /tmp/t; echo kept >/tmp/t/file; mkfs.erofs --quiet /tmp/disk /tmp/t; rm -r /tmp/t",
}
OPTIONS = {
    "vfat": ["umask=0077", "utf8", "noexec"], "iso9660": ["mode=0444"], "btrfs": ["compress=zstd:3"],
    "xfs": ["inode64"], "erofs": ["cache_strategy=readaround"],
}  # fmt: skip


def test_the_kernel_loads_what_a_file_system_needs(guest: Guest, server: GuestServer) -> None:
    for fs_type in MAKE:
        guest.sh(f"rm -f /tmp/disk; {MAKE[fs_type]} >/dev/null; modprobe -r {fs_type} 2>/dev/null || true")
        made = server.post("/mount/loopback", mount(fs_type, mount_options=OPTIONS[fs_type]))
        file = f"{made['mountpoint']}/file"
        assert "kept" in guest.sh(f"[ -e {file} ] || echo kept >{file}; cat {file}")
        server.delete(f"/mount/{made['id']}")
        other = "ext4" if fs_type != "xfs" else "btrfs"
        problem = server.refused("POST", "/mount/loopback", 422, mount(other))
        assert f"type {fs_type}, not {other}" in problem["message"]
        assert server.everything() == []
    guest.sh(f"rm -f /tmp/disk; {MAKE['vfat']} >/dev/null")
    vfat, memory = ({"kind": "loopback", "loopback": mount("vfat")}, {"kind": "tmpfs", "tmpfs": {"size": "1M"}})
    problem = server.refused("POST", "/mount/overlay", 422, {"lower": [memory], "upper": vfat})
    assert (problem["path"], "use ext4, xfs, btrfs or tmpfs" in problem["message"]) == ("$.upper", True)
    problem = server.refused("POST", "/mount/overlay", 422, {"lower": [memory, vfat]})
    assert (problem["path"], "no overlay over this file system" in problem["message"]) == ("$.lower[1]", True)
    problem = server.refused("POST", "/mount/loopback", 501, mount("befs2"))
    assert (problem["path"], "'modprobe befs2' must succeed" in problem["message"]) == ("$.fs_type", True)
    guest.sh("rm /tmp/disk")


TABLES: dict[str, Callable[..., bytes]] = {
    "gpt": partitions.gpt,
    "gpt, large sectors": partial(partitions.gpt, sector=4096),
    "msdos": partitions.msdos,
}


def test_partitions_are_mounted_by_their_numbers(guest: Guest, server: GuestServer) -> None:
    contents = [small_image("squashfs").read_bytes(), small_image("erofs").read_bytes()]
    for name, table in TABLES.items():
        guest.write(DISK, table(*contents))
        for number, fs_type in enumerate(("squashfs", "erofs"), start=1):
            made = server.post("/mount/loopback", mount(fs_type, partition=number))
            assert message(guest, made) == "written when the image was made\n", name
            server.delete(f"/mount/{made['id']}")
        problem = server.refused("POST", "/mount/loopback", 422, mount("ext4", partition=3))
        assert (problem["path"], "it has 1 (" in problem["message"]) == ("$.partition", True)
        assert server.everything() == []
    device = guest.run("losetup", "--find", "--show", "--partscan", DISK).strip()
    local = {"path": device, "readPartitions": True}
    made = server.post("/mount/local", {"fs_type": "squashfs", "partition": 1, "local": local})
    assert message(guest, made) == "written when the image was made\n"
    server.delete(f"/mount/{made['id']}")
    guest.sh(f"losetup --detach {device}; rm /tmp/disk")


def test_an_rbd_image_through_a_daemon_has_partitions(guest: Guest, guest_ceph: Cluster, tmp_path: Path) -> None:
    """The kernel's rbd driver reads them in any case."""
    (tmp_path / "disk").write_bytes(partitions.gpt(bytes(4096), small_image().read_bytes()))
    guest_ceph.import_image(str(tmp_path / "disk"), "partitioned")
    rbd = {
        "monitors": [guest_ceph.monitor],
        "pool": "rbd",
        "image": "partitioned",
        "options": {"name": "admin", "secret": guest_ceph.admin_key, "ro": True},
        "readPartitions": True,
    }
    server = GuestServer(guest, "--rbd-backend", "daemon")
    server.start()
    made = server.post("/mount/rbd", {"fs_type": "squashfs", "partition": 2, "rbd": rbd})
    assert message(guest, made) == "written when the image was made\n"
    problem = server.refused("POST", "/mount/rbd", 422, {"fs_type": "squashfs", "partition": 3, "rbd": rbd})
    assert "it has 1 (0 MiB), 2 (" in problem["message"]
    server.delete(f"/mount/{made['id']}")
    assert server.everything() == []
    server.remove()
