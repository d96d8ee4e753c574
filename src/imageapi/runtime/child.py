"""A process that is to become a container: cloned into its namespaces, waiting to be told which.

One is always kept in waiting, so that a start does not wait for the clone and all else that can be done before: its
parts of a root are made, its output has a FIFO, and its pidfd is parked in the keep. It has none of the supervisor's
descriptors but those a start needs, and ends when the supervisor does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from imageapi.linux import namespaces, pidfd
from imageapi.runtime import init, lender, output
from imageapi.runtime.keep import Keep
from imageapi.runtime.lender import Lender
from imageapi.runtime.protocol import encode

RESERVE = 64
"""Descriptors that no child may take; a quarter of all, where there are few."""
FLAGS = namespaces.CLONE_NEWNS | namespaces.CLONE_NEWPID | namespaces.CLONE_NEWUTS | namespaces.CLONE_NEWIPC


class Child(NamedTuple):
    """What is kept for it is kept under `name`. `tie` is our end of the pair that ties it to us: orders go down, and a
    failure comes up; the end of it is an exec. `output` is our end of its FIFO, `born` and `inode` are what it is known
    by again (pidfd.start_time, pidfd.inode), and `parked` whether the kernel could park its pidfd. `lender` is the
    process whose memory it has, if it has not its own."""

    name: str
    pid: int
    pidfd: int
    tie: socket.socket
    output: int
    born: int
    inode: int | None
    parked: bool
    lender: Lender | None

    def order(self, orders: init.Orders, descriptors: Sequence[int]) -> None:
        """Say what it is to become. Raises: OSError, when it is no more."""
        socket.send_fds(self.tie, [encode(orders)], list(descriptors))


class Nursery(NamedTuple):
    """Where children are born: what they inherit, and where what is kept for them is; `litter` is what of that could
    not be removed, which goes before the next is born."""

    given: init.Inheritance
    keep: Keep
    litter: list[tuple[str, bool]]

    def bear(self, group: str | None = None, born_in: int | None = None) -> Child:
        """A new child; for systemd one in the cgroup2 group `born_in`, and in those named `group` elsewhere.

        Raises: OSError; EMFILE, while there are still descriptors to do all else with.
        """
        name = f"{time.monotonic_ns():x}"
        self._clear_litter()
        with contextlib.ExitStack() as undo:
            undo.callback(self.clear, name, parked=False)
            end = output.make(self.given.directory, name)
            undo.callback(os.close, end)
            _check_reserve(end)
            pid, descriptor, lent_by, tie = lender.clone(FLAGS, born_in)
            if pid == 0:
                init.run(tie, self.given, name, group)
            undo.pop_all()
            child = Child(name, pid, descriptor, tie, end, 0, None, parked=False, lender=lent_by)
            undo.callback(self.dismiss, child)
            born, inode = pidfd.start_time(pid) or 0, pidfd.inode(descriptor)
            parked = self.keep.park(descriptor, name)
            undo.pop_all()
        return child._replace(born=born, inode=inode, parked=parked)

    def dismiss(self, child: Child) -> None:
        """End it, and wait for that: it has done nothing yet that could take long."""
        with contextlib.suppress(ProcessLookupError):
            pidfd.send_signal(child.pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
        if child.lender is not None:
            child.lender.end()
        os.close(child.pidfd)
        os.close(child.output)
        child.tie.close()
        self.clear(child.name, parked=child.parked)

    def clear(self, name: str, *, parked: bool) -> None:
        """Remove what is kept for a child that has ended."""
        try:
            output.remove(self.given.directory, name)
            if parked:
                self.keep.unpark(name)
        except OSError:
            self.litter.append((name, parked))

    def _clear_litter(self) -> None:
        litter = self.litter.copy()
        self.litter.clear()
        for name, parked in litter:
            self.clear(name, parked=parked)


def _check_reserve(descriptor: int) -> None:
    """The newest descriptor tells how many there are, since each gets the lowest number that is free. Some are kept
    for what must not fail: to take orders, and to note an end.

    Raises: OSError(EMFILE).
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptor > limit - min(RESERVE, limit // 4):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
