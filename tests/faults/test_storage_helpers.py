"""A storage helper that is killed or stopped, and a store that is away, under containers that run.

On a Ceph the images of one user have a helper together; on an iSCSI target each has its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.machine import Machine
from lab.remote import (
    BY_DAEMON,
    NOISE,
    Store,
    attach,
    box_on,
    helpers,
    on,
    over,
    reads,
    stopped,
)
from lab.server import FOREVER, Server, eventually, image, kill, running

pytestmark = [pytest.mark.api, pytest.mark.ceph, pytest.mark.iscsi]

IMAGES = ("one", "two", "three")
ONLY_CEPH = pytest.mark.parametrize("store", ["on_ceph"], indirect=True)


@pytest.fixture(scope="module")
def boxes(machine: Machine) -> Iterator[Path]:
    """An image with busybox and noise in it."""
    tree = machine.session.disk / "boxes"
    with machine.expecting():
        (tree / "bin").mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "busybox", tree / "bin/busybox")
        for command in ("sleep", "cat"):
            (tree / "bin" / command).symlink_to("busybox")
        (tree / NOISE).write_bytes(random.Random(2).randbytes(4 << 20))
        packed = machine.session.disk / "boxes.sqsh"
        subprocess.run(["mksquashfs", tree, packed, "-quiet", "-no-progress", "-no-xattrs"], check=True, timeout=60)
    yield packed
    shutil.rmtree(tree)
    packed.unlink()


@pytest.fixture(scope="module", params=["on_ceph", "on_iscsi"])
def store(request: pytest.FixtureRequest, boxes: Path) -> Store:
    """One with the image in it, under several names."""
    store: Store = request.getfixturevalue(request.param)
    for name in IMAGES:
        store.put(boxes, name)
    return store


@pytest.fixture
def server(run_dir: Path, store: Store) -> Iterator[Server]:
    with running(run_dir, *BY_DAEMON, "--operation-timeout", "10s", "--stop-timeout", "1s") as server:
        yield server


@pytest.fixture
def empty(store: Store, tmp_path: Path) -> str:
    """An empty image of the test's own."""
    file = tmp_path / f"empty-{secrets.token_hex(3)}"
    file.touch()
    os.truncate(file, 16 << 20)
    store.put(file, file.name)
    return file.name


def started(server: Server, store: Store, name: str) -> dict[str, Any]:
    """A container that sleeps on an image: all that it needs of it for that is in memory."""
    box: dict[str, Any] = server.post("/container", box_on(store, name))
    eventually(lambda: "nanosleep" in Path(f"/proc/{box['pid']}/wchan").read_text(), "it sleeps")
    return box


def noise_in(box: dict[str, Any]) -> Path:
    """What a container sees."""
    return Path(f"/proc/{box['pid']}/root/{NOISE}")


def waits_for_squashfs(pid: int) -> bool:
    """Whether the process is in the kernel, in that file system."""
    return "squashfs" in Path(f"/proc/{pid}/stack").read_text()


