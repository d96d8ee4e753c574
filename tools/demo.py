"""`make demo`: the tutorial's walk on this machine, with a loop device on an image file in place of RBD.

Every request is a curl command as a person would type it. At the end all is gone, and this is looked at, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.images import systemd_image

SERVER = Path(sys.executable).parent / "imageapi-server"
JSON = "-H 'Content-Type: application/json'"
PATIENCE = 30.0
"""Seconds until something that should happen is given up."""


def main() -> int:
    if os.geteuid() != 0:
        print("make demo attaches, mounts and makes namespaces: run it as root", file=sys.stderr)
        return 1
    before = _kernel_objects()
    print("An image with systemd in it (made once, kept in a cache) ...", flush=True)
    image = systemd_image()
    print(f"    {image}, {image.stat().st_size >> 20} MiB")
    with _server() as demo:
        demo.step_by_step(image)
        demo.at_once(image)
    return _compare(before)


class Demo:
    """A person at a terminal beside a server on `port`."""

    def __init__(self, port: int) -> None:
        self._url = f"http://localhost:{port}/imageapi/v1"

    def step_by_step(self, image: Path) -> None:
        """The tutorial, from the attachment to the container, and back."""
        self._say("Attach the image")
        self._post("attach/loopback", {"path": str(image), "base": "root", "ro": True})
        self._run("losetup --list --noheadings --output NAME,RO,BACK-FILE | grep systemd")

        self._say("Mount it")
        lower = self._post("mount/loopback", {"id": 0, "fs_type": "squashfs", "mount_options": ["ro"]})
        self._run(f"ls {lower['mountpoint']}")

        self._say("Lay a writable overlay over it")
        self._post("mount/overlay", {"lower": [0]})

        self._say("Define a container on that")
        box = self._post(
            "container",
            {
                "name": "test-container",
                "mount": {"id": 1, "kind": "overlay"},
                "command": "/usr/lib/systemd/systemd",
                "state": "created",
                "systemd": True,
            },
        )
        self._run(f"cat {box['logfile']}")

        self._say("Start it, and look inside")
        box = self._curl(f"curl -s {self._url}/container/0/running")
        inside = f"nsenter -t {box['pid']} -a"
        self._wait(f"{inside} systemctl is-system-running", lambda said: said == "running")
        self._run(f"{inside} systemctl is-system-running")
        self._run(f"{inside} ps -eo pid,user,args")
        self._run(f"ps -o pid,ppid,args --forest --pid {box['pid']} --ppid {box['pid']}")

        self._say("What an error looks like: it runs, so it is not deleted")
        self._curl(f"curl -s -XDELETE {self._url}/container/0")

        self._say("Stop it by its name, and wait until it has")
        self._curl(f"curl -s {self._url}/container/byname/test-container/exited")
        self._wait_for_exit("container/0")
        self._curl(f"curl -s {self._url}/container/0")

        self._say("Tear it down")
        for path in ("container/0", "mount/overlay/1", "mount/loopback/0", "attach/loopback/0"):
            self._run(f"curl -s -o /dev/null -w '%{{http_code}}\\n' -XDELETE {self._url}/{path}")
        self._run(f"cat {box['logfile']}")
        self._nothing_left()

    def at_once(self, image: Path) -> None:
        """All in one POST, and all of it collected after one DELETE."""
        self._say("The same in one request")
        attachment = {"path": str(image), "base": "root", "ro": True}
        lower = {"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": attachment}}
        started = time.monotonic()
        box = self._post(
            "container",
            {
                "mount": {"kind": "overlay", "overlay": {"lower": [lower]}},
                "command": "/usr/lib/systemd/systemd",
                "systemd": True,
                "name": "systemd.sqsh",
                "state": "running",
            },
        )
        inside = f"nsenter -t {box['pid']} -a"
        self._wait(f"{inside} systemctl is-system-running", lambda said: said == "running")
        print(f"    systemd is up {time.monotonic() - started:.2f} s after the request was sent")
        self._curl(f"curl -s {self._url}/container/byname/systemd.sqsh/exited")
        self._wait_for_exit("container/byname/systemd.sqsh")

        self._say("One DELETE: what nothing uses any more is collected, all the way down")
        self._run(f"curl -s -o /dev/null -w '%{{http_code}}\\n' -XDELETE {self._url}/container/byname/systemd.sqsh")
        self._nothing_left()

    # -------------------------------------------------------------------------------------------------- commands

    def _say(self, text: str) -> None:
        print(f"\n\033[1m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)

    def _run(self, command: str) -> str:
        """Show a command and what it prints."""
        print(f"$ {command}", flush=True)
        said = _output(command)
        print("\n".join(f"    {line}" for line in said.splitlines()), flush=True)
        return said

    def _curl(self, command: str) -> Any:
        said = self._run(f"{command} | jq")
        try:
            return json.loads(said)
        except json.JSONDecodeError:
            raise SystemExit("that is no answer of the server's; if it has ended, its words are above") from None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._curl(f"curl -s -XPOST {JSON} -d {shlex.quote(json.dumps(body))} {self._url}/{path}")
        if "code" in answer:
            raise SystemExit(f"the request failed: {answer['message']}")
        return answer

    def _wait(self, command: str, good: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not good(_output(command).strip()):
            if time.monotonic() > deadline:
                raise SystemExit(f"waited {PATIENCE:g} s for it in vain: {command}")
            time.sleep(0.02)

    def _wait_for_exit(self, path: str) -> None:
        self._wait(f"curl -s {self._url}/{path} | jq -r .state", lambda said: said == "exited")

    def _nothing_left(self) -> None:
        for collection in ("container", "mount", "attach"):
            if self._curl(f"curl -s {self._url}/{collection}") != []:
                raise SystemExit(f"there is still something in {collection}")


def _output(command: str) -> str:
    """What a command of the shell prints, errors included."""
    return subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


@contextlib.contextmanager
def _server() -> Iterator[Demo]:
    """A server on a free port of loopback, with a run directory of its own, both gone at the end."""
    run_dir = Path(tempfile.mkdtemp(prefix="imageapi-demo-", dir="/run"))
    port = _free_port()
    command = [str(SERVER), "--scheme", "http", "--port", str(port), "--run-dir", str(run_dir), "--log-level", "WARN"]
    print(f"\n$ {shlex.join(command)} &", flush=True)
    server = subprocess.Popen(command)
    try:
        _await_port(port, server)
        yield Demo(port)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE)
        shutil.rmtree(run_dir)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _await_port(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise SystemExit("the server did not start; its words are above")


def _kernel_objects() -> dict[str, set[str]]:
    """What the demo could leave behind: mounts, loop devices, processes."""
    mounts = {line.split(" ")[4] for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]}
    loops = {path.parent.name for path in Path("/sys/block").glob("loop*/loop")}
    commands = _output("ps -eo pid,stat,comm --no-headers").splitlines()
    ours = {line for line in commands if "imageapi" in line and " Z" not in line}
    return {"mounts": mounts, "loop devices": loops, "processes": ours}


def _left(before: dict[str, set[str]]) -> dict[str, list[str]]:
    """What is there that was not. The server's workers see its end, and then end: they have until the deadline."""
    deadline = time.monotonic() + PATIENCE
    while True:
        after = _kernel_objects()
        left = {name: sorted(after[name] - before[name]) for name in after}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def _compare(before: dict[str, set[str]]) -> int:
    print("\n# And the machine is as it was")
    left = _left(before)
    for name, things in left.items():
        print(f"    {name} left behind: {', '.join(things) or 'none'}")
    return 1 if any(left.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
