"""What the tests of the rbd driver do with it, and look at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imageapi import errors
from imageapi.config import Site
from imageapi.drivers.attach.rbd import Driver
from imageapi.linux import loop
from imageapi.records import AnyRecord, Record
from imageapi.spec import Attachment, Rbd, RbdOptions, Secret
from lab.ceph import Cluster

DRIVER = Driver()
ATTRIBUTES_VALID = 1.1
"""Seconds for which the kernel answers questions about the exported file itself: QEMU allows it one."""
READ_ONLY = {
    "mon": "profile rbd",
    "osd": "profile rbd-read-only pool=rbd, allow rw pool=rbd object_prefix rbd_header.",
}


def definition(ceph: Cluster, image: str, *, snapshot: str | None = None, pool: str = "rbd", **options: object) -> Rbd:
    """An attachment of `image`; as client.admin unless options say otherwise, read-only unless they say `rw`."""
    chosen = {"secret": Secret(ceph.admin_key), "ro": "rw" not in options, **options}
    return Rbd([ceph.monitor], pool, image, snapshot, RbdOptions(**chosen))  # type: ignore[arg-type]


def record(what: Rbd, number: int = 0) -> AnyRecord:
    return Record[Attachment](id=number, token=number, spec=Attachment(kind="rbd", rbd=what))


@contextlib.contextmanager
def attached(site: Site, what: AnyRecord) -> Iterator[str]:
    """The block device of an attachment that stands within the context."""
    facts = DRIVER.acquire(what, [], site)
    try:
        assert facts.device_file is not None
        yield facts.device_file
    finally:
        DRIVER.release(what, site)


def problem(site: Site, what: Rbd) -> errors.Problem:
    """Why `what` cannot be attached; it must leave nothing."""
    with pytest.raises(errors.Problem) as caught:
        DRIVER.acquire(record(what), [], site)
    assert os.listdir(site.helpers_dir) == []
    assert what.options.secret is None or what.options.secret.reveal() not in str(caught.value.to_dict())
    return caught.value


def is_read_only(device: str) -> bool:
    return Path(f"/sys/block/{Path(device).name}/ro").read_text() == "1\n"


def assert_nothing_left(site: Site, when: str) -> None:
    assert (os.listdir(site.helpers_dir), loops(site)) == ([], []), when


def loops(site: Site) -> list[str]:
    """The files of the site that loop devices stand on. Asked is sysfs: a device of a neighbour's may hang."""
    files = [path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    return [file for file in files if file.startswith(f"{site.run_dir}/")]


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
