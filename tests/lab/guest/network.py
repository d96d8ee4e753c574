"""A network of the lab's own: a namespace with nothing but loopback, in which servers for guests listen.

QEMU runs in it too, and its user networking reaches every address that there is, so the guest sees a server at the
same address as the server itself and its other clients do. Nothing of it can be reached from this machine's network.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lab.ceph import wait_until
from lab.guest.qemu import DIE_WITH_US

SERVER, SERVER_V6 = "10.99.0.1", "fd99::1"
"""Where servers listen, as this side and the guests reach them. 10.99.0.2 and fd99::2 up to 9 are there too."""

GUEST = "10.0.2.15"
"""The guest's own address, behind QEMU's."""


class Network:
    """`enter` is the command that runs a command in it."""

    def __init__(self, pid: int) -> None:
        self.enter: tuple[str, ...] = ("nsenter", f"--net=/proc/{pid}/ns/net")
        self._ports = itertools.count(8000)

    def new_port(self) -> int:
        """One that no guest has had."""
        return next(self._ports)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """It lasts as long as the process that holds it."""
    addresses = [f"{prefix}{n}/{bits}" for n in range(1, 10) for prefix, bits in (("10.99.0.", 32), ("fd99::", 128))]
    script = "ip link set lo up; for a in $0 $@; do ip address add $a dev lo; done; exec sleep infinity"
    command = [*DIE_WITH_US, "unshare", "--net", "sh", "-c", script, *addresses]
    holder = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n", "the lab's network", 10)
        yield Network(holder.pid)
    finally:
        holder.kill()
        holder.wait()
