"""What the service this one replaces got wrong, each as a test."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from imageapi.linux import loop
from lab.images import small_image, systemd_image
from lab.machine import Machine, Trace, backing_files
from lab.server import FOREVER, Server, alive, box, eventually, image, kill, running, squashfs, writable

pytestmark = pytest.mark.api


OWN_LINE = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d (container\(|init: )")
"""How a line begins that the service has written itself."""
SLOW_END = """/bin/sh -c 'trap "sleep 0.3; exit 5" TERM; while true; do sleep 0.01; done'"""


def output(server: Server, command: str, **more: Any) -> str:
    """What a container prints that runs `command` to its end."""
    made = server.post("/container", box(command, **more))
    ended = server.await_state(made["id"], "exited", "dead")
    lines = Path(ended["logfile"]).read_text().splitlines()
    server.delete(f"/container/{made['id']}")
    return "\n".join(line for line in lines if not OWN_LINE.match(line))


def odd_image(directory: Path, **links: str) -> dict[str, Any]:
    """A mount of an image whose directories are symbolic links, as a hostile one could have them."""
    tree = directory / "tree"
    unpacked = ["unsquashfs", "-quiet", "-no-progress", "-d", str(tree), str(small_image())]
    subprocess.run(unpacked, check=True, stdout=subprocess.DEVNULL)
    for name, target in links.items():
        path = tree / name.replace("_", "/")
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target)
    file = directory / "odd.sqsh"
    packed = ["mksquashfs", str(tree), str(file), "-quiet", "-no-progress"]
    subprocess.run(packed, check=True, stdout=subprocess.DEVNULL)
    attachment = {"path": str(file), "base": "root", "ro": True}
    lower = {"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": attachment}}
    return {"kind": "overlay", "overlay": {"lower": [lower]}}


def test_a_command_that_does_not_exist_harms_nobody(server: Server) -> None:
    server.refused("POST", "/container", 422, box("/no/such/command"))
    assert os.readlink(f"/proc/{server.pid}/root") == "/"
    assert server.post("/container", box(FOREVER))["state"] == "running"


def test_a_start_changes_nothing_about_the_server(server: Server) -> None:
    before = [os.readlink(f"/proc/{server.pid}/{link}") for link in ("root", "cwd", "ns/mnt", "ns/pid", "ns/uts")]
    server.post("/container", box(FOREVER))
    after = [os.readlink(f"/proc/{server.pid}/{link}") for link in ("root", "cwd", "ns/mnt", "ns/pid", "ns/uts")]
    assert before == after


def test_a_stop_ends_also_for_what_ignores_it(run_dir: Path) -> None:
    with running(run_dir, "--stop-timeout", "300ms") as server:
        stubborn = """/bin/sh -c 'trap "echo no" TERM; echo ready; while true; do sleep 0.01; done'"""
        made = server.post("/container", box(stubborn))
        eventually(lambda: "ready" in Path(made["logfile"]).read_text(), "the handler is installed")
        server.get("/container/0/exited")
        ended = server.await_state(0, "exited")
        assert (ended["exit_code"], alive(made["pid"])) == (137, False)


def test_what_catches_no_sigterm_is_killed_at_once(server: Server) -> None:
    server.post("/container", box(FOREVER))
    server.get("/container/0/exited")
    assert server.await_state(0, "exited")["exit_code"] == 137


def test_exited_is_said_when_the_process_is_gone(server: Server) -> None:
    made = server.post("/container", box(SLOW_END))
    server.get("/container/0/exited")
    while server.get("/container/0")["state"] == "stopping":
        pass
    assert not alive(made["pid"])
    server.delete("/container/0")


def test_systemd_is_really_stopped(server: Server) -> None:
    attachment = {"path": str(systemd_image()), "base": "root", "ro": True}
    lower = {"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": attachment}}
    mount = {"kind": "overlay", "overlay": {"lower": [lower]}}
    body = {"mount": mount, "command": "/usr/lib/systemd/systemd", "systemd": True, "state": "running"}
    made = server.post("/container", body)
    inside = ["nsenter", "-t", str(made["pid"]), "-a", "systemctl", "is-system-running"]
    eventually(lambda: subprocess.run(inside, capture_output=True, text=True).stdout == "running\n", "systemd is up")
    server.get("/container/0/exited")
    ended = server.await_state(0, "exited", "dead")
    assert (ended["state"], ended["exit_code"] in (0, 130)) == ("exited", True), ended
    assert "problem" not in ended


def test_nothing_is_orphaned_by_a_kill(server: Server) -> None:
    made = server.post("/container", box(FOREVER))
    server.kill()
    server.start()
    assert server.get("/container/0")["pid"] == made["pid"]
    server.delete("/container/0?force=true")
    assert not alive(made["pid"])


@pytest.mark.parametrize("code", [0, 42, 255])
def test_exit_codes_are_kept(server: Server, code: int) -> None:
    server.post("/container", box(f"/bin/sh -c 'exit {code}'"))
    assert server.await_state(0, "exited", "dead")["exit_code"] == code
    server.stop()
    server.start()
    assert server.get("/container/0")["exit_code"] == code


def test_what_nothing_uses_is_deleted_without_force(server: Server) -> None:
    server.post("/mount", squashfs())
    server.delete("/mount/0")
    assert server.everything() == []


def test_an_inner_mount_is_not_left_when_the_outer_fails(server: Server) -> None:
    twice = {"kind": "overlay", "overlay": {"lower": [squashfs(), squashfs()]}}
    server.refused("POST", "/mount", 422, twice)
    bad = {"kind": "bind", "bind": {"path": "/not/there", "base": "mount", "mount": writable()}}
    server.refused("POST", "/mount", 422, bad)
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


def test_a_forced_delete_tells_the_truth(server: Server) -> None:
    mounted = server.post("/mount", squashfs())
    with open(f"{mounted['mountpoint']}/etc/hostname"):
        server.refused("DELETE", "/mount/0?force=true", 409)
        assert os.path.ismount(mounted["mountpoint"])
        assert server.get("/mount/0")["refs"] == 1
    server.delete("/mount/0?force=true")
    assert not os.path.exists(mounted["mountpoint"])


@pytest.mark.parametrize("recursive", [False, True])
def test_read_only_binds_are_read_only(server: Server, tmp_path: Path, recursive: bool) -> None:
    bind = {"path": str(tmp_path), "base": "root", "ro": True, "recursive": recursive}
    mounted = server.post("/mount/bind", bind)
    with pytest.raises(OSError, match="Read-only"):
        Path(mounted["mountpoint"], "file").write_text("no")


def test_a_read_only_bind_is_so_all_the_way_down(server: Server, tmp_path: Path) -> None:
    """What is mounted below the directory is bound, too, and is as little to be written to."""
    below = server.post("/mount", writable())
    tree = {"path": str(server.run_dir / "mounts"), "base": "root", "ro": True, "recursive": True}
    bound = server.post("/mount/bind", tree)
    inside = Path(bound["mountpoint"], os.path.basename(below["mountpoint"]))
    assert "etc" in os.listdir(inside)
    with pytest.raises(OSError, match="Read-only"):
        (inside / "file").write_text("no")
    Path(below["mountpoint"], "file").write_text("yes")


@pytest.mark.parametrize("name", ["node-2345", "7", "a.b_c-9", "X" * 255])
def test_names_may_hold_digits(server: Server, name: str) -> None:
    server.post("/container", {"mount": writable(), "command": FOREVER, "name": name})
    assert server.get(f"/container/byname/{name}")["name"] == name


@pytest.mark.parametrize("path", ["/escape", "/../../../../etc/passwd", "/abs", "../../etc/shadow"])
def test_no_path_in_an_image_reaches_the_host(server: Server, path: str) -> None:
    inside = {"path": path, "base": "mount", "mount": squashfs(), "ro": True}
    answer = server.http.post("/attach/loopback", json=inside)
    if answer.status_code == 201:  # it is the image's own file of that name
        device = answer.json()["device_file"]
        with open(device, "rb") as file, open("/etc/passwd", "rb") as host:
            assert file.read(16) != host.read(16)
    else:
        assert answer.status_code == 422


@pytest.mark.parametrize("path", ["/escape", "/abs", "../../../../../../root", "/data/../../../../root"])
def test_no_bind_of_an_image_reaches_the_host(server: Server, path: str) -> None:
    root = os.stat("/root")
    inside = {"path": path, "base": "mount", "mount": squashfs(), "ro": True}
    answer = server.http.post("/mount/bind", json=inside)
    assert answer.status_code in (201, 422), answer.text
    if answer.status_code == 201:  # it is the image's own directory of that name
        bound = os.stat(answer.json()["mountpoint"])
        assert (bound.st_dev, bound.st_ino) != (root.st_dev, root.st_ino)
        assert bound.st_dev == os.stat(server.get("/mount?kind=attach")[0]["mountpoint"]).st_dev


def test_a_command_by_a_link_is_the_images_own(server: Server) -> None:
    problem = server.refused("POST", "/container", 422, box("/escape"))
    assert "executable" in problem["message"]


def _mounts(machine: Machine) -> set[Trace]:
    """This machine's mounts, but for another run's and the supervisor's own."""
    return {one for one in machine.look() if one.kind == "mount" and "/supervisor/keep" not in one.identity}


