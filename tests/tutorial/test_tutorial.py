"""The tutorial, run as it stands: on a real Ceph, with a real image, by the commands of the text itself.

Put in are the monitor's address and the key, and what the text's own run was given by its server (the numbers of
directories, the log's time, a pid). What only a kernel with the rbd driver can show is not for this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.ceph import Cluster, wait_until
from lab.images import systemd_image
from lab.machine import Machine
from tutorial import text
from tutorial.text import Command

pytestmark = pytest.mark.tutorial

SERVER = Path(__file__).parents[2] / ".venv" / "bin" / "imageapi-server"
RUN_DIR = Path("/var/run/imageapi")
URL = "http://localhost:8080/imageapi/v1"
NEEDS_RBD_DRIVER = ("dmesg | tail -n3", "ls -l /dev/rbd0")
NATURE = ("mountpoint", "upperdir", "workdir", "logfile")
"""Values that differ by nature: numbers that the server draws, and the time."""


@pytest.fixture(scope="module")
def cluster(ceph: Cluster) -> Iterator[Cluster]:
    """A Ceph with the image of the text in its pool; its `admin` is the real one."""
    ceph.import_image(str(systemd_image()), "systemd.sqsh")
    yield ceph
    ceph.rbd("rm", "--no-progress", "rbd/systemd.sqsh")


class Reader:
    """Who follows the text at a terminal in `directory`, and writes down what differs from it."""

    def __init__(self, directory: Path, cluster: Cluster) -> None:
        self.directory = directory
        self._put_in = {text.ADDRESS: cluster.monitor, text.MASK: cluster.admin_key, '"XXX"': f'"{cluster.admin_key}"'}
        self._seen: dict[str, str] = {}

    def fill_in(self, written: str) -> str:
        """The text with the reader's own monitor and key, and with what their server has answered so far."""
        for theirs, ours in (*self._put_in.items(), *self._seen.items()):
            written = written.replace(theirs, ours)
        return written

    def run(self, command: Command) -> str:
        return self.shell(self.fill_in(command.line))

    def shell(self, line: str, stdin: str = "") -> str:
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.directory, input=stdin, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def ask(self, command: Command) -> Any:
        """Run a curl of the text, compare its answer with the text's, and learn what differs by nature."""
        answer = json.loads(self.run(command))
        expected = command.answer()
        if isinstance(expected, list) and isinstance(answer, dict):
            expected = expected[0]  # by name it is one object, "the same structure as access by id"
        self._compare(expected, answer, "$")
        return answer

    def learn_pid(self, pid: int) -> None:
        """The number of the first process, for the text's own."""
        theirs = next(re.search(r"-t (\d+)", command.line) for command in text.commands() if "nsenter" in command.line)
        assert theirs
        self._seen[f"-t {theirs[1]}"] = f"-t {pid}"

    def _compare(self, expected: Any, answer: Any, place: str) -> None:
        if isinstance(expected, dict):
            for name, value in expected.items():
                assert name in answer, f"{place}.{name} is missing in {answer}"
                compare = self._learn if name in NATURE else self._compare
                compare(value, answer[name], f"{place}.{name}")
        elif isinstance(expected, list):
            assert len(expected) == len(answer), place
            for number, (one, other) in enumerate(zip(expected, answer, strict=True)):
                self._compare(one, other, f"{place}[{number}]")
        else:
            assert answer in (expected, self._put_in.get(expected)), place
            assert answer != self._put_in[text.MASK], f"the key is shown at {place}"

    def _learn(self, expected: str, answer: str, place: str) -> None:
        known = self._seen.setdefault(expected, answer)
        assert answer == known, place
        form = re.sub(r"\d{9,}", r"\\d{9,}", re.escape(expected))
        assert re.fullmatch(form, answer), f"{place}: {answer} is not like {expected}"


@pytest.fixture
def reader(tmp_path: Path, cluster: Cluster, machine: Machine) -> Iterator[Reader]:
    """A reader with `./imageapi-server` in front of them; whatever they leave running is ended."""
    assert not RUN_DIR.exists(), f"{RUN_DIR} is in use on this machine"
    (tmp_path / "imageapi-server").symlink_to(SERVER)
    with machine.session.in_the_usual_place():
        yield Reader(tmp_path, cluster)
        with contextlib.suppress(FileNotFoundError):
            _end(int((RUN_DIR / "lock").read_text()))
        shutil.rmtree(RUN_DIR, ignore_errors=True)


def _end(server: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGTERM)
        wait_until(lambda: not os.path.exists(f"/proc/{server}") or _is_zombie(server), "the server has ended")


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


def _start_server(reader: Reader, command: Command) -> None:
    reader.shell(command.line.replace("&", "> /dev/null 2>&1 &"))
    wait_until(lambda: reader.shell(f"curl -s {URL}/container").strip() == "[]", "the server answers")


def test_the_tutorial(reader: Reader) -> None:
    """Every command, in order."""
    left = text.commands()
    _start_server(reader, left.pop(0))
    for command in left:
        if command.line not in NEEDS_RBD_DRIVER:
            _follow(reader, command)


