"""What somebody else does to our objects under a running server is seen at once, said of them and of what stands on
them, and can be deleted; and it is taken back when it is over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imageapi.config import Config
from imageapi.engine import rundir
from imageapi.errors import Conflict
from imageapi.linux import loop
from lab.server import (
    FOREVER,
    SOURCE,
    Server,
    box,
    copy_of_small_image,
    eventually,
    image,
    kill,
    running,
    squashfs,
    writable,
)

pytestmark = pytest.mark.api


def run(*command: str | bytes | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def await_problem(server: Server, path: str, *words: str) -> str:
    """The problem of an object, once it has one with these words."""

    def said() -> str | None:
        problem = server.get(path).get("problem") or ""
        return problem if all(word in problem for word in words) else None

    return str(eventually(said, f"{path} has a problem with {words}", 5))


def await_none(server: Server, path: str) -> None:
    eventually(lambda: "problem" not in server.get(path), f"{path} has no problem any more", 5)


@contextmanager
def stranger_on(mountpoint: str | bytes, source: bytes = b"stranger") -> Iterator[None]:
    """A mount of somebody else's."""
    run("mount", "-t", "tmpfs", source, mountpoint)
    try:
        yield
    finally:
        run("umount", mountpoint)


def test_a_mount_that_somebody_unmounts(server: Server) -> None:
    made = server.post("/mount", writable())
    server.post("/container", {"mount": {"id": made["id"]}, "command": FOREVER})
    run("umount", made["mountpoint"])
    await_problem(server, f"/mount/{made['id']}", "gone from the kernel")
    await_problem(server, "/container/0", f"mount {made['id']} (overlay), which it needs")
    server.refused("GET", "/container/0/running", 409)
    server.delete("/container/0")
    server.delete(f"/mount/{made['id']}")
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


def test_a_mount_under_an_overlay_with_a_running_container(server: Server) -> None:
    server.post("/mount", squashfs())
    server.post("/container", {**box(FOREVER), "mount": {"kind": "overlay", "overlay": {"lower": [{"id": 0}]}}})
    run("umount", server.get("/mount/0")["mountpoint"])
    await_problem(server, "/mount/0", "gone from the kernel")
    await_problem(server, "/mount/1", "mount 0 (attach), which it needs")
    await_problem(server, "/container/0", "mount 0 (attach), which it needs")
    assert server.get("/container/0")["state"] == "running"
    server.delete("/container/0?force=true")
    server.delete("/mount/0")
    assert server.everything() == []


def test_a_loop_device_that_somebody_detaches(server: Server) -> None:
    made = server.post("/attach/loopback", image())
    run("losetup", "-d", made["device_file"])
    await_problem(server, "/attach/0", "gone from the kernel")
    server.delete("/attach/0")
    assert server.everything() == []


def test_a_loop_device_that_is_anothers_by_now(server: Server, tmp_path: Path) -> None:
    made = server.post("/attach/loopback", image())
    run("losetup", "-d", made["device_file"])
    run("losetup", made["device_file"], copy_of_small_image(tmp_path))
    await_problem(server, "/attach/0", "gone from the kernel")
    server.delete("/attach/0")
    assert loop.status(made["device_file"]) is not None, "what is another's stays"
    run("losetup", "-d", made["device_file"])


def test_a_foreign_mount_on_ours(server: Server) -> None:
    made = server.post("/mount", squashfs())
    with stranger_on(made["mountpoint"]):
        await_problem(server, "/mount/0", "stranger (tmpfs) is mounted over")
        problem = server.refused("DELETE", "/mount/0", 409)
        assert "stranger (tmpfs)" in problem["message"]
        assert problem["holders"] == ["stranger (tmpfs)"]
        assert os.path.ismount(made["mountpoint"])
    await_none(server, "/mount/0")
    server.delete("/mount/0")


