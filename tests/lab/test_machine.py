"""The proof that a test left the machine alone is itself proved: on tests that do not."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import table
from lab.images import small_image
from lab.machine import Machine
from lab.session import CLAIM, USUAL

ROOT = Path(__file__).parents[2]


def mount_tmpfs(path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(path)], check=True)


def umount(path: Path) -> None:
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.kernel
def test_a_mount_is_seen(machine: Machine, run_dir: Path) -> None:
    before = machine.look()
    mount_tmpfs(run_dir)
    left = machine.settle(before, 0)
    umount(run_dir)
    assert [str(run_dir) in line for line in left if line.startswith("left behind: mount")] == [True]
    assert machine.settle(before) == []


@pytest.mark.kernel
def test_a_mount_taken_away_is_seen(machine: Machine, run_dir: Path) -> None:
    mount_tmpfs(run_dir)
    before = machine.look()
    umount(run_dir)
    assert [line.split(" mount")[0] for line in machine.settle(before, 0)] == ["taken away:"]


@pytest.mark.kernel
def test_a_change_of_propagation_is_seen(machine: Machine, run_dir: Path) -> None:
    mount_tmpfs(run_dir)
    subprocess.run(["mount", "--make-private", str(run_dir)], check=True)
    before = machine.look()
    subprocess.run(["mount", "--make-shared", str(run_dir)], check=True)
    left = machine.settle(before, 0)
    umount(run_dir)
    assert len(left) == 2


@pytest.mark.kernel
def test_a_loop_device_is_seen(machine: Machine) -> None:
    before = machine.look()
    made = subprocess.run(["losetup", "-f", "--show", "-r", small_image()], check=True, capture_output=True, text=True)
    device = made.stdout.strip()
    left = machine.settle(before, 0)
    subprocess.run(["losetup", "-d", device], check=True)
    assert left == [f"left behind: loop device {device} on {small_image()}"]


@pytest.mark.kernel
def test_a_control_group_is_seen(machine: Machine) -> None:
    before = machine.look()
    mounts = (line.split() for line in table.lines("/proc/mounts"))
    hierarchy = next(fields[1] for fields in mounts if fields[2] == "cgroup2")
    group = Path(hierarchy) / f"imageapi-{machine.session.token}0000"
    group.mkdir()
    left = machine.settle(before, 0)
    group.rmdir()
    assert left == [f"left behind: control group {group}"]


@pytest.mark.pure
def test_a_descriptor_is_seen(machine: Machine) -> None:
    before = machine.look()
    reader, writer = os.pipe()
    left = machine.settle(before, 0)
    os.close(reader)
    os.close(writer)
    assert [line.partition(" of ")[0] for line in left] == [
        f"left behind: descriptor {number}" for number in (reader, writer)
    ]


@pytest.mark.pure
@pytest.mark.parametrize("name", ["imageapi.{}.sock", "imageapi-{}"])
def test_a_file_with_our_name_is_seen(machine: Machine, name: str) -> None:
    before = machine.look()
    path = Path("/dev/shm") / name.format(machine.session.token)
    path.touch()
    left = machine.settle(before, 0)
    path.unlink()
    assert left == [f"left behind: file {path}"]


@pytest.mark.pure
def test_what_belongs_to_another_run_is_not_looked_at(machine: Machine, run_dir: Path) -> None:
    before = machine.look()
    neighbour = machine.session.disk.with_name("imageapi-test-neighbour")
    neighbour.mkdir()
    left = machine.settle(before, 0)
    neighbour.rmdir()
    assert left == []


@pytest.mark.pure
def test_the_usual_place_is_looked_at_unless_another_run_works_there(machine: Machine) -> None:
    line = f"36 35 98:0 / {USUAL}/mounts/mount_1 rw - squashfs /dev/loop0 ro"
    with machine.session.in_the_usual_place():
        mine = machine.session.concerns_a_neighbour(line)
    neighbour = machine.session.disk.with_name("imageapi-test-neighbour")
    neighbour.mkdir()
    (neighbour / CLAIM).touch()
    theirs = machine.session.concerns_a_neighbour(line)
    shutil.rmtree(neighbour)
    assert (mine, theirs) == (False, True)


# ---------------------------------------------------------------------------------------------- processes


@pytest.fixture
def ended() -> Iterator[list[int]]:
    """Processes that are killed when the test ends, by number."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def daemon(*command: str) -> int:
    """Start a process that is nobody's child: the number is what the shell printed that left it behind."""
    shell = ["setsid", "sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh", *command]
    return int(subprocess.run(shell, check=True, capture_output=True, text=True).stdout)


