"""How long from a POST of a whole nest (loop, squashfs, overlay, container) to its command's first instruction.

    .venv/bin/python -m tools.latency [rounds]        # as root, x86-64, with gcc and mksquashfs

The command writes the time by the clock that this program looks at before it sends the request.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SERVER = Path(sys.executable).parent / "imageapi-server"
STAMP = Path(__file__).parent / "stamp.c"
MILLISECOND = 1e6
DIRECTORIES = ("bin", "dev", "proc", "run", "sys", "tmp")


class Client(http.client.HTTPConnection):
    """A connection to the server's Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json"} if body else {}
        self.request(method, f"/imageapi/v1{path}", json.dumps(body) if body else None, headers)
        answer = json.loads(self.getresponse().read())
        if "code" in answer:
            raise SystemExit(answer["message"])
        return answer


def make_image(directory: Path) -> Path:
    """A squashfs with nothing in it but the program that stamps."""
    tree, image = directory / "tree", directory / "image.sqsh"
    for name in DIRECTORIES:
        (tree / name).mkdir(parents=True)
    build = ["gcc", "-O2", "-static", "-nostdlib", "-fno-stack-protector", "-o", str(tree / "bin/stamp"), str(STAMP)]
    subprocess.run(build, check=True)
    subprocess.run(["mksquashfs", str(tree), str(image), "-quiet", "-no-progress"], check=True)
    return image


def nest(image: Path) -> dict[str, Any]:
    attachment = {"path": str(image), "base": "root", "ro": True}
    lower = {"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": attachment}}
    return {"mount": {"kind": "overlay", "overlay": {"lower": [lower]}}, "command": "/bin/stamp", "state": "running"}


def one_round(client: Client, image: Path) -> tuple[float, float, float]:
    """Milliseconds until the first instruction, until the answer, and for the DELETE of all of it."""
    sent = time.monotonic_ns()
    box = client.ask("POST", "/container", nest(image))
    answered = time.monotonic_ns()
    while client.ask("GET", f"/container/{box['id']}")["state"] != "exited":
        pass
    stamp = re.search(r"^(\d{10,})$", Path(box["logfile"]).read_text(), re.MULTILINE)
    if stamp is None:
        raise SystemExit(f"there is no time in {box['logfile']}")
    asked = time.monotonic_ns()
    client.ask("DELETE", f"/container/{box['id']}")
    moments = (int(stamp[1]) - sent, answered - sent, time.monotonic_ns() - asked)
    return moments[0] / MILLISECOND, moments[1] / MILLISECOND, moments[2] / MILLISECOND


def measure(directory: Path, rounds: int) -> None:
    image, path = make_image(directory), directory / "socket"
    command = [str(SERVER), "--run-dir", str(directory / "run"), "--socket-path", str(path), "--log-level", "WARN"]
    server = subprocess.Popen(command)
    try:
        while not path.exists():
            time.sleep(0.01)
        client = Client(path)
        taken = [one_round(client, image) for _ in range(rounds)]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    for name, values in zip(("first instruction", "answer", "delete"), zip(*taken, strict=True), strict=True):
        worst = sorted(values)[int(len(values) * 0.95)]
        print(f"{name:18} median {statistics.median(values):6.2f} ms   95th percentile {worst:6.2f} ms")


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(prefix="imageapi-latency-", dir="/run"))
    try:
        measure(place, int(sys.argv[1]) if len(sys.argv) > 1 else 60)
    finally:
        shutil.rmtree(place)