def test_a_foreign_mount_whose_names_are_no_text(server: Server) -> None:
    """It is told, and neither this server nor the next ends over it."""
    made = server.post("/mount", squashfs())
    with stranger_on(made["mountpoint"], b"\xff\r"), stranger_on(f"{made['mountpoint']}".encode(), b"\xfe"):
        await_problem(server, "/mount/0", "\\xfe (tmpfs) is mounted over")
        assert server.refused("DELETE", "/mount/0", 409)["holders"] == ["\\xfe (tmpfs)"]
        server.kill()
        server.start()
        await_problem(server, "/mount/0", "\\xfe (tmpfs)")
        assert [one for one in server.leaks() if "\\xfe" in one["problem"]]
    server.delete("/mount/0")


def test_a_foreign_mount_inside_whose_path_is_no_text(server: Server) -> None:
    made = server.post("/mount", writable())
    inside = f"{made['mountpoint']}/".encode() + b"a\r\xff"
    os.mkdir(inside)
    with stranger_on(inside):
        problem = server.refused("DELETE", f"/mount/{made['id']}", 409)
        assert problem["holders"] == [f"the mount at {made['mountpoint']}/a\r\\xff"]
        server.kill()
        server.start()
    server.clear()


def test_a_directory_of_the_host_that_is_bound_elsewhere_with_all_that_is_mounted_in_it(
    run_dir: Path, tmp_path: Path
) -> None:
    """As `mount --rbind /run` does, for a change of root: what the kernel mounts there as well goes with ours."""
    run("mount", "--bind", run_dir, run_dir)
    run("mount", "--make-shared", run_dir)
    run("mount", "--rbind", run_dir, tmp_path)
    try:
        with running(run_dir) as server:
            made = server.post("/mount", writable())
            there = tmp_path / "mounts" / os.path.basename(made["mountpoint"])
            assert os.path.ismount(there)
            server.delete(f"/mount/{made['id']}")
            assert not os.path.ismount(there)
    finally:
        run("umount", tmp_path)
        run("umount", "-l", run_dir)


@pytest.mark.parametrize("kind", ["overlay", "tmpfs"])
def test_a_file_system_that_somebody_has_bound_elsewhere(server: Server, tmp_path: Path, kind: str) -> None:
    """What was written to it is not gone while it can be seen anywhere."""
    made = server.post("/mount", writable() if kind == "overlay" else {"kind": "tmpfs", "tmpfs": {"size": "1M"}})
    Path(made["mountpoint"], "file").write_text("written")
    run("mount", "--bind", made["mountpoint"], tmp_path)
    try:
        problem = server.refused("DELETE", f"/mount/{made['id']}", 409)
        assert problem["holders"] == [f"the mount at {tmp_path}"]
        assert (tmp_path / "file").read_text() == "written"
        if kind == "overlay":
            assert os.path.exists(f"{made['overlay']['upperdir']}/file")
        assert server.get(f"/mount/{made['id']}") == made, "nothing has changed"
        assert os.path.ismount(made["mountpoint"])
    finally:
        run("umount", tmp_path)
    server.clear()
    assert os.listdir(server.run_dir / "mounts") == []


@pytest.mark.parametrize("kind", ["overlay", "tmpfs"])
def test_a_foreign_mount_in_place_of_ours_is_never_removed(server: Server, kind: str) -> None:
    """It may well have the device number of the one that was there."""
    wanted = writable() if kind == "overlay" else {"kind": "tmpfs", "tmpfs": {"size": "1M"}}
    made = server.post("/mount", wanted)
    run("umount", made["mountpoint"])
    with stranger_on(made["mountpoint"]):
        await_problem(server, f"/mount/{made['id']}", "gone from the kernel", "stranger (tmpfs)")
        server.refused("DELETE", f"/mount/{made['id']}", 409)
        assert os.path.ismount(made["mountpoint"])
    eventually(lambda: server.everything() == [], "what could not go goes by itself")
    assert os.listdir(server.run_dir / "mounts") == []


