"""A process that is to become a container: cloned into its namespaces, waiting to be told which.

One is always kept in waiting, so that a start does not wait for the clone, its longest part. It has none of the
supervisor's descriptors but those a start needs, and ends when the supervisor does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from typing import NamedTuple

from imageapi.linux import namespaces, pidfd
from imageapi.runtime import init
from imageapi.runtime.protocol import encode

FLAGS = namespaces.CLONE_NEWNS | namespaces.CLONE_NEWPID | namespaces.CLONE_NEWUTS | namespaces.CLONE_NEWIPC


class Child(NamedTuple):
    """`tie` is our end of the pair that ties it to us: orders go down, and a failure comes up; the end of it is
    an exec. `born` is its start time."""

    pid: int
    pidfd: int
    tie: socket.socket
    born: int

    def order(self, orders: init.Orders, descriptors: Sequence[int]) -> None:
        """Say what it is to become. Raises: OSError, when it is no more."""
        socket.send_fds(self.tie, [encode(orders)], list(descriptors))

    def dismiss(self) -> None:
        """End it, and wait for that: it has done nothing yet that could take long."""
        with contextlib.suppress(ProcessLookupError):
            pidfd.send_signal(self.pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        os.close(self.pidfd)
        self.tie.close()


def bear(given: init.Inheritance, born_in: int | None = None) -> Child:
    """A new child, in the cgroup2 group `born_in`. Raises: OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            pid, descriptor = namespaces.clone(FLAGS, born_in)
        except OSError:
            ours.close()
            raise
        if pid == 0:
            init.run(theirs, given)
    return Child(pid, descriptor, ours, pidfd.start_time(pid) or 0)
