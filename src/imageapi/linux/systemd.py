"""What systemd and a service of its tell each other: sd_booted(3), sd_notify(3), sd_listen_fds(3),
sd_watchdog_enabled(3). It is an environment, a datagram and some descriptors.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple, Self

FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START."""


def booted() -> bool:
    """Whether systemd runs this host, as sd_booted(3) finds it out."""
    return os.path.isdir("/run/systemd/system")


def restrictions() -> list[str]:
    """What this process's unit takes from it, and from all that it starts, a sentence each; see systemd.exec(5)."""
    found = []
    if _is_apart():
        found.append(
            "it has a mount namespace of its own, so that what it mounts is lost at its next start; take every "
            "Private…=, Protect…=, …Paths= and the like from its unit"
        )
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    if status["NoNewPrivs"].strip() == "1" or status.get("Seccomp", "0").strip() != "0":
        found.append(
            "it may not do all that root may, and neither may containers; take NoNewPrivileges=, SystemCall…=, "
            "Restrict…=, Protect…= and Lock…= from its unit"
        )
    return found


def _is_apart() -> bool:
    """Whether the host's mounts are not ours; it may not be ours to know."""
    try:
        return os.readlink("/proc/self/ns/mnt") != os.readlink("/proc/1/ns/mnt")
    except PermissionError:
        return False


class Service(NamedTuple):
    """This process as a service of systemd's. One that was started by another has nothing of this, and says nothing.

    `address` is where systemd hears it, `watchdog` the seconds within which it must hear it each time, or 0, and
    `listeners` are the sockets on which systemd listens for it."""

    address: str | None = None
    watchdog: float = 0.0
    listeners: Sequence[socket.socket] = ()

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Self:
        """What systemd gave this process; nothing of it stays for those that it starts. To be called before anything
        is opened."""
        given = {name: environment.pop(name, "") for name in _VARIABLES}
        ours = str(os.getpid())
        watched = given["WATCHDOG_PID"] in ("", ours)
        count = int(given["LISTEN_FDS"] or 0) if given["LISTEN_PID"] == ours else 0
        return cls(
            address=given["NOTIFY_SOCKET"] or None,
            watchdog=int(given["WATCHDOG_USEC"] or 0) / 1e6 if watched else 0.0,
            listeners=[_listener(FIRST_DESCRIPTOR + number) for number in range(count)],
        )

    def tell(self, *words: str) -> bool:
        """Say things like `READY=1`; whether they are said. It does not wait: a manager that does not listen now is
        told again by whoever must be heard."""
        if self.address is None:
            return True
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
            try:
                channel.connect(f"\0{self.address[1:]}" if self.address.startswith("@") else self.address)
                channel.send("\n".join(words).encode())
            except OSError:
                return False
        return True

    def reloading(self) -> bool:
        """Say that what follows is a reload, until READY=1."""
        return self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


_VARIABLES = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"),
)


def _listener(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


def with_grace(seconds: float) -> str:
    """The word that asks for so much time to start or to end, from now on."""
    return f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"
