"""The deaths that a step orders. The test's own process kills, whoever's step it is: a container's first process sees
nobody outside its pid namespace, and its own SIGKILL does not reach it (pid_namespaces(7)).

It is asked through a socket with an abstract name, which is found from any mount namespace (unix(7)); the kernel says
who asks, by the number that process has here.
"""

from __future__ import annotations

import _socket  # whose calls are no steps (lab.faults)
import contextlib
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

ITSELF, HELPERS = 0, -2
"""Among the victims: the process whose step it is; and all storage daemons that there are when it comes."""
_DEATH = 5000
"""Milliseconds that a victim may take to end."""
_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): pid, uid, gid."""


def ask(path: Path) -> None:
    """Have those killed whose turn it is; returns when they are dead, to those who are not among them."""
    asking = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    asking.connect(_address(path))
    asking.recv(1)
    asking.close()


def _address(path: Path) -> str:
    """As much of the path as an address has room for (unix(7)), from its end."""
    return "\0" + str(path)[-100:]


class Deaths(threading.Thread):
    """Who kills, for the processes that have a shared page in the file `path`. `helpers` finds the storage daemons."""

    def __init__(self, path: Path, helpers: Callable[[], Collection[int]]) -> None:
        super().__init__(daemon=True)
        self.came = False
        """Whether somebody has asked since the last order."""
        self._helpers = helpers
        self._victims: Sequence[int] = ()
        self._failure: AssertionError | None = None
        self._at_work = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(_address(path))
        self._listener.listen()
        self.start()

    def order(self, victims: Sequence[int]) -> None:
        """Kill these for the first that asks from now on, ITSELF when the others are dead."""
        with self._at_work:
            self.came, self._failure, self._victims = False, None, victims

    def end(self) -> bool:
        """Kill nobody any more; whether it was asked for.

        Raises: AssertionError, when a victim was not there to be killed, or does not die.
        """
        with self._at_work:
            failure, self._failure, self._victims = self._failure, None, ()
        if failure is not None:
            raise failure
        return self.came

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.join()
        self._listener.close()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                asking, _ = self._listener.accept()
                with asking, self._at_work:
                    self._obey(asking)

    def _obey(self, asking: socket.socket) -> None:
        victims, self._victims = self._victims, ()
        if not victims:
            return  # somebody else was at the same step before
        self.came = True
        itself, _, _ = _CREDENTIALS.unpack(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        try:
            _kill({itself if pid == ITSELF else pid for pid in victims} - {HELPERS}, itself, self._found(victims))
        except AssertionError as failure:
            self._failure = failure

    def _found(self, victims: Sequence[int]) -> Collection[int]:
        return self._helpers() if HELPERS in victims else ()


def _kill(victims: set[int], last: int, helpers: Collection[int]) -> None:
    """Storage daemons may end meanwhile: they have clients of their own."""
    with contextlib.ExitStack() as opened:
        there = dict(_opened(victims, opened))
        assert set(there) == victims, f"processes {victims - set(there)}, which are to be killed, are not there"
        there |= _opened(helpers, opened)
        for pid in sorted(there, key=lambda pid: pid == last):
            _end(pid, there[pid])


def _opened(pids: Collection[int], opened: contextlib.ExitStack) -> Iterator[tuple[int, int]]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            opened.callback(os.close, descriptor)
            yield pid, descriptor


def _end(pid: int, descriptor: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has died of another's death, and was reaped
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    ended = select.poll()
    ended.register(descriptor, select.POLLIN)
    assert ended.poll(_DEATH), f"process {pid} was killed, and does not die"
