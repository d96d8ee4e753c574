"""What the tests of kinds do that a storage daemon may serve, and what they look at."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imageapi import errors
from imageapi.config import Site
from imageapi.drivers.base import driver
from imageapi.linux import loop
from imageapi.records import AnyRecord
from lab.machine import backing_files

ATTRIBUTES_VALID = 1.1
"""Seconds for which the kernel answers questions about the exported file itself: QEMU allows it one."""


@contextlib.contextmanager
def attached(site: Site, what: AnyRecord) -> Iterator[str]:
    """The block device of an attachment that stands within the context."""
    kind = driver(what.key.collection, what.kind)
    facts = kind.acquire(what, [], site)
    try:
        assert facts.device_file is not None
        yield facts.device_file
    finally:
        kind.release(what, site)


def refused(site: Site, what: AnyRecord) -> errors.Problem:
    """Why `what` cannot be attached; it must leave nothing."""
    with pytest.raises(errors.Problem) as caught:
        driver(what.key.collection, what.kind).acquire(what, [], site)
    assert os.listdir(site.helpers_dir) == []
    return caught.value


def write_in_parallel(device: str, data: bytes, piece: int = 1 << 20) -> None:
    """Write `data` to the begin of a device by several threads at once, past its page cache."""

    def write(at: int) -> None:
        buffer = mmap.mmap(-1, piece)  # direct I/O wants memory that is aligned
        buffer.write(data[at : at + piece])
        descriptor = os.open(device, os.O_WRONLY | os.O_DIRECT)
        try:
            assert os.pwrite(descriptor, buffer, at) == piece
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(0, len(data), piece)))


def is_read_only(device: str) -> bool:
    return Path(f"/sys/block/{Path(device).name}/ro").read_text() == "1\n"


def assert_nothing_left(site: Site, when: str) -> None:
    assert (os.listdir(site.helpers_dir), loops(site)) == ([], []), when


def loops(site: Site) -> list[str]:
    """The loop devices that stand on files of the site."""
    return [device for device, file in backing_files() if file.startswith(f"{site.run_dir}/")]


def can_be_asked(device: str) -> bool:
    try:
        loop.status(device)
    except OSError:
        return False
    return True


def process_texts() -> dict[str, bytes]:
    """The command line and environment of every process."""
    found = {}
    for path in (*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")):
        with contextlib.suppress(OSError):
            found[str(path)] = path.read_bytes()
    return found


def daemons(site: Site) -> dict[str, int]:
    """The storage daemons of a site: their directories' names and pids."""
    found = Path(site.helpers_dir).glob("daemon-*/pid")
    return {path.parent.name: int(path.read_text()) for path in found}


def spied(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every call of a function from now on."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(owner, name)

    def spy(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, spy)
    return calls
