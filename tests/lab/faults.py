"""A server that can be killed at any of its steps, and so can all that it has started.

`python -m lab.faults` is `imageapi-server` with a hook after each call that changes something: of the kernel, of a
file, of what another process knows. Zygote, workers, supervisor and the containers' first processes are forked from
it, and have the hooks too. A step is named by who does what for whom (`worker mkdir overlay.acquire`), and by how
often that has happened before; a page of memory that all of them share says which step is awaited. Who comes to it
asks the test to kill (lab.deaths), and waits for that. Nothing of it is in the product.
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import re
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from lab import deaths

VARIABLE = "IMAGEAPI_TEST_FAULTS"
"""Where the shared page is."""
_HEAD = struct.Struct("=Bi96s")
"""Whether steps are written down (1) or one is awaited (2); how often it must come; and its name."""
_RECORDING, _ARMED = 1, 2
_PAGES, _PAGE = 64, 1 << 16
"""What is written down: a page for each process, found by its number, so that none waits for another."""
_SIZE = _PAGE * (_PAGES + 1)
_WRITTEN = re.compile(rb"\d+ [^\0 ]+ [^\0]+")
"""A whole line: when, who, and what for whom."""


class Step(NamedTuple):
    """One step: what it is called, and how often that has been done by then, this time included."""

    name: str
    time: int

    def __str__(self) -> str:
        return self.name if self.time == 1 else f"{self.name} ({self.time})"


class Faults:
    """The test's side of the shared page. `helpers` finds the storage daemons that there are."""

    def __init__(self, path: Path, helpers: Callable[[], Collection[int]]) -> None:
        self.path = path
        path.write_bytes(bytes(_SIZE))
        self._memory = _map(path)
        self._deaths = deaths.Deaths(path, helpers)

    def record(self) -> None:
        """Have every step written down from now on."""
        self._memory[:] = bytes(_SIZE)
        self._memory[0] = _RECORDING

    def recorded(self) -> list[Step]:
        """The steps since `record`, in their order; no more are written down. What is just being written, or was by two
        at once, is left out."""
        self._memory[0] = 0
        pages = (self._memory[at : at + _PAGE] for at in range(_PAGE, _SIZE, _PAGE))
        lines = sorted(line for page in pages for line in page[4:].split(b"\n") if _WRITTEN.fullmatch(line))
        seen: Counter[str] = Counter()
        steps = []
        for line in lines:
            name = line.split(b" ", 1)[1].decode()
            seen[name] += 1
            steps.append(Step(name, seen[name]))
        return steps

    def arm(self, step: Step, victims: Sequence[int]) -> None:
        """Kill the victims when this step has been done."""
        self._deaths.order(victims)
        self._memory[: _HEAD.size] = _HEAD.pack(_ARMED, step.time, step.name.encode())

    def close(self) -> None:
        self._deaths.close()
        self._memory.close()

    @property
    def came(self) -> bool:
        """Whether the step has come that was waited for."""
        return self._deaths.came

    def disarm(self) -> bool:
        """Kill nobody any more; whether the step has come.

        Raises: AssertionError, when it has, and a victim was not there to be killed, or does not die.
        """
        self._memory[0] = 0
        return self._deaths.end()


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), _SIZE)


# ------------------------------------------------------------------------------------------------ in the processes


