"""What somebody who is root on the node may do to the objects of a server, and what must come of it: the server says so
in time, and all can be deleted, with nothing left.

Each is done to objects made for it, of an image file of its own: so it is nothing to anybody else. It is done while the
server runs, or while none does, or the server is killed right after; and its supervisor with it, or not.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab import table
from lab.scene import KILLED, Scene
from lab.server import FOREVER, Server, copy_of_small_image, eventually, image, squashfs

IN_TIME = 30.0
"""Seconds until it must be told. A look is followed by a pause of ten times what it took, and on a machine that others
use as well one takes more than a second."""
UNSEEN = () if tuple(map(int, platform.release().split(".")[:2])) >= (6, 15) else (None,)
"""What is said of an end that nobody has seen: newer kernels keep it (PIDFD_INFO_EXIT)."""
PRINTING = "/bin/sh -c 'while true; do echo line; sleep 0.01; done'"


def unmount(scene: Scene) -> None:
    """One of the mounts under a container."""
    with _box(scene) as made:
        mount = scene.random.choice([made["mount"], *made["mount"]["overlay"]["lower"]])
        with _meddling(scene):
            _run("umount", mount["mountpoint"])
        _await_problem(scene.server, f"/mount/{mount['id']}", "gone from the kernel")
        _await_problem(scene.server, f"/container/{made['id']}", f"mount {mount['id']} ", "which it needs")


def detach_a_loop_device(scene: Scene) -> None:
    """Whoever has it next keeps it."""
    with _image(scene) as file:
        made = scene.server.post("/attach/loopback", image(path=str(file)))
        with _meddling(scene):
            _run("losetup", "-d", made["device_file"])
        _await_problem(scene.server, f"/attach/{made['id']}", "gone from the kernel")
        _delete(scene.server, f"/attach/{made['id']}")


def mount_over_ours(scene: Scene) -> None:
    """The stranger's mount stays, as long as the stranger wants."""
    with _mount(scene) as made:
        path = f"/mount/{made['id']}"
        with _stranger_on(made["mountpoint"], scene):
            _await_problem(scene.server, path, "stranger (tmpfs) is mounted over")
            assert scene.server.refused("DELETE", path, 409)["holders"] == ["stranger (tmpfs)"]
            assert any("stranger" in line for line in table.lines())
        _await_none(scene.server, path)


def remove_a_directory(scene: Scene) -> None:
    """What was written is lost."""
    with _box(scene) as made:
        mount = made["mount"]
        with _meddling(scene):
            shutil.rmtree(mount["overlay"][scene.random.choice(("upperdir", "workdir"))])
        _await_problem(scene.server, f"/mount/{mount['id']}", "was removed by somebody")
        _await_problem(scene.server, f"/container/{made['id']}", f"mount {mount['id']} ", "which it needs")


def replace_an_image(scene: Scene) -> None:
    """Who has the old one keeps it."""
    with _image(scene) as file, _mount(scene, file) as made:
        with _meddling(scene):
            copy_of_small_image(scene.images, f"{file.name}.new").rename(file)
        _await_problem(scene.server, f"/attach/{made['attach']['attach']['id']}", "another file now")
        assert "problem" not in scene.server.get(f"/mount/{made['id']}")


def cut_an_image(scene: Scene) -> None:
    """All that stands on it says so, until it has its size again, if ever."""
    with _image(scene) as file, _box(scene, file, state="created") as made:
        content, times = file.read_bytes(), file.stat()
        with _meddling(scene):
            os.truncate(file, 4096)
        for path in _paths(made):
            _await_problem(scene.server, path, "was cut to 4096 bytes")
        if scene.random.random() < 0.5:
            file.write_bytes(content)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            for path in _paths(made):
                _await_none(scene.server, path)


def kill_a_container(scene: Scene) -> None:
    """How it ended is known."""
    with _box(scene, state="running") as made:
        with _meddling(scene):
            os.kill(made["pid"], signal.SIGKILL)
        ended = scene.server.await_state(made["id"], "dead")
        assert ended["exit_code"] in (128 + signal.SIGKILL, *UNSEEN), ended


def remove_a_record(scene: Scene) -> None:
    """It is written again, and the next server knows of everything. (One that is removed while no server runs, or just
    before its death, is that of an object nobody knows of.)"""
    with _box(scene) as made:
        record = scene.server.run_dir / f"state{scene.random.choice([*_paths(made)])}.json"
        record.unlink()
        eventually(record.exists, f"{record} is there again", IN_TIME)
        scene.die_besides()
        assert scene.server.get(f"/container/{made['id']}") == made


