"""Containers on images of a real Ceph cluster, attached with the storage daemon, and what is looked at of them."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.ceph import Cluster
from lab.server import FOREVER, Server

NOISE = "noise"
"""The file at the root of the image that is read: it is in no cache before."""


def rbd(ceph: Cluster, image: str, *, writable: bool = False) -> dict[str, Any]:
    """An attachment of an image of the pool `rbd`, as its kind route takes it."""
    access = {"rw": True} if writable else {"ro": True}
    options = {"name": "admin", "secret": ceph.admin_key, **access}
    return {"monitors": [ceph.monitor], "pool": "rbd", "image": image, "options": options}


def on_rbd(ceph: Cluster, image: str, fs_type: str = "squashfs") -> dict[str, Any]:
    """A mount of such an image, all in one."""
    attach = {"kind": "rbd", "rbd": rbd(ceph, image)}
    return {"kind": "attach", "attach": {"fs_type": fs_type, "mount_options": ["ro"], "attach": attach}}


def box_on(ceph: Cluster, image: str, command: str = FOREVER, **more: Any) -> dict[str, Any]:
    """A container on an overlay on such an image, all in one, and running."""
    mount = {"kind": "overlay", "overlay": {"lower": [on_rbd(ceph, image)]}}
    return {"mount": mount, "command": command, "state": "running", **more}


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
def stopped(pid: int) -> Iterator[None]:
    """A process that does nothing any more, and goes on at the end, if it is still there."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
