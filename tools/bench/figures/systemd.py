"""A Debian with systemd: from the request until it says that it is running, beside systemd-nspawn.

An image that nobody has in use is mounted by the request, and what systemd reads of it is unpacked for the first time.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.bench.client import Client, request
from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Figure, Target, Unable, described, interleave
from tools.bench.service import PATIENCE, nest
from tools.images import run, systemd_image

ROUNDS = 6
OURS, LZ4 = "POST until `running`", "POST until `running`, the image packed with lz4hc"
SHARED = "POST until `running`, the image in use already"
NSPAWN = "systemd-nspawn --boot, on a mounted root"
INIT = "/usr/lib/systemd/systemd"
PAUSE = 0.005
"""Seconds between two questions, until systemd listens. The one that it hears waits for the answer, since each takes a
processor for some milliseconds."""


def figure(lab: Lab) -> Figure:
    image = systemd_image()
    create, of_lz4 = _creating(image), _creating(_packed_with_lz4(image, lab.place))
    mount = nest(image, "")["mount"]
    whole, lower = (request("POST", "/mount", each) for each in (mount, mount["overlay"]["lower"][0]))
    with lab.service() as (_, client):
        contestants = {
            OURS: lambda: {OURS: _ours(client, create)},
            LZ4: lambda: {LZ4: _ours(client, of_lz4)},
            SHARED: lambda: {SHARED: _shared(client, lower, create)},
            NSPAWN: lambda: {NSPAWN: _nspawn(client, whole, lab.place)},
        }
        rows = interleave(ROUNDS, contestants)
    for name in (OURS, LZ4, SHARED):
        described(rows, name, NSPAWN, Target(290.0))
    return Figure("A small Debian from its image (squashfs, zstd) until systemd says `running`", list(rows.values()))


def _creating(image: Path) -> bytes:
    return request("POST", "/container", nest(image, INIT, state="running", systemd=True))


def _packed_with_lz4(image: Path, place: Path) -> Path:
    tree, packed = place / "systemd", place / "systemd-lz4.sqsh"
    run("unsquashfs", "-quiet", "-no-progress", "-dest", str(tree), str(image))
    run("mksquashfs", str(tree), str(packed), "-comp", "lz4", "-Xhc", "-b", "128K", "-quiet", "-no-progress")
    return packed


def _shared(client: Client, lower: bytes, create: bytes) -> float:
    """The second container on an image."""
    kept = client.ask(lower).json()
    try:
        _ours(client, create)
        return _ours(client, create)
    finally:
        client.ask(request("DELETE", f"/mount/{kept['id']}"))


def _ours(client: Client, create: bytes) -> float:
    sent = time.monotonic_ns()
    box = client.ask(create).json()
    taken = _await_running(lambda: box["pid"]) - sent
    client.ask(request("PATCH", f"/container?id={box['id']}&state=exited"))
    client.await_state(box["id"], "exited", PAUSE)
    client.ask(request("DELETE", f"/container/{box['id']}"))
    return taken / MILLISECOND


def _nspawn(client: Client, mount: bytes, place: Path) -> float:
    """Raises: Unable."""
    root = client.ask(mount).json()
    words = place / "nspawn.log"
    try:
        with words.open("w") as log, _booting(root["mountpoint"], log.fileno()) as process:
            begun = time.monotonic_ns()
            return (_await_running(lambda: _child(process)) - begun) / MILLISECOND
    except TimeoutError:
        raise Unable(" ".join(words.read_text(errors="replace").split())[-200:]) from None
    finally:
        client.ask(request("DELETE", f"/mount/{root['id']}"))


@contextlib.contextmanager
def _booting(root: str, log: int) -> Iterator[subprocess.Popen[bytes]]:
    alone = ("--quiet", "--register=no", "--keep-unit", "--console=pipe", "--kill-signal=SIGRTMIN+3")
    command = ["systemd-nspawn", *alone, f"--directory={root}", "--boot"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _child(process: subprocess.Popen[bytes]) -> int | None:
    """The first process of the container, once it is there.

    Raises: TimeoutError when there will be none.
    """
    if process.poll() is not None:
        raise TimeoutError("systemd-nspawn has ended")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else None


def _await_running(first: Callable[[], int | None]) -> int:
    """The moment (ns of CLOCK_MONOTONIC) at which the systemd that `first` names has said that it is running.

    Raises: TimeoutError.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (pid := first()) is not None and _says_running(pid):
            return time.monotonic_ns()
        time.sleep(PAUSE)
    raise TimeoutError("systemd does not come to run")


def _says_running(pid: int) -> bool:
    asking = ["nsenter", "-t", str(pid), "-a", "systemctl", "is-system-running", "--wait"]
    return subprocess.run(asking, capture_output=True, text=True, timeout=PATIENCE).stdout.strip() == "running"
