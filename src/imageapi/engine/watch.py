"""Whether the host has changed, without asking: what is mounted, what devices there are, what files are called.

Descriptors that become readable say it: /proc/self/mountinfo by POLLPRI (proc_pid_mountinfo(5)), the kernel's messages
about devices, and inotify. They are gathered in one of epoll(7), which is all that the event loop sees. Nearly every
request of ours changes the host, too: so after the first word nothing is heard until somebody waits again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
from collections.abc import Collection

from imageapi.linux import inotify, uevent

log = logging.getLogger(__name__)


class Watch:
    """What tells of changes. `instance` is an inotify instance, to which workers add what is to be watched; -1 where
    there is none."""

    def __init__(self, instance: int) -> None:
        self.instance = instance
        self._watches: frozenset[int] = frozenset()
        self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._devices = _listen()
        self._epoll = select.epoll()
        self._sources = {self._mounts: select.EPOLLPRI}
        if self._devices is not None:
            self._sources[self._devices.fileno()] = select.EPOLLIN
        if instance >= 0:
            self._sources[instance] = select.EPOLLIN
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._hear)

    def arm(self) -> None:
        """Forget what was told, and listen: whoever looks at the host after this misses nothing.

        The kernel tells of a change of mounts once for each descriptor, also when it is only asked whether there is
        one. So it must be listened to before the look, and not after.
        """
        self._changed.clear()
        for descriptor, events in self._sources.items():
            with contextlib.suppress(FileExistsError):
                self._epoll.register(descriptor, events)
        if self._devices is not None:
            uevent.drain(self._devices)
        if self.instance >= 0:
            inotify.drain(self.instance)

    async def changed(self) -> None:
        """Returns when something has changed since `arm`. From then on nothing is listened to."""
        await self._changed.wait()

    def keep(self, watches: Collection[int]) -> None:
        """Let go of all files but those of these watches."""
        for stale in self._watches.difference(watches):
            inotify.remove(self.instance, stale)
        self._watches = frozenset(watches)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._epoll.fileno())
        self._epoll.close()
        os.close(self._mounts)
        if self._devices is not None:
            self._devices.close()

    def _hear(self) -> None:
        for descriptor in self._sources:
            with contextlib.suppress(FileNotFoundError):
                self._epoll.unregister(descriptor)
        self._changed.set()


def _listen() -> socket.socket | None:
    try:
        return uevent.listen()
    except OSError as error:
        log.warning("changes of devices are seen only when something else changes: %s", error)
        return None
