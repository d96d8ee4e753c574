"""What a process says of itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from imageapi.linux import process

pytestmark = pytest.mark.kernel

LIBRARY_SIGNAL = 32
"""glibc's own: its functions refuse to touch it."""


def in_a_process(*lines: str) -> str:
    """What these lines of Python print, in a process of their own."""
    program = "\n".join(("from imageapi.linux import libc, process", *lines))
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_its_name_is_what_ps_shows() -> None:
    name = in_a_process("process.name('imageapi-something-long')", "print(open('/proc/self/comm').read())")
    assert name == "imageapi-someth"


def test_descriptors_but_those_kept_are_closed() -> None:
    lines = ("import os", "kept = [os.open('/dev/null', 0) for _ in range(9)][4]", "process.close_all_but(kept)")
    shown = in_a_process(*lines, "print(os.readlink('/proc/self/fd/7'), len(os.listdir('/proc/self/fd')))")
    assert shown == "/dev/null 5"


def test_a_signal_that_the_library_keeps_is_reset() -> None:
    ignore = "libc.syscall(libc.SYS_rt_sigaction, 32, (1).to_bytes(8, 'little') + bytes(24), None, 8)"
    before, after = in_a_process(
        ignore,
        "print(process.ignored_signals())",
        "for number in process.ignored_signals(): process.reset_signal(number)",
        "print(process.ignored_signals())",
    ).splitlines()
    assert str(LIBRARY_SIGNAL) in before
    assert after == "[]"


def test_it_dies_with_its_parent() -> None:
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            process.die_with_parent(signal.SIGKILL)
            os.write(writing, b"x")
            signal.pause()
        os.read(reading, 1)
        os._exit(0)
    os.waitpid(parent, 0)
    os.close(writing)
    assert os.read(reading, 1) == b"", "the child's end is closed when it is dead"
    os.close(reading)
