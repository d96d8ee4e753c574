"""QEMU's monitor protocol over a Unix socket, with a deadline on every word.

One conversation at a time: whoever talks holds the daemon's lock. The socket is reached through a descriptor of its
directory, because the path of a run directory may be longer than a socket's name can be (unix(7), 108 bytes).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from typing import Any

import msgspec

from imageapi.drivers.deadline import Deadline
from imageapi.spec import revealing_hook


class QmpError(Exception):
    """QEMU refused a command. The text is QEMU's own; it never holds what the command was given."""


class Qmp:
    """A conversation with a daemon that has been greeted. Its commands carry ids of their own, because the answer to a
    caller that was killed comes to the next one."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._socket = connection
        self._deadline = deadline
        self._received = b""
        self._name = os.urandom(8).hex()
        self._count = itertools.count()

    def execute(self, command: str, **arguments: Any) -> Any:
        """The answer to `command`; a `_` in an argument's name stands for QEMU's `-`.

        Raises: QmpError; TimeoutError; ConnectionError when the daemon ended.
        """
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        own = f"{self._name}-{next(self._count)}"
        message = msgspec.json.encode({"execute": command, "arguments": words, "id": own}, enc_hook=revealing_hook)
        self._socket.settimeout(self._deadline.left())
        self._socket.sendall(message + b"\n")
        while (answer := self._receive()).get("id") != own:
            pass
        if "error" in answer:
            raise QmpError(answer["error"]["desc"])
        return answer["return"]

    def greet(self) -> None:
        """The opening that QMP demands before any other command."""
        while "QMP" not in self._receive():
            pass
        self.execute("qmp_capabilities")

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._socket.settimeout(self._deadline.left())
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError("the daemon closed the connection")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        message: dict[str, Any] = msgspec.json.decode(line)
        return message


@contextlib.contextmanager
def conversation(directory: int, name: str, deadline: Deadline) -> Iterator[Qmp]:
    """Talk to the daemon that listens on the socket `name` in the open `directory`.

    Raises: ConnectionRefusedError when nobody listens; TimeoutError.
    """
    with connected(directory, name, deadline) as connection:
        qmp = Qmp(connection, deadline)
        qmp.greet()
        yield qmp


@contextlib.contextmanager
def connected(directory: int, name: str, deadline: Deadline) -> Iterator[socket.socket]:
    """A connection to that socket. A daemon that hangs lets its backlog fill, which is EAGAIN: it is awaited."""
    with socket.socket(socket.AF_UNIX) as connection:

        def connects() -> bool:
            try:
                connection.settimeout(deadline.left())
                connection.connect(f"/proc/self/fd/{directory}/{name}")
            except BlockingIOError:
                return False
            except FileNotFoundError:  # who ends takes the socket away
                raise ConnectionRefusedError("nobody listens") from None
            return True

        deadline.wait(connects)
        yield connection


def listens(directory: int, name: str) -> bool:
    """Whether a daemon listens on that socket. One that hangs does."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        try:
            connection.connect(f"/proc/self/fd/{directory}/{name}")
        except BlockingIOError:
            return True
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def descriptor(path: str) -> int:
    """`path`, a directory, opened to be found by."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