def test_the_same_on_a_kernel_without_numbers_of_mounts(server: Server) -> None:
    """Before Linux 6.8 the source of a mount tells: its device number may be the same."""
    made = server.post("/mount", {"kind": "tmpfs", "tmpfs": {"size": "1M"}})
    server.kill()
    file = server.run_dir / "state/mount/0.json"
    record = json.loads(file.read_text())
    mark = f"imageapi:{(server.run_dir / 'instance').read_text().strip()}:mount/0"
    record["facts"]["detail"] = {"dev": record["facts"]["detail"]["dev"], "source": mark}
    file.write_text(json.dumps(record))
    server.start()
    assert "problem" not in server.get("/mount/0")
    run("umount", made["mountpoint"])
    with stranger_on(made["mountpoint"]):
        await_problem(server, "/mount/0", "gone from the kernel", "stranger (tmpfs)")
        server.refused("DELETE", "/mount/0", 409)
    eventually(lambda: server.everything() == [], "what could not go goes by itself")


def test_a_reboot_with_the_records_on_disk(server: Server) -> None:
    """Nothing that they mean is there: all of them go, with their directories, and ids go on."""
    made = server.post("/container", box(FOREVER))
    server.stop()
    os.kill(made["pid"], signal.SIGKILL)
    kill(server.supervisor)
    run("umount", made["mount"]["mountpoint"])
    run("umount", made["mount"]["overlay"]["lower"][0]["mountpoint"])
    run("losetup", "-d", made["mount"]["overlay"]["lower"][0]["attach"]["attach"]["device_file"])
    for path in (f"{server.run_dir}/supervisor/keep/pin", f"{server.run_dir}/supervisor/keep"):
        run("umount", path)
    for file in (*server.run_dir.glob("state/*/?.json"), *server.run_dir.glob("supervisor/*.json")):
        file.write_text(file.read_text().replace(rundir.boot_id(), "00000000-0000-0000-0000-000000000000"))
    server.start()
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []
    assert server.post("/container", {"mount": writable(), "command": FOREVER})["id"] == 1


@pytest.mark.parametrize("directory", ["upperdir", "workdir"])
def test_a_directory_that_somebody_removes(server: Server, directory: str) -> None:
    made = server.post("/container", {"mount": writable(), "command": FOREVER})["mount"]
    shutil.rmtree(made["overlay"][directory])
    await_problem(server, f"/mount/{made['id']}", "was removed by somebody")
    await_problem(server, "/container/0", f"mount {made['id']} (overlay), which it needs, has lost")
    server.delete("/container/0")
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


def test_the_records_that_somebody_removes(server: Server) -> None:
    """They are written again, and the next server knows of everything."""
    server.post("/container", box(FOREVER))
    shutil.rmtree(server.run_dir / "state")
    eventually(lambda: len(list((server.run_dir / "state").glob("*/*.json"))) == 4, "all records are there again")
    before = server.everything()
    server.kill()
    server.start()
    assert server.everything() == before
    shutil.rmtree(server.run_dir / "state")
    server.post("/mount", squashfs())  # nor does a request fail over it


def test_the_log_directory_that_somebody_removes(server: Server) -> None:
    """It is made again, and containers print on."""
    made = server.post("/container", box("/bin/sh -c 'while true; do echo line; sleep 0.01; done'"))
    shutil.rmtree(server.run_dir / "logs")
    eventually(lambda: "line" in _read(made["logfile"]), "the log goes on")
    later = server.post("/container", box("/bin/echo said"))
    eventually(lambda: "said" in _read(later["logfile"]), "another container prints, too")
    await_none(server, "/container/0")


def test_the_run_directory_that_somebody_removes(server: Server) -> None:
    """Nobody else can begin in it at any time, the container is found again by the next server, and others start."""
    made = server.post("/container", box(FOREVER))
    _remove_files(server.run_dir, but=server.socket)
    with pytest.raises(Conflict, match="in use"):
        rundir.prepare(Config(run_dir=str(server.run_dir)))
    named = ("instance", "lock", "supervisor/lock", "supervisor/socket", "supervisor/0.json", "state/counters.json")
    eventually(lambda: all((server.run_dir / name).exists() for name in named), "all of it is there again")
    server.kill()
    (server.run_dir / "instance").unlink()
    server.start()
    assert server.get("/container/0")["pid"] == made["pid"]
    later = server.post("/container", box("/bin/echo said", name="later"))
    eventually(lambda: "said" in _read(later["logfile"]), "another container prints")
    server.clear()
    assert server.leaks() == []


