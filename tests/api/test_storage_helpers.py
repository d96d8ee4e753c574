"""A storage helper that is killed or stopped, and a cluster that is silent, under containers that run."""

from __future__ import annotations

import concurrent.futures
import contextlib
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
from lab.remote import NOISE, box_on, helpers, on_rbd, rbd, reads, stopped
from lab.server import FOREVER, Server, eventually, image, kill, running

pytestmark = [pytest.mark.api, pytest.mark.ceph]

IMAGES = ("one", "two", "three")


@pytest.fixture(scope="module")
def boxes(machine: Machine, ceph: Cluster) -> None:
    """Images of the cluster with busybox and noise in them."""
    tree = machine.session.disk / "boxes"
    with machine.expecting():
        (tree / "bin").mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "busybox", tree / "bin/busybox")
        for command in ("sleep", "cat"):
            (tree / "bin" / command).symlink_to("busybox")
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


def waits_for_squashfs(pid: int) -> bool:
    """Whether the process is in the kernel, in that file system."""
    return "squashfs" in Path(f"/proc/{pid}/stack").read_text()


@contextlib.contextmanager
def hanging_on(path: Path) -> Iterator[None]:
    """A process of the host's reads a file that gives no answer; it has one by the end."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(["cat", path], stdout=quiet, stderr=quiet) as reader:
        eventually(lambda: waits_for_squashfs(reader.pid), "it waits for the image")
        yield
        eventually(lambda: reader.poll() is not None, "it has got an answer")


def problems(server: Server) -> list[str]:
    return [one["problem"] for one in server.everything() if "problem" in one]


def all_well(server: Server) -> bool:
    return not problems(server)


def mended(server: Server) -> bool:
    """Whether nothing is wrong but what squashfs keeps: of an image this small it forgets no error that it met."""
    return all("keeps errors that it met" in text for text in problems(server))


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
    eventually(lambda: helpers(server) and pid not in helpers(server).values(), "there is a new helper")
    eventually(lambda: all_well(server), "it is mended")
    assert reads(noise_in(box))


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
    with stopped(pid), hanging_on(noise_in(box)):
        server.delete(f"/attach/{server.post('/attach/loopback', image())['id']}")
        assert server.get("/container")[0]["state"] == "running"
        server.delete(f"/container/{box['id']}?force=true")
        eventually(lambda: server.everything() == [], "all that the container needed is gone")
    assert os.listdir(server.run_dir / "helpers") == []


def test_a_container_that_reads_from_a_helper_that_hangs_can_be_stopped(server: Server, ceph: Cluster) -> None:
    """It waits in the kernel, where no signal reaches it."""
    mount = server.post("/mount", on_rbd(ceph, "one"))
    overlay = {"kind": "overlay", "overlay": {"lower": [{"id": mount["id"]}]}}
    reader = server.post("/container", {"mount": overlay, "command": f"/bin/cat /{NOISE}"})
    server.post("/container", {"mount": overlay, "command": "/bin/sleep 0", "state": "running"})
    server.await_state(1, "exited")  # busybox is in memory now
    server.delete("/container/1")
    (pid,) = helpers(server).values()
    with stopped(pid):
        running = server.get(f"/container/{reader['id']}/running")
        eventually(lambda: waits_for_squashfs(running["pid"]), "it waits for the image")
        server.get(f"/container/{reader['id']}/exited")
        server.await_state(reader["id"], "exited")
    eventually(lambda: mended(server), "the image is mended")
    server.delete(f"/container/{reader['id']}")
    server.await_state(server.post("/container", box_on(ceph, "one", f"/bin/cat /{NOISE}"))["id"], "exited")


def test_of_several_images_of_a_helper_that_hangs_the_others_work_when_it_goes_on(
    server: Server, ceph: Cluster
) -> None:
    first, second = (started(server, ceph, name) for name in IMAGES[:2])
    (pid,) = helpers(server).values()
    with stopped(pid):
        server.delete(f"/container/{first['id']}?force=true")
        [left] = [one for one in server.get("/attach") if one["refs"] == 0]
        assert f"process {pid} (qemu-storage-daemon)" in left["problem"]
        third = started(server, ceph, "three")
        assert reads(noise_in(third))
    eventually(lambda: len(server.get("/attach")) == 2, "what was deleted is let go")
    assert all_well(server)
    assert reads(noise_in(second))


def test_what_was_written_through_a_helper_that_hangs_is_not_given_up(server: Server, ceph: Cluster) -> None:
    ceph.create_image("kept", "16M")
    device = server.post("/attach/rbd", rbd(ceph, "kept", writable=True))
    Path(device["device_file"]).write_bytes(b"kept" * 1024)
    (pid,) = helpers(server).values()
    with stopped(pid):
        problem = server.refused("DELETE", f"/attach/{device['id']}", 504)
        assert f"process {pid} (qemu-storage-daemon)" in problem["message"]
    eventually(lambda: server.get("/attach") == [], "it is detached when the helper answers")
    assert ceph.read_image("kept").startswith(b"kept" * 1024)


def test_a_start_on_a_helper_that_hangs_is_504_and_leaves_nothing(server: Server, ceph: Cluster) -> None:
    mount = server.post("/mount", on_rbd(ceph, "one"))
    (pid,) = helpers(server).values()
    with stopped(pid):
        body = {"mount": {"kind": "overlay", "overlay": {"lower": [{"id": mount["id"]}]}}, "command": FOREVER}
        server.refused("POST", "/container", 504, {**body, "state": "running"})
        eventually(lambda: server.get("/container") == [], "what came of it has ended")
    eventually(lambda: mended(server), "the image is mended")
    started(server, ceph, "one")


def test_a_server_starts_and_stops_beside_a_helper_that_hangs(server: Server, ceph: Cluster) -> None:
    box = started(server, ceph, "one")
    (pid,) = helpers(server).values()
    with stopped(pid), hanging_on(noise_in(box)):
        server.stop()
        server.start()
        assert [one["state"] for one in server.get("/container")] == ["running"]
        assert all_well(server)
        os.kill(pid, signal.SIGCONT)
    assert reads(noise_in(box))


# ------------------------------------------------------------------------------------- a cluster that is silent


def test_reads_go_on_when_the_osd_is_back(server: Server, ceph: Cluster, machine: Machine) -> None:
    box = started(server, ceph, "one")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ceph.kill_osd()
        try:
            reading = pool.submit(reads, noise_in(box))
            server.delete(f"/attach/{server.post('/attach/loopback', image())['id']}")
        finally:
            with machine.expecting():
                ceph.restart_osd()
        assert reading.result(60)
    assert all_well(server)


def test_a_container_that_reads_from_a_dead_cluster_can_be_deleted(
    server: Server, ceph: Cluster, machine: Machine
) -> None:
    box = started(server, ceph, "one")
    ceph.kill_osd()
    try:
        with hanging_on(noise_in(box)):
            server.delete(f"/container/{box['id']}?force=true")
            eventually(lambda: server.everything() == [], "all that the container needed is gone")
    finally:
        with machine.expecting():
            ceph.restart_osd()