class _Hook:
    """What every process of the server's calls after each of its steps."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.role = "server"

    def __call__(self, what: str) -> None:
        if not self._memory[0]:
            return
        name = f"{self.role} {what} {_doer(sys._getframe(2))}"[:96]
        if self._memory[0] == _RECORDING:
            self._write_down(name)
        else:
            self._look(name.encode())

    def _write_down(self, name: str) -> None:
        at = _PAGE + os.getpid() % _PAGES * _PAGE
        used = int.from_bytes(self._memory[at : at + 4], "little") or 4
        line = f"{time.monotonic_ns()} {name}\n".encode()
        if used + len(line) > _PAGE:
            return
        self._memory[at + used : at + used + len(line)] = line
        self._memory[at : at + 4] = (used + len(line)).to_bytes(4, "little")

    def _look(self, name: bytes) -> None:
        state, times, awaited = _HEAD.unpack(self._memory[: _HEAD.size])
        if state != _ARMED or awaited.rstrip(b"\0") != name:
            return
        if times > 1:
            self._memory[1:5] = (times - 1).to_bytes(4, sys.byteorder)
            return
        self._memory[0] = 0
        deaths.ask(Path(os.environ[VARIABLE]))


def _doer(frame: FrameType | None) -> str:
    """For what a step is done: the innermost two functions of ours above the kernel layer."""
    names: list[str] = []
    while frame is not None and len(names) < 2:
        path = frame.f_code.co_filename
        if "/imageapi/" in path and "/imageapi/linux/" not in path:
            names.append(f"{Path(path).stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(names)


_FILES = ("mkdir", "rmdir", "unlink", "rename", "mkfifo", "mknod", "symlink", "write", "truncate", "waitid", "splice")
_MESSAGES = ("send", "sendmsg", "recv", "recv_into", "recvmsg")
_LOOPS = {
    0x4C01: "LOOP_CLR_FD",
    0x4C04: "LOOP_SET_STATUS64",
    0x4C06: "LOOP_CHANGE_FD",
    0x4C0A: "LOOP_CONFIGURE",
    0x4C80: "LOOP_CTL_ADD",
    0x4C82: "LOOP_CTL_GET_FREE",
}
_QUIET = ("forget_code", "name", "statmount", "listmount", "ustat", "mount_id", "statx")
"""Functions of the kernel layer that only look, or change nothing that lasts."""


def _after(function: Callable[..., Any], step: Callable[[str], None], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        step(name)
        return result

    return wrapped


def install(hook: _Hook) -> None:
    """Put the hooks in. To be called before anything of the server's is imported."""
    for name in _FILES:
        setattr(os, name, _after(getattr(os, name), hook, name))
    _hook_open(hook)
    _hook_messages(hook)
    _hook_loops(hook)
    signal.pidfd_send_signal = _after(signal.pidfd_send_signal, hook, "pidfd_send_signal")
    os.execve = _before(os.execve, hook, "execve")
    _hook_kernel(hook)


def _before(function: Callable[..., Any], step: Callable[[str], None], name: str) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        step(name)
        return function(*arguments)

    return wrapped


def _hook_loops(hook: _Hook) -> None:
    asked = fcntl.ioctl

    def wrapped(descriptor: Any, request: int, *arguments: Any) -> Any:
        result = asked(descriptor, request, *arguments)
        if request in _LOOPS:
            hook(_LOOPS[request])
        return result

    fcntl.ioctl = wrapped


def _hook_open(hook: _Hook) -> None:
    opened = os.open

    def wrapped(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        descriptor = opened(path, flags, *arguments, **named)
        if flags & os.O_CREAT:
            hook("create")
        return descriptor

    os.open = wrapped


def _hook_messages(hook: _Hook) -> None:
    for name in _MESSAGES:
        function = getattr(socket.socket, name)

        def wrapped(self: socket.socket, *arguments: Any, _function: Any = function, _name: str = name) -> Any:
            result = _function(self, *arguments)
            if not any(isinstance(flags, socket.MsgFlag) and flags & socket.MSG_PEEK for flags in arguments):
                hook(_name)
            return result

        setattr(socket.socket, name, wrapped)


def _hook_kernel(hook: _Hook) -> None:
    """All calls of the C library go through one function, which its callers have imported by name: it is replaced
    before there are any."""
    from imageapi.linux import libc

    check = libc.check

    def wrapped(result: int, *names: str | None) -> int:
        check(result, *names)
        call = sys._getframe(1).f_code.co_name
        if call == "syscall":
            call = sys._getframe(2).f_code.co_name
        if call not in _QUIET:
            hook(call)
        return result

    libc.check = wrapped
    from imageapi.linux import process

    rename = process.name

    def name(text: str) -> None:
        hook.role = text.removeprefix("imageapi-")
        rename(text)

    process.name = name


def _hook_answers(hook: _Hook) -> None:
    """The answer to a request, before it goes out and after."""
    from imageapi.api.connection import Connection

    write = Connection.write

    def wrapped(self: Connection, data: bytes) -> None:
        hook("answer due")
        write(self, data)
        hook("answer")

    Connection.write = wrapped  # type: ignore[method-assign]


def main() -> None:
    hook = _Hook(_map(Path(os.environ[VARIABLE])))
    install(hook)
    from imageapi import server

    serve = server._serve

    def with_answers(*arguments: Any) -> None:
        _hook_answers(hook)
        serve(*arguments)

    server._serve = with_answers  # type: ignore[assignment]
    server.main()


if __name__ == "__main__":
    main()