def remove_a_log(scene: Scene) -> None:
    """The container prints on."""
    with _box(scene, state="running", command=PRINTING) as made:
        log = Path(made["logfile"])
        with _meddling(scene):
            log.unlink()
        eventually(lambda: log.exists() and "line" in log.read_text(), f"{log} is there again", IN_TIME)
        assert "problem" not in scene.server.get(f"/container/{made['id']}")


ALL: tuple[Callable[[Scene], None], ...] = (
    unmount,
    detach_a_loop_device,
    mount_over_ours,
    remove_a_directory,
    replace_an_image,
    cut_an_image,
    kill_a_container,
    remove_a_record,
    remove_a_log,
)


# ------------------------------------------------------------------------------------------------------ how it is done


@contextlib.contextmanager
def _meddling(scene: Scene) -> Iterator[None]:
    """Within it is what somebody does. Afterwards there is a server."""
    when, who = scene.random.choice((None, "before", "after")), scene.random.choice(KILLED)
    if when == "before":
        scene.kill(who)
    yield
    if when == "after":
        scene.kill(who)
    if when is not None:
        scene.server.start()
        scene.deaths[f"{who} right {when}"] += 1


@contextlib.contextmanager
def _stranger_on(mountpoint: str, scene: Scene) -> Iterator[None]:
    with _meddling(scene):
        _run("mount", "-t", "tmpfs", "stranger", mountpoint)
    try:
        yield
    finally:
        _run("umount", mountpoint)


def _run(*command: str) -> None:
    """Whatever is just being looked at by the server is busy for a moment."""
    eventually(lambda: subprocess.run(command, capture_output=True).returncode == 0, " ".join(command))


# ------------------------------------------------------------------------------------------------ what it is done to


@contextlib.contextmanager
def _image(scene: Scene) -> Iterator[Path]:
    file = copy_of_small_image(scene.images, f"own-{scene.faults.total()}")
    try:
        yield file
    finally:
        file.unlink()


@contextlib.contextmanager
def _mount(scene: Scene, file: Path | None = None) -> Iterator[dict[str, Any]]:
    """A mount of the image, or of one of its own; in the end it is deleted."""
    with contextlib.ExitStack() as stack:
        path = file or stack.enter_context(_image(scene))
        made = scene.server.post("/mount", squashfs(path=str(path)))
        yield made
        _delete(scene.server, *_below(made))


@contextlib.contextmanager
def _box(
    scene: Scene, file: Path | None = None, state: str | None = None, command: str = FOREVER
) -> Iterator[dict[str, Any]]:
    """A container on an overlay on the image, or on one of its own; in the end all of it is deleted."""
    state = state or scene.random.choice(("created", "running"))
    with contextlib.ExitStack() as stack:
        path = file or stack.enter_context(_image(scene))
        mount = {"kind": "overlay", "overlay": {"lower": [squashfs(path=str(path))]}}
        made = scene.server.post("/container", {"mount": mount, "command": command, "state": state})
        yield made
        _delete(scene.server, *_paths(made))


def _paths(box: dict[str, Any]) -> Iterator[str]:
    """A container, and all that it stands on."""
    yield f"/container/{box['id']}"
    yield from _below(box["mount"])


def _below(mount: dict[str, Any]) -> Iterator[str]:
    yield f"/mount/{mount['id']}"
    for lower in mount.get("overlay", {}).get("lower", ()):
        yield from _below(lower)
    if "attach" in mount:
        yield f"/attach/{mount['attach']['attach']['id']}"


# ------------------------------------------------------------------------------------------------ what comes of it


def _await_problem(server: Server, path: str, *words: str) -> None:
    """An object has a problem with these words."""
    _await(server, path, f"has a problem with {words}", lambda told: all(word in told for word in words))


def _await_none(server: Server, path: str) -> None:
    _await(server, path, "has no problem any more", lambda told: not told)


def _await(server: Server, path: str, what: str, is_so: Callable[[str], bool]) -> None:
    told = [""]

    def right() -> bool:
        told[0] = server.get(path).get("problem", "")
        return is_so(told[0])

    try:
        eventually(right, f"{path} {what}", IN_TIME)
    except AssertionError as late:
        raise AssertionError(f"{late}: {told[0]!r}") from None


def _delete(server: Server, first: str, *others: str) -> None:
    """The first is deleted, and with it the others. Only what runs takes force."""
    force = "?force=true" if server.get(first).get("state") == "running" else ""
    server.delete(first + force)
    gone = (first, *others)
    eventually(lambda: all(server.http.get(path).status_code == 404 for path in gone), f"{gone} are gone")