@pytest.mark.parametrize("late", ["audit.look(site, '', -1)", "supervisor.run(site)"])
def test_what_outlives_a_server_does_not_make_its_run_directory_again(tmp_path: Path, late: str) -> None:
    """Whoever has stopped it may have removed that for good; a worker or a new supervisor may come to it later."""
    gone = tmp_path / "gone"
    program = f"""
from imageapi.config import Site
from imageapi.engine import audit
from imageapi.runtime import supervisor
site = Site(run_dir={str(gone)!r})
{late}"""
    ran = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(SOURCE)}, check=False)
    assert ran.returncode in (0, 1)
    assert not gone.exists()


def _remove_files(directory: Path, but: Path) -> None:
    """What `rm -r` removes before it fails over the first mount; the server's own socket is left."""
    for path in directory.rglob("*"):
        if path != but and "mounts" not in path.parts and "keep" not in path.parts and not path.is_dir():
            path.unlink()


def _read(path: str) -> str:
    return Path(path).read_text() if os.path.exists(path) else ""


def test_an_image_that_is_replaced(server: Server, tmp_path: Path) -> None:
    """Those who have the old one keep it; whoever asks for the path gets the new one."""
    file = copy_of_small_image(tmp_path)
    server.post("/mount", squashfs(path=str(file)))
    copy_of_small_image(tmp_path, "new").rename(file)
    await_problem(server, "/attach/0", "another file now")
    assert "problem" not in server.get("/mount/0")
    again = server.post("/mount", squashfs(path=str(file)))
    assert again["attach"]["attach"]["id"] == 1
    server.delete("/mount/1")
    server.delete("/mount/0")
    assert server.everything() == []


def test_a_link_to_an_image_that_points_elsewhere_now(server: Server, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(copy_of_small_image(tmp_path))
    server.post("/attach/loopback", image(path=str(link)))
    (tmp_path / "link").symlink_to(copy_of_small_image(tmp_path, "next"))
    eventually(lambda: len(_watched(server)) > 4, "the image is watched")
    (tmp_path / "link").rename(link)
    await_problem(server, "/attach/0", "another file now")


def test_an_image_that_is_truncated_and_restored(server: Server, tmp_path: Path) -> None:
    file = copy_of_small_image(tmp_path)
    content = file.read_bytes()
    server.post("/container", {"mount": squashfs(path=str(file)), "command": FOREVER})
    eventually(lambda: len(_watched(server)) > 3, "the image is watched")
    times = file.stat()
    os.truncate(file, 4096)
    await_problem(server, "/attach/0", "was cut to 4096 bytes")
    await_problem(server, "/container/0", "attach 0 (loopback), which it needs")
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    for path in ("/attach/0", "/mount/0", "/container/0"):
        await_none(server, path)
    server.delete("/container/0")
    assert server.everything() == []


def test_an_image_that_is_written_to(server: Server, tmp_path: Path) -> None:
    file = copy_of_small_image(tmp_path)
    server.post("/attach/loopback", image(path=str(file)))
    eventually(lambda: len(_watched(server)) > 3, "the image is watched")
    with file.open("r+b") as opened:
        opened.write(b"spoilt")
    await_problem(server, "/attach/0", "was written to")
    server.delete("/attach/0")
    eventually(lambda: len(_watched(server)) == 3, "what is not attached is not watched")


def _watched(server: Server) -> list[str]:
    """The inotify watches of a server (proc_pid_fdinfo(5))."""
    for name in os.listdir(f"/proc/{server.pid}/fd"):
        if os.readlink(f"/proc/{server.pid}/fd/{name}") == "anon_inode:inotify":
            lines = Path(f"/proc/{server.pid}/fdinfo/{name}").read_text().splitlines()
            return [line for line in lines if line.startswith("inotify ")]
    return []
