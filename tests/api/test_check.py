"""The leak report: nothing where all is as it should be; else what is wrong, and commands that mend it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imageapi.config import Config
from imageapi.engine import check, sweep
from imageapi.linux import loop
from lab.server import FOREVER, Server, box, copy_of_small_image, eventually, image, squashfs, writable

pytestmark = pytest.mark.api


Report = Callable[[], tuple[int, list[str], str]]


@pytest.fixture
def report(server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Report:
    """What `imageapi-server --check` ends with, its lines, and what could not be looked at; done in this process, and
    without the pauses for a host that is busy."""
    monkeypatch.setattr(check, "PAUSES", (0.05,))
    monkeypatch.setattr(check, "DEADLINE", 1.0)

    def look() -> tuple[int, list[str], str]:
        status = check.main(Config(run_dir=str(server.run_dir)))
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err

    return look


def mend(lines: list[str]) -> None:
    """Do what the report says."""
    for line in lines[1::2]:
        subprocess.run(line, shell=True, check=True, capture_output=True)


def test_nothing_is_found_where_all_is_well(server: Server, report: Report) -> None:
    made = server.post("/container", box(FOREVER, name="well"))
    server.post("/container", {"mount": writable(), "command": FOREVER})
    server.post("/mount", {"kind": "tmpfs", "tmpfs": {"size": "1M"}})
    server.post("/attach/loopback", image(ro=False, path=str(copy_of_small_image(server.run_dir))))
    assert server.get("/check") == []
    assert report() == (0, [], "")
    server.kill()
    assert report() == (0, [], ""), "nor is it while no server runs"
    server.start()
    server.delete(f"/container/{made['id']}?force=true")
    assert report() == (0, [], "")


def test_a_lost_record_of_a_mount_and_its_device(server: Server, report: Report) -> None:
    """The commands, done as they are printed, leave nothing."""
    made = server.post("/mount", squashfs())
    server.post("/mount", writable())
    server.kill()
    for collection in ("mount", "attach"):
        for record in (server.run_dir / "state" / collection).iterdir():
            record.unlink()
    status, lines, _ = report()
    assert status == 1
    assert f"the directory {made['mountpoint']} has no record" in lines
    assert f"    umount {made['mountpoint']}; rmdir {made['mountpoint']}" in lines
    mend(lines)
    assert report() == (0, [], "")
    assert os.listdir(server.run_dir / "mounts") == []


def test_a_lost_record_of_a_container(server: Server, report: Report) -> None:
    made = server.post("/container", box(FOREVER))
    server.kill()
    (server.run_dir / "state" / "container" / "0.json").unlink()
    status, lines, _ = report()
    assert (status, lines) == (1, [f"process {made['pid']} of container 0 has no record", f"    kill -9 {made['pid']}"])
    mend(lines)
    eventually(lambda: report() == (0, [], ""), "it is gone, and the supervisor has cleared it away")
    server.start()


def test_what_somebody_has_taken_away(server: Server, report: Report, tmp_path: Path) -> None:
    """The server says so, and so does whoever looks without it."""
    file = copy_of_small_image(tmp_path)
    mounted = server.post("/mount", {"kind": "tmpfs", "tmpfs": {"size": "1M"}})
    attached = server.post("/attach/loopback", image(path=str(file)))
    subprocess.run(["umount", mounted["mountpoint"]], check=True)
    file.unlink()
    found = server.get("/check")
    assert [(one["collection"], one["id"]) for one in found] == [("attach", 0), ("mount", 0)]
    assert found[1]["remedy"] == "DELETE /imageapi/v1/mount/0?force=true; then make it again"
    status, lines, _ = report()
    assert status == 1
    assert lines[::2] == [f"{one['collection']} {one['id']}: {one['problem']}" for one in found]
    server.delete("/mount/0")
    server.delete("/attach/0")
    assert server.get("/check") == []
    assert loop.status(attached["device_file"]) is None


def test_what_is_lost_is_deleted_after_all_that_stands_on_it(server: Server, report: Report) -> None:
    """The requests of the remedy, in turn, leave nothing: what nobody asked for by itself goes by itself."""
    lower = server.post("/mount", squashfs())
    server.post("/container", {"mount": {"kind": "overlay", "overlay": {"lower": [lower["id"]]}}, "command": FOREVER})
    subprocess.run(["umount", "--lazy", lower["mountpoint"]], check=True)
    [found] = server.get("/check")
    requests = "DELETE /imageapi/v1/container/0?force=true, then DELETE /imageapi/v1/mount/0?force=true"
    assert (found["collection"], found["id"]) == ("mount", lower["id"])
    assert found["remedy"] == f"{requests}; then make it again"
    assert report()[1][1] == f"    {found['remedy']}"
    for request in requests.split(", then "):
        server.delete(request.removeprefix("DELETE /imageapi/v1"))
    assert server.get("/check") == server.get("/mount") == []


def test_what_a_dead_supervisor_has_left(server: Server, report: Report) -> None:
    """A FIFO and the keep; and containers that nobody watches, until a server comes."""
    made = server.post("/container", box(FOREVER))
    server.kill()
    subprocess.run(["kill", "-9", str(server.supervisor)], check=True)
    eventually(lambda: report()[0] == 1, "the supervisor is gone")
    _, lines, _ = report()
    assert f"process {made['pid']} of container 0 is watched by no supervisor" in lines
    server.start()
    assert server.get("/check") == []
    server.delete("/container/0?force=true")
    subprocess.run(["kill", "-9", str(server.supervisor)], check=True)
    eventually(lambda: server.get("/check") == [], "another supervisor has cleared away what that one had")


def test_a_file_beside_the_records(server: Server, report: Report) -> None:
    stray = server.run_dir / "state" / "mount" / "note"
    stray.write_text("mine")
    assert report()[:2] == (1, [f"{stray} is no record that this version can read", f"    rm -r {stray}"])
    stray.unlink()


def test_it_does_not_wait_for_what_hangs(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that does not come back costs itself alone; here it is the one for loop devices."""
    monkeypatch.setitem(sweep.SEARCHES, "the loop devices", lambda *_: time.sleep(1000))
    assert report() == (2, [], "could not look at the loop devices: it hangs\n")


def test_the_command(server: Server) -> None:
    """It reports as `report` does, and nothing on a run directory that is none."""
    stray = server.run_dir / "mounts/upper_000000001"
    stray.mkdir()
    lines = [f"the directory {stray} has no record", f"    rm -r {stray}"]
    assert command(server.run_dir) == (1, lines)
    mend(lines)
    assert command(server.run_dir) == (0, [])
    assert command(server.run_dir / "none") == (0, [])
    assert not (server.run_dir / "none").exists()


def command(run_dir: Path) -> tuple[int, list[str]]:
    arguments = [sys.executable, "-m", "imageapi.server", "--check", "--run-dir", str(run_dir)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()
