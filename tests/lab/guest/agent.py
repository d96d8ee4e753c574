"""Runs in the guest: does what the tests ask over a virtio serial port, one request after the other.

A request is a line of JSON, then as many bytes as its `input` says; the answer is of the same form. What is asked is a
command to run, or a function of the shared checkout to call.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

SEARCH = ("/lab/src", "/imageapi/src", "/imageapi/tests", "/imageapi", "/lab/packages")
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207


def port() -> str:
    """The device of the serial port named `agent`."""
    names = Path("/sys/class/virtio-ports").glob("*/name")
    return "/dev/" + next(path.parent.name for path in names if path.read_text().strip() == "agent")


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    while True:
        line = requests.readline()
        if not line.strip():
            time.sleep(0.01)  # nobody is at the other end
            continue
        request = json.loads(line)
        answer, output, errors = do(request, requests.read(request.pop("input", 0)))
        head = json.dumps({**answer, "output": len(output), "errors": len(errors)}).encode()
        answers.write(head + b"\n" + output + errors)
        answers.flush()


def do(request: dict[str, Any], input: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    try:
        match request:
            case {"argv": argv, "timeout": timeout}:
                return run(argv, input, timeout)
            case {"call": name, "arguments": arguments}:
                return {"value": call(name, arguments)}, b"", b""
            case {"now": seconds}:
                wake(seconds, input)
                return {}, b"", b""
            case _:
                return {"failed": f"no such request: {request}"}, b"", b""
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}, b"", b""


def run(argv: list[str], input: bytes, timeout: float) -> tuple[dict[str, Any], bytes, bytes]:
    """A command. One that hangs is killed and left: it may be stuck in the kernel."""
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    try:
        output, errors = process.communicate(input, timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"code": None}, b"", b""
    return {"code": process.returncode}, output, errors


def environment() -> dict[str, str]:
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": "/root", "LC_ALL": "C.UTF-8", "PYTHONPATH": ":".join(SEARCH)}


def call(name: str, arguments: list[Any]) -> Any:
    """The function `module:name`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)(*arguments)


def wake(now: float, entropy: bytes) -> None:
    """After a restore: it is later than the clock says, and no two guests may draw the same random numbers."""
    time.clock_settime(time.CLOCK_REALTIME, now)
    with open("/dev/urandom", "wb") as random:
        fcntl.ioctl(random, RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(random, RNDRESEEDCRNG)


if __name__ == "__main__":
    sys.path[:0] = SEARCH
    os.chdir("/")
    descriptor = os.open(port(), os.O_RDWR)  # only one can have it open
    serve(os.fdopen(descriptor, "rb"), os.fdopen(os.dup(descriptor), "wb"))
