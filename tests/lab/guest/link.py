"""The tests' end of the serial port on which the guest's agent listens."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from typing import Any

from lab.guest.qemu import Qemu

HANG = 60.0
"""Seconds beyond a command's own deadline until the guest itself is taken to hang."""


class GuestError(Exception):
    """The agent could not do what it was asked."""


class Link:
    """One request at a time."""

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu
        self._socket: socket.socket = qemu.connect("agent")
        self._file = self._socket.makefile("rwb")

    def run(self, argv: list[str], input: bytes = b"", timeout: float = 60.0) -> subprocess.CompletedProcess[bytes]:
        """Run a command in the guest.

        Raises: TimeoutError, when it did not end within `timeout` seconds and was killed.
        """
        answer, output, errors = self.ask({"argv": argv, "timeout": timeout}, input, timeout)
        if answer["code"] is None:
            raise TimeoutError(f"{' '.join(argv)}: not within {timeout:g} s in the guest")
        return subprocess.CompletedProcess(argv, answer["code"], output, errors)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the function `module:name` of the checkout in the guest, with what JSON can carry."""
        return self.ask({"call": name, "arguments": arguments})[0]["value"]

    def wake(self) -> None:
        """The clock, and other random numbers than the last guest from this state had."""
        self.ask({"now": time.time()}, os.urandom(32))

    def ask(self, request: dict[str, Any], input: bytes = b"", timeout: float = HANG) -> tuple[Any, bytes, bytes]:
        """Raises: GuestError, TimeoutError."""
        self._socket.settimeout(timeout + HANG)
        self._file.write(json.dumps({**request, "input": len(input)}).encode() + b"\n" + input)
        self._file.flush()
        head = self._file.readline()
        self._qemu.check()
        answer = json.loads(head)
        output, errors = self._file.read(answer.pop("output")), self._file.read(answer.pop("errors"))
        if "failed" in answer:
            raise GuestError(answer["failed"])
        return answer, output, errors

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()
