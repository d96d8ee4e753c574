"""Stores of other hosts, the images in them, and containers on these; what is looked at of them.

A Ceph cluster and an iSCSI target are the same to who asks for an image in them by its name.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from lab import iscsi
from lab.ceph import Cluster
from lab.machine import Machine
from lab.server import FOREVER, Server

NOISE = "noise"
"""The file at the root of the image that is read: it is in no cache before."""

BY_DAEMON = ("--rbd-backend", "daemon", "--iscsi-backend", "daemon")
"""Options of a server that attaches with the storage daemon whatever the kernel has."""


class Store(Protocol):
    """Images by their names. `unreachable_words` are in the problem of who cannot get in."""

    unreachable_words: str

    def put(self, file: Path, name: str) -> None:
        """Store a file as an image."""
        ...

    def content(self, name: str) -> bytes:
        """What the store has of an image."""
        ...

    def attachment(self, image: str, *, writable: bool = False) -> dict[str, Any]:
        """An attachment of an image, as a nested definition has it."""
        ...

    def unreachable(self) -> AbstractContextManager[None]:
        """Nobody gets in within it."""
        ...

    def silent(self) -> AbstractContextManager[None]:
        """Reads wait within it."""
        ...


class OnCeph:
    """The pool `rbd` of a cluster."""

    unreachable_words = "no monitor answers"

    def __init__(self, cluster: Cluster, machine: Machine) -> None:
        self.cluster = cluster
        self._machine = machine

    def put(self, file: Path, name: str) -> None:
        self.cluster.import_image(str(file), name)

    def content(self, name: str) -> bytes:
        return self.cluster.read_image(name)

    def attachment(self, image: str, *, writable: bool = False) -> dict[str, Any]:
        access = {"rw": True} if writable else {"ro": True}
        options = {"name": "admin", "secret": self.cluster.admin_key, **access}
        rbd = {"monitors": [self.cluster.monitor], "pool": "rbd", "image": image, "options": options}
        return {"kind": "rbd", "rbd": rbd}

    @contextlib.contextmanager
    def unreachable(self) -> Iterator[None]:
        self.cluster.kill_mon()
        try:
            yield
        finally:
            with self._machine.expecting():
                self.cluster.restart_mon()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        self.cluster.kill_osd()
        try:
            yield
        finally:
            with self._machine.expecting():
                self.cluster.restart_osd()


class OnTarget:
    """The disks of an iSCSI target that demands CHAP."""

    unreachable_words = "no iSCSI portal answers"
    _NAME, _INITIATOR = "iqn.2026-01.test:store", "iqn.2026-01.test:node"
    _ACCOUNT = iscsi.Account("node", "only-for-nodes")

    def __init__(self, server: iscsi.Server, machine: Machine) -> None:
        self.server = server
        self._machine = machine
        self._number = server.add_target(self._NAME, account=self._ACCOUNT)
        self._units: dict[str, int] = {}

    def put(self, file: Path, name: str) -> None:
        shutil.copyfile(file, self._file(name))
        self._units[name] = 1 + len(self._units)
        self.server.add_disk(self._number, self._units[name], str(self._file(name)))

    def content(self, name: str) -> bytes:
        return self._file(name).read_bytes()

    def attachment(self, image: str, *, writable: bool = False) -> dict[str, Any]:
        place = {"host": self.server.host, "port": iscsi.PORT, "target": self._NAME, "lun": self._units[image]}
        return {"kind": "iscsi", "iscsi": {**place, **self._manner, "ro": not writable}}

    @contextlib.contextmanager
    def unreachable(self) -> Iterator[None]:
        self.server.kill()
        try:
            yield
        finally:
            with self._machine.expecting():
                self.server.start()

    def silent(self) -> AbstractContextManager[None]:
        return self.server.silent()

    @property
    def _manner(self) -> dict[str, Any]:
        return {"initiator": self._INITIATOR, "chap": self._ACCOUNT._asdict(), "scheduler": "none"}

    def _file(self, name: str) -> Path:
        return Path(self.server.directory, name)


def on(store: Store, image: str) -> dict[str, Any]:
    """A mount of an image, all in one."""
    attach = store.attachment(image)
    return {"kind": "attach", "attach": {"fs_type": "squashfs", "mount_options": ["ro"], "attach": attach}}


def over(*lower: dict[str, Any]) -> dict[str, Any]:
    """An overlay on mounts."""
    return {"kind": "overlay", "overlay": {"lower": list(lower)}}


def box_on(store: Store, image: str, command: str = FOREVER, **more: Any) -> dict[str, Any]:
    """A container on an overlay on an image, all in one, and running."""
    return {"mount": over(on(store, image)), "command": command, "state": "running", **more}


def attach(server: Server, store: Store, image: str, *, writable: bool = False) -> dict[str, Any]:
    """Attach an image by itself; the answer."""
    wanted = store.attachment(image, writable=writable)
    made: dict[str, Any] = server.post(f"/attach/{wanted['kind']}", wanted[wanted["kind"]])
    return made


def helpers(server: Server) -> dict[str, int]:
    """The storage daemons of a server: their directories' names and pids."""
    return {path.parent.name: int(path.read_text()) for path in (server.run_dir / "helpers").glob("daemon-*/pid")}


def reads(path: Path | str) -> bool:
    """Whether the file, or device, can be read from its store, past what is in memory."""
    try:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return len(file.read(1 << 20)) == 1 << 20
    except OSError:
        return False


def read_directly(device: str, at: int, size: int = 1 << 20) -> bytes:
    """What a device has at a place, past its page cache."""
    buffer = mmap.mmap(-1, size)  # direct I/O wants memory that is aligned
    descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        assert os.preadv(descriptor, [buffer], at) == size
        return bytes(buffer)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that do nothing any more, and go on at the end, if they are still there."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