def anonymous(*command: str) -> int:
    """The same, with nothing in its environment."""
    return daemon("env", "-i", *command)


def rename_itself(_: Path) -> int:
    script = "import signal; open('/proc/self/comm', 'w').write('imageapi'); signal.pause()"
    return anonymous(sys.executable, "-c", script)


def root_itself_elsewhere(place: Path) -> int:
    """As a container does: its mount is in a namespace of its own, and names the run's place as its source."""
    script = f"mount -t tmpfs '{place}/upper' /mnt && exec sleep 1000"
    return anonymous("unshare", "-m", "sh", "-c", script)


STARTERS: dict[str, Callable[[Path], int]] = {
    "by its environment": lambda _: daemon("sleep", "1000"),
    "by its directory": lambda place: anonymous("env", "-C", str(place), "sleep", "1000"),
    "by its argument": lambda place: anonymous("tail", "-f", "/dev/null", "--pid=1", str(place / "missing")),
    "by its mounts": root_itself_elsewhere,
    "by its name": rename_itself,
}


@pytest.mark.kernel
@pytest.mark.parametrize("known", [*STARTERS])
def test_a_process_that_left_the_family_is_seen(machine: Machine, run_dir: Path, ended: list[int], known: str) -> None:
    before = machine.look()
    ended.append(STARTERS[known](run_dir))
    await_exec(ended[0])
    assert [line.split(" started")[0] for line in machine.settle(before, 0)] == [f"left behind: process {ended[0]}"]


def await_exec(pid: int) -> None:
    """Wait until the shell and its helpers have become the command: before, their arguments betray them."""
    end = time.monotonic() + 5
    while (name := Path(f"/proc/{pid}/comm").read_text().strip()) not in ("sleep", "tail", "imageapi"):
        assert time.monotonic() < end, name
        time.sleep(0.01)


@pytest.mark.pure
def test_a_service_is_expected_once_it_is_registered(machine: Machine) -> None:
    before = machine.look()
    with machine.expecting():
        service = subprocess.Popen(["sleep", "1000"])
    expected = machine.settle(before, 0)
    other = subprocess.Popen(["sleep", "1000"])
    unexpected = machine.settle(before, 0)
    for process in (service, other):
        process.kill()
        process.wait()
    assert expected == []
    assert [line.split(" started")[0] for line in unexpected] == [f"left behind: process {other.pid}"]


# ---------------------------------------------------------------------------------------------- as a fixture

CARELESS = """
import os, subprocess
from lab import machine as lab_machine

lab_machine.DEADLINE = 0.1

def test_mount(run_dir, machine):
    subprocess.run(["mount", "-t", "tmpfs", "none", machine.session.disk], check=True)

def test_process():
    os.kept = subprocess.Popen(["sleep", "1000"])

def test_descriptor():
    os.open("/dev/null", os.O_RDONLY)

def test_file(machine):
    (machine.session.fast / "left").touch()

def test_run_dir(run_dir):
    (run_dir / "mounted").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", run_dir / "mounted"], check=True)

def test_careful(run_dir, site, tmp_path):
    (run_dir / "file").touch()
    (tmp_path / "file").touch()
    assert os.stat(site.state_dir).st_mode & 0o777 == 0o700

def test_last():
    pass
"""


@pytest.mark.kernel
def test_the_fixture_fails_every_careless_test_and_no_other(tmp_path: Path) -> None:
    """Run by a pytest of its own, which then removes all of it: what was careless there leaves no trace here.

    The last of its tests fails for the whole run, which has changed the machine.
    """
    (tmp_path / "test_careless.py").write_text(CARELESS)
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-W", "default", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *options, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    failed = set(re.findall(r"^ERROR .*::test_(\w+)", done.stdout, re.MULTILINE))
    assert failed == {"mount", "process", "descriptor", "file", "run_dir", "last"}, done.stdout
    assert "7 passed" in done.stdout
    assert "left behind: descriptor" in done.stdout
    assert "sleep 1000" in done.stdout