def cannot_be_killed(pid: int) -> bool:
    """Whether the process is in an uninterruptible wait (proc_pid_stat(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"


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


def all_helpers(server: Server) -> set[int]:
    return set(helpers(server).values())


def test_a_helper_that_is_killed_is_replaced_under_all_its_images(server: Server, store: Store) -> None:
    boxes = [started(server, store, name) for name in IMAGES]
    before = all_helpers(server)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(all_helpers(server) - before) == len(before), "there are new helpers")
    eventually(lambda: all_well(server), "all is mended")
    for box in boxes:
        after = server.get(f"/container/{box['id']}")
        assert (after["state"], after["pid"]) == ("running", box["pid"])
        assert reads(noise_in(after))


def test_the_problem_is_shown_until_it_is_mended_and_it_can_be_deleted_meanwhile(server: Server, store: Store) -> None:
    first, second = (started(server, store, name) for name in IMAGES[:2])
    with store.unreachable():
        for pid in all_helpers(server):
            kill(pid)
        eventually(lambda: any(store.unreachable_words in text for text in problems(server)), "the reason is shown")
        assert not reads(noise_in(first))
        assert all("it is being mended" in one["problem"] for one in server.leaks())
        server.delete(f"/container/{first['id']}?force=true")
        eventually(lambda: len(server.get("/attach")) == 1, "what only it needed is gone")
    eventually(lambda: all_well(server), "the store is back, and the image mended")
    assert reads(noise_in(second))


def test_a_delete_that_is_refused_while_it_is_not_mended_changes_nothing(server: Server, store: Store) -> None:
    """It is forced, since the mount has a problem, and refused, since that stands on it in the kernel."""
    box = started(server, store, "one")
    with store.unreachable():
        for pid in all_helpers(server):
            kill(pid)
        eventually(lambda: any(store.unreachable_words in text for text in problems(server)), "the reason is shown")
        (before,) = server.get("/attach")
        for _ in range(2):  # also the second is not told that it goes by itself
            refusal = server.refused("DELETE", f"/attach/{before['id']}?force=true", 409)["message"]
            assert "the mount at" in refusal
            assert "tried again" not in refusal
        (after,) = server.get("/attach")
        assert after["refs"] == before["refs"]
    server.delete(f"/container/{box['id']}?force=true")
    eventually(lambda: server.get("/attach") == [], "it goes as well, when nobody tries to mend it any more")


@ONLY_CEPH
def test_a_helper_that_was_killed_while_no_server_ran_is_replaced_at_the_next_start(
    server: Server, store: Store
) -> None:
    box = started(server, store, "one")
    server.kill()
    (pid,) = all_helpers(server)
    kill(pid)
    server.start()
    eventually(lambda: all_well(server), "it is mended")
    assert server.get(f"/container/{box['id']}")["pid"] == box["pid"]
    assert reads(noise_in(box))


@ONLY_CEPH
def test_a_helper_that_is_adopted_by_a_new_server_is_watched_too(server: Server, store: Store) -> None:
    box = started(server, store, "one")
    server.stop()
    server.start()
    (pid,) = all_helpers(server)
    kill(pid)
    eventually(lambda: all_helpers(server) - {pid}, "there is a new helper")
    eventually(lambda: all_well(server), "it is mended")
    assert reads(noise_in(box))


def test_what_can_be_written_is_not_mended_and_can_be_deleted(server: Server, store: Store, empty: str) -> None:
    device = attach(server, store, empty, writable=True)
    subprocess.run(["mkfs.ext4", "-q", device["device_file"]], check=True)
    kind = store.attachment(empty)["kind"]
    server.post(f"/mount/{kind}", {"fs_type": "ext4", f"{kind}_id": device["id"]})
    (pid,) = all_helpers(server)
    kill(pid)
    eventually(lambda: any("delete it, and make it again" in text for text in problems(server)), "it says so")
    server.delete("/mount/0")
    server.delete(f"/attach/{device['id']}")
    assert os.listdir(server.run_dir / "helpers") == []


# ------------------------------------------------------------------------------------------- a helper that hangs


@ONLY_CEPH
def test_a_helper_that_hangs_disturbs_nobody_else_and_its_container_can_be_deleted(
    server: Server, store: Store
) -> None:
    box = started(server, store, "one")
    with stopped(*all_helpers(server)), hanging_on(noise_in(box)):
        server.delete(f"/attach/{server.post('/attach/loopback', image())['id']}")
        assert server.get("/container")[0]["state"] == "running"
        server.delete(f"/container/{box['id']}?force=true")
        eventually(lambda: server.everything() == [], "all that the container needed is gone")
    assert os.listdir(server.run_dir / "helpers") == []


def test_a_container_that_reads_from_a_helper_that_hangs_can_be_stopped(server: Server, store: Store) -> None:
    """It waits in the kernel, where no signal reaches it."""
    mount = server.post("/mount", on(store, "one"))
    overlay = over({"id": mount["id"]})
    reader = server.post("/container", {"mount": overlay, "command": f"/bin/cat /{NOISE}"})
    server.post("/container", {"mount": overlay, "command": "/bin/sleep 0", "state": "running"})
    server.await_state(1, "exited")  # busybox is in memory now
    server.delete("/container/1")
    with stopped(*all_helpers(server)):
        running = server.get(f"/container/{reader['id']}/running")
        eventually(lambda: waits_for_squashfs(running["pid"]), "it waits for the image")
        server.get(f"/container/{reader['id']}/exited")
        server.await_state(reader["id"], "exited")
    eventually(lambda: mended(server), "the image is mended")
    server.delete(f"/container/{reader['id']}")
    server.await_state(server.post("/container", box_on(store, "one", f"/bin/cat /{NOISE}"))["id"], "exited")


@ONLY_CEPH
def test_of_several_images_of_a_helper_that_hangs_the_others_work_when_it_goes_on(server: Server, store: Store) -> None:
    first, second = (started(server, store, name) for name in IMAGES[:2])
    (pid,) = all_helpers(server)
    with stopped(pid):
        server.delete(f"/container/{first['id']}?force=true")
        [left] = [one for one in server.get("/attach") if one["refs"] == 0]
        assert f"process {pid} (qemu-storage-daemon)" in left["problem"]
        third = started(server, store, "three")
        assert reads(noise_in(third))
    eventually(lambda: len(server.get("/attach")) == 2, "what was deleted is let go")
    assert all_well(server)
    assert reads(noise_in(second))


@ONLY_CEPH
def test_what_was_written_through_a_helper_that_hangs_is_not_given_up(server: Server, store: Store, empty: str) -> None:
    device = attach(server, store, empty, writable=True)
    Path(device["device_file"]).write_bytes(b"kept" * 1024)
    (pid,) = all_helpers(server)
    with stopped(pid):
        problem = server.refused("DELETE", f"/attach/{device['id']}", 504)
        assert f"process {pid} (qemu-storage-daemon)" in problem["message"]
    eventually(lambda: server.get("/attach") == [], "it is detached when the helper answers")
    assert store.content(empty).startswith(b"kept" * 1024)


@ONLY_CEPH
def test_a_start_on_a_helper_that_hangs_is_504_and_leaves_nothing(server: Server, store: Store) -> None:
    mount = server.post("/mount", on(store, "one"))
    with stopped(*all_helpers(server)):
        body = {"mount": over({"id": mount["id"]}), "command": FOREVER, "state": "running"}
        server.refused("POST", "/container", 504, body)
        eventually(lambda: server.get("/container") == [], "what came of it has ended")
    eventually(lambda: mended(server), "the image is mended")
    started(server, store, "one")


@ONLY_CEPH
def test_a_server_starts_and_stops_beside_a_helper_that_hangs(server: Server, store: Store) -> None:
    box = started(server, store, "one")
    (pid,) = all_helpers(server)
    with stopped(pid), hanging_on(noise_in(box)):
        server.stop()
        server.start()
        assert [one["state"] for one in server.get("/container")] == ["running"]
        assert all_well(server)
        os.kill(pid, signal.SIGCONT)
    assert reads(noise_in(box))


# --------------------------------------------------------------------------------------- a store that is silent


@ONLY_CEPH
def test_reads_go_on_when_the_store_is_back(server: Server, store: Store) -> None:
    box = started(server, store, "one")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with store.silent():
            reading = pool.submit(reads, noise_in(box))
            server.delete(f"/attach/{server.post('/attach/loopback', image())['id']}")
        assert reading.result(60)
    assert all_well(server)


def test_a_container_that_reads_from_a_silent_store_can_be_deleted(server: Server, store: Store) -> None:
    box = started(server, store, "one")
    with store.silent(), hanging_on(noise_in(box)):
        server.delete(f"/container/{box['id']}?force=true")
        eventually(lambda: server.everything() == [], "all that the container needed is gone")


@pytest.mark.parametrize("store", ["on_iscsi"], indirect=True)
def test_what_was_written_to_a_silent_store_is_given_up_as_the_refusal_says(
    run_dir: Path, store: Store, empty: str
) -> None:
    """Its helper heeds no other signal."""
    with running(run_dir, *BY_DAEMON, "--operation-timeout", "2s") as server:
        device = attach(server, store, empty, writable=True)
        subprocess.run(["mkfs.ext4", "-q", device["device_file"]], check=True)
        mount = server.post("/mount/iscsi", {"fs_type": "ext4", "iscsi_id": device["id"]})
        Path(mount["mountpoint"], NOISE).write_bytes(bytes(1 << 20))
        (pid,) = all_helpers(server)
        way_out = f"'kill -9 {pid}'"
        with store.silent():
            assert way_out in server.refused("DELETE", f"/mount/{mount['id']}", 504)["message"]
            eventually(
                lambda: any("not come back" in text and way_out in text for text in problems(server)), "it is told"
            )
            kill(pid)
            eventually(lambda: server.get("/mount") == [], "the mount is gone")
            server.delete(f"/attach/{device['id']}")
        assert os.listdir(server.run_dir / "helpers") == []


@ONLY_CEPH
@pytest.mark.parametrize("forced", [True, False], ids=["deleted by force", "stopped"])
def test_containers_that_read_from_the_same_silent_image_can_all_be_ended(
    server: Server, store: Store, forced: bool
) -> None:
    """None of them alone is a reason to cut the image off from its store, as long as another runs."""
    mount = server.post("/mount", on(store, "one"))
    overlays = [over({"id": mount["id"]}) for _ in range(2)]
    server.post("/container", {"mount": overlays[0], "command": "/bin/sleep 0", "state": "running"})
    server.await_state(0, "exited")  # busybox is in memory now
    server.delete("/container/0")
    boxes = [server.post("/container", {"mount": one, "command": f"/bin/cat /{NOISE}"}) for one in overlays]
    with store.silent():
        readers = [server.get(f"/container/{box['id']}/running")["pid"] for box in boxes]
        eventually(lambda: any(map(waits_for_squashfs, readers)), "one waits for the image")
        eventually(lambda: all(map(cannot_be_killed, readers)), "the other waits for what that one reads")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            if forced:
                list(pool.map(lambda box: server.delete(f"/container/{box['id']}?force=true"), boxes))
            else:
                list(pool.map(lambda box: server.get(f"/container/{box['id']}/exited"), boxes))
                list(pool.map(lambda box: server.await_state(box["id"], "exited"), boxes))
    eventually(lambda: mended(server), "the image is mended")