def test_special_mounts_do_not_follow_an_images_links(server: Server, tmp_path: Path, machine: Machine) -> None:
    """An image whose /proc and /dev lead out: nothing of the host's is mounted over, or made."""
    target = tmp_path / "target"
    target.mkdir()
    before = _mounts(machine)
    mount = odd_image(tmp_path, proc=str(target), dev="../../../../../" + str(target))
    answer = server.http.post("/container", json={"mount": mount, "command": FOREVER, "state": "running"})
    assert answer.status_code in (201, 422), answer.text
    assert os.listdir(target) == []
    server.clear()
    assert _mounts(machine) == before


def test_options_may_be_missing(server: Server) -> None:
    rbd = {"monitors": ["127.0.0.1:1"], "pool": "rbd", "image": "image"}
    problem = server.refused("POST", "/attach/rbd", 504, rbd)
    assert "127.0.0.1:1" in problem["message"]
    assert server.everything() == []


def test_a_container_inherits_no_descriptors(server: Server) -> None:
    shown = output(server, "/bin/ls -l /proc/self/fd")
    numbers = re.findall(r" (\d+) -> ", shown)
    assert numbers == ["0", "1", "2"], shown


def test_quotes_in_a_command_are_the_shells(server: Server) -> None:
    assert output(server, """/bin/echo 'two  words' "and \\"more\\"" plain\\ too $HOME""") == (
        'two  words and "more" plain too $HOME'
    )