def _follow(reader: Reader, command: Command) -> None:
    words = command.line.split()
    if command.line.endswith("| jq"):
        answer = reader.ask(command)
        if answer and isinstance(answer, dict) and answer.get("state") == "stopping":
            wait_until(lambda: _state(reader) == "exited", "the container has exited")
    elif "-XDELETE" in words:
        deleted = json.loads(reader.run(command))
        assert "code" not in deleted, deleted
    else:
        {"ls": _look_into_mount, "cat": _read_log, "-elF": _look_at_processes, "nsenter": _enter}[words[1]](
            reader, command
        )


def _state(reader: Reader) -> str:
    state: str = json.loads(reader.shell(f"curl -s {URL}/container/0"))["state"]
    return state


def _look_into_mount(reader: Reader, command: Command) -> None:
    assert set(command.shown.split()) <= set(reader.run(command).split())


def _read_log(reader: Reader, command: Command) -> None:
    """While little has happened the log is the text's; at the end it holds all its lines, in order."""
    lines = reader.run(command).splitlines()
    assert all(re.match(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d (container\(0\)|init): ", line) for line in _ours(lines))
    said = [line.split(" ", 2)[2] for line in _ours(lines)]
    if command.shown:
        assert said == [command.shown.split(" ", 2)[2]]
    else:
        assert [line for line in said if line in text.log_lines()] == text.log_lines()


def _ours(lines: list[str]) -> list[str]:
    """The service's own lines: a container's output stands between them."""
    return [line for line in lines if "container(0): " in line or " init: " in line]


def _look_at_processes(reader: Reader, command: Command) -> None:
    """The first process is systemd, and has begun others; the text's number for it is learnt."""
    pid = json.loads(reader.shell(f"curl -s {URL}/container/0"))["pid"]
    reader.learn_pid(pid)
    wait_until(lambda: "systemd-journald" in reader.run(command), "systemd has started its journal")
    processes = [line.split() for line in reader.run(command).splitlines()]
    first = next(fields for fields in processes if fields[3] == str(pid))
    assert first[-1] == "/usr/lib/systemd/systemd"
    assert any(fields[4] == str(pid) for fields in processes)


def _enter(reader: Reader, command: Command) -> None:
    """In the shell that nsenter gives, ps shows the container's processes alone, systemd as the first."""
    inside = command.shown.split("# ", 1)[1].split(" USER", 1)[0]
    shown = reader.shell(reader.fill_in(command.line), stdin=f"{inside}\n").splitlines()
    assert shown[0].split() == ["USER", "PID", "%CPU", "%MEM", "VSZ", "RSS", "TTY", "STAT", "START", "TIME", "COMMAND"]
    first = shown[1].split(None, 10)
    assert (first[1], first[10].split()[0]) == ("1", "/usr/lib/systemd/systemd")
    assert not any("imageapi-server" in line for line in shown)


# -------------------------------------------------------------------------------------------- all in one request


@pytest.fixture
def served(reader: Reader) -> Reader:
    """The reader, with the server started as the text starts it."""
    _start_server(reader, text.commands()[0])
    return reader


def _post(reader: Reader, collection: str, body: str) -> Any:
    filled = reader.fill_in(body)
    header = "-H 'Content-type: application/json'"
    return json.loads(reader.shell(f"curl -s -XPOST {header} --data-binary @- {URL}/{collection}", stdin=filled))


def _nothing_is_left(reader: Reader) -> bool:
    return all(reader.shell(f"curl -s {URL}/{one}").strip() == "[]" for one in ("container", "mount", "attach"))


def test_an_overlay_with_all_below_it(served: Reader) -> None:
    overlay = _post(served, "mount/overlay", text.nested_bodies()[0])
    assert sorted(os.listdir(overlay["mountpoint"]))
    deleted = json.loads(served.shell(f"curl -s -XDELETE {URL}/mount/overlay/{overlay['id']}"))
    assert deleted["id"] == overlay["id"]
    assert _nothing_is_left(served)


def test_the_misprint_is_pointed_at(served: Reader) -> None:
    body = text.nested_bodies()[1]
    problem = _post(served, "container", body)
    line = body[: body.index('"systemd" true')].count("\n") + 1
    assert problem["code"] == 400
    assert f"line {line}" in problem["message"]
    assert _nothing_is_left(served)


def test_a_container_with_all_below_it(served: Reader) -> None:
    """It is exited with one call, and deleting it collects the overlay, the squashfs and the RBD."""
    body = text.nested_bodies()[1].replace('"systemd" true', '"systemd": true')
    key = re.search(r'"secret": "(AQ[^"]+)"', body)
    assert key
    box = _post(served, "container", body.replace(key[1], text.MASK))
    assert (box["state"], box["name"]) == ("running", "systemd.sqsh"), box
    exited = json.loads(served.shell(f"curl -s {URL}/container/byname/systemd.sqsh/exited"))
    assert exited["state"] == "stopping"
    wait_until(lambda: _state(served) == "exited", "the container has exited")
    served.shell(f"curl -s -XDELETE {URL}/container/byname/systemd.sqsh")
    assert _nothing_is_left(served)
