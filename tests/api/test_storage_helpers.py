"""A storage helper that is killed or stopped, and a cluster that is silent, under containers that run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.ceph import Cluster
from lab.machine import Machine
from lab.remote import NOISE, box_on, helpers, rbd, reads, stopped
from lab.server import Server, alive, eventually, image, kill, running

pytestmark = [pytest.mark.api, pytest.mark.ceph]

IMAGES = ("one", "two", "three")


@pytest.fixture(scope="module")
def boxes(machine: Machine, ceph: Cluster) -> None:
    """Images of the cluster with busybox and noise in them."""
    tree = machine.session.disk / "boxes"
    with machine.expecting():
        (tree / "bin").mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "busybox", tree / "bin/busybox")
        (tree / "bin/sleep").symlink_to("busybox")
        (tree / NOISE).write_bytes(random.Random(2).randbytes(4 << 20))
    packed = machine.session.disk / "boxes.sqsh"
    subprocess.run(["mksquashfs", tree, packed, "-quiet", "-no-progress", "-no-xattrs"], check=True, timeout=60)
    for name in IMAGES:
        ceph.import_image(str(packed), name)
    shutil.rmtree(tree)
    packed.unlink()


@pytest.fixture
def server(run_dir: Path, boxes: None) -> Iterator[Server]:
    """One that attaches with the storage daemon whatever the kernel has."""
    with running(run_dir, "--rbd-backend", "daemon", "--operation-timeout", "10s", "--stop-timeout", "1s") as server:
        yield server


def started(server: Server, ceph: Cluster, name: str) -> dict[str, Any]:
    """A container that sleeps on an image: all that it needs of it for that is in memory."""
    box: dict[str, Any] = server.post("/container", box_on(ceph, name))
    eventually(lambda: "nanosleep" in Path(f"/proc/{box['pid']}/wchan").read_text(), "it sleeps")
    return box


def noise_in(box: dict[str, Any]) -> Path:
    """What a container sees."""
    return Path(f"/proc/{box['pid']}/root/{NOISE}")


def problems(server: Server) -> list[str]:
    return [one["problem"] for one in server.everything() if "problem" in one]


def all_well(server: Server) -> bool:
    return not problems(server)


def test_a_helper_that_is_killed_is_replaced_under_all_its_images(server: Server, ceph: Cluster) -> None:
    boxes = [started(server, ceph, name) for name in IMAGES]
    (pid,) = helpers(server).values()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: pid not in helpers(server).values() and helpers(server), "there is a new helper")
    eventually(lambda: all_well(server), "all is mended")
    assert len(helpers(server)) == 1
    for before in boxes:
        after = server.get(f"/container/{before['id']}")
        assert (after["state"], after["pid"]) == ("running", before["pid"])
        assert reads(noise_in(after))


def test_the_problem_is_shown_until_it_is_mended_and_it_can_be_deleted_meanwhile(
    server: Server, ceph: Cluster, machine: Machine
) -> None:
    first, second = (started(server, ceph, name) for name in IMAGES[:2])
    ceph.kill_mon()
    try:
        (pid,) = helpers(server).values()
        kill(pid)
        eventually(lambda: any("no monitor answers" in text for text in problems(server)), "the reason is shown")
        assert not reads(noise_in(first))
        server.delete(f"/container/{first['id']}?force=true")
        eventually(lambda: len(server.get("/attach")) == 1, "what only it needed is gone")
    finally:
        with machine.expecting():
            ceph.restart_mon()
    eventually(lambda: all_well(server), "the cluster is back, and the image mended")
    assert reads(noise_in(second))


def test_a_helper_that_was_killed_while_no_server_ran_is_replaced_at_the_next_start(
    server: Server, ceph: Cluster
) -> None:
    box = started(server, ceph, "one")
    server.kill()
    (pid,) = helpers(server).values()
    kill(pid)
    server.start()
    eventually(lambda: all_well(server), "it is mended")
    assert server.get(f"/container/{box['id']}")["pid"] == box["pid"]
    assert reads(noise_in(box))


def test_a_helper_that_is_adopted_by_a_new_server_is_watched_too(server: Server, ceph: Cluster) -> None:
    box = started(server, ceph, "one")
    server.stop()
    server.start()
    (pid,) = helpers(server).values()
    kill(pid)
    eventually(lambda: not alive(pid) and all_well(server) and reads(noise_in(box)), "it is mended")


def test_what_can_be_written_is_not_mended_and_can_be_deleted(server: Server, ceph: Cluster) -> None:
    ceph.create_image("scratch", "16M")
    device = server.post("/attach/rbd", rbd(ceph, "scratch", writable=True))
    subprocess.run(["mkfs.ext4", "-q", device["device_file"]], check=True)
    server.post("/mount/rbd", {"fs_type": "ext4", "rbd_id": device["id"]})
    (pid,) = helpers(server).values()
    kill(pid)
    eventually(lambda: problems(server), "it says so")
    assert "delete it, and make it again" in server.get(f"/attach/{device['id']}")["problem"]
    server.delete("/mount/0")
    server.delete(f"/attach/{device['id']}")
    assert os.listdir(server.run_dir / "helpers") == []


# ------------------------------------------------------------------------------------------- a helper that hangs


def test_a_helper_that_hangs_disturbs_nobody_else_and_its_container_can_be_deleted(
    server: Server, ceph: Cluster
) -> None:
    box = started(server, ceph, "one")
    (pid,) = helpers(server).values()
    with (
        stopped(pid),
        subprocess.Popen(["cat", noise_in(box)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as reader,
    ):
        other = server.post("/attach/loopback", image())
        server.delete(f"/attach/{other['id']}")
        assert server.get("/container")[0]["state"] == "running"
        server.delete(f"/container/{box['id']}?force=true")
        reader.wait(20)
        eventually(lambda: server.everything() == [], "all that the container needed is gone")
    assert os.listdir(server.run_dir / "helpers") == []
