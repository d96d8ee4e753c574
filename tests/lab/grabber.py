"""Another program that takes and gives back loop devices all the time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import NoReturn

from imageapi.linux import loop
from lab.images import small_image
from lab.session import VARIABLE

NAME = f"somebody else's {os.environ.get(VARIABLE, '')}"
"""Of another program of this test run."""
HELD = 0.002
"""Seconds for which it keeps a device."""


@contextlib.contextmanager
def grabbing() -> Iterator[None]:
    """While this lasts, the loop device that is free next is another program's, again and again."""
    path = str(small_image())
    pid = os.fork()
    if pid == 0:
        _grab(path)
    try:
        yield
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it grabs to the end"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for device in loop.marked(NAME).values():
            loop.detach(device, NAME)


def _grab(path: str) -> NoReturn:
    with contextlib.suppress(BaseException):
        file = os.open(path, os.O_RDONLY)
        while True:
            device, _ = loop.attach(file, NAME, read_only=True)
            time.sleep(HELD)
            loop.detach(device, NAME)
            time.sleep(HELD)
    os._exit(1)