def test_a_failed_start_is_no_success(server: Server) -> None:
    server.refused("POST", "/container", 422, box("/bin/plain"))
    server.post("/container", {"mount": writable(), "command": "/bin/plain"})
    server.refused("GET", "/container/0/running", 422)
    dead = server.get("/container/0")
    assert dead["state"] == "dead"
    assert "executable" in dead["problem"]


def test_two_hundred_cycles_leave_nothing(server: Server) -> None:
    mark = f"imageapi:{(server.run_dir / 'instance').read_text().strip()}:"
    for number in range(200):
        server.post("/container", box("/bin/true", name=f"cycle-{number}"))
        server.await_state(number, "exited")
        server.delete(f"/container/byname/cycle-{number}")
    assert server.everything() == []
    assert loop.marked(mark) == {}
    assert os.listdir(server.run_dir / "mounts") == []


def test_loop_devices_are_not_raced_for(server: Server) -> None:
    """Somebody else takes and frees devices all the time; no request fails by it."""
    script = "while true; do losetup --find --show {0} | xargs losetup --detach; done"
    thief = subprocess.Popen(
        ["bash", "-c", script.format(small_image())], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        for number in range(50):
            server.post("/attach/loopback", image())
            server.delete(f"/attach/{number}")
    finally:
        os.killpg(thief.pid, 9)
        thief.wait()
        kill(thief.pid)
    for device, file in backing_files():
        if file == str(small_image()):
            loop.detach(device)
