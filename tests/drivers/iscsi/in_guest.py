"""What runs in a guest: the driver, with the kernel's initiator. Nothing is imported here that a guest has not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from drivers import interruptions
from imageapi.config import Backend, Site
from imageapi.drivers import partitions
from imageapi.drivers.attach.iscsi import Driver
from imageapi.drivers.iscsi import database
from imageapi.engine import sweep
from imageapi.errors import Problem
from imageapi.linux import iscsi
from imageapi.records import AnyRecord, Record
from imageapi.spec import Attachment, Iscsi, decode_hook

DRIVER = Driver()


@contextmanager
def site(backend: Backend = "kernel") -> Iterator[Site]:
    """A place for the driver; what it should have left empty must be."""
    with tempfile.TemporaryDirectory(prefix="iscsi-") as directory:
        os.mkdir(f"{directory}/helpers")
        yield Site(run_dir=directory, instance="0123abcd", iscsi_backend=backend)
        os.rmdir(f"{directory}/helpers")


def record(fields: dict[str, Any], number: int = 0) -> AnyRecord:
    definition = msgspec.convert(fields, Iscsi, dec_hook=decode_hook)
    return Record[Attachment](id=number, token=number, spec=Attachment(kind="iscsi", iscsi=definition))


def left(where: Site) -> list[str]:
    """What stands that carries our mark, or lies in open-iscsi's database."""
    prefix = database.prefix(where)
    sessions = [f"session {each.id}" for each in iscsi.sessions() if each.interface.startswith(prefix)]
    files = [f"{directory}/{name}" for place in ("nodes", "ifaces") for directory, _, names in
             os.walk(f"/etc/iscsi/{place}") for name in names]  # fmt: skip
    return [*sessions, *files, *os.listdir(where.helpers_dir)]


def looked_at(fields: dict[str, Any], backend: Backend = "kernel") -> dict[str, Any]:
    """What an attachment looks like from the host, and what is left of it afterwards."""
    with site(backend) as where:
        what = record(fields)
        facts = DRIVER.acquire(what, [], where)
        assert facts.device_file is not None
        seen = DRIVER.observe(what, where)
        name = os.path.basename(facts.device_file)
        found: dict[str, Any] = {
            "device": facts.device_file,
            "observed": seen.device_file if seen else None,
            "sessions": len([each for each in left(where) if each.startswith("session")]),
            "others": [each for each in left(where) if not each.startswith("session")],
            **{path: _read(f"/sys/block/{name}/{path}") for path in ("ro", "queue/scheduler", "device/queue_depth")},
        }
        found["begins"] = _begin(facts.device_file)
        parts = partitions.read(facts.device_file)
        found["partitions"] = {str(number): _begin(partitions.find(facts.device_file, number)) for number in parts}
        DRIVER.release(what, where)
        DRIVER.release(what, where)
        return {**found, "left": left(where)}


def _begin(device: str) -> str:
    with open(device, "rb") as file:
        return file.read(4).strip(b"\0").decode("latin-1")


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def refused(fields: dict[str, Any]) -> dict[str, Any]:
    """Why it cannot be attached; it must leave nothing."""
    with site() as where:
        try:
            DRIVER.acquire(record(fields), [], where)
        except Problem as problem:
            assert left(where) == [], left(where)
            return problem.to_dict()
    raise AssertionError("it was attached")


def killed(fields: dict[str, Any], verb: str, first: int, every: int) -> int:
    """Kill the verb after each so many of its steps; how many kills there were. What is left is undone."""
    kills = 0
    with site() as where:
        what = record(fields)
        act = {"acquire": lambda: DRIVER.acquire(what, [], where), "release": lambda: DRIVER.release(what, where)}[verb]
        if verb == "release":
            DRIVER.acquire(what, [], where)
        for step in interruptions.deaths(act, first, every):
            kills += 1
            DRIVER.release(what, where)
            assert left(where) == [], f"{verb} killed after step {step}: {left(where)}"
            if verb == "release":
                DRIVER.acquire(what, [], where)
        DRIVER.release(what, where)
    return kills


def swept(fields: dict[str, Any]) -> dict[str, Any]:
    """What the start of a server removes of an attachment whose record is lost, and what it leaves."""
    with site() as where:
        os.mkdir(where.mounts_dir)
        DRIVER.acquire(record(fields, 7), [], where)
        removed = sweep.sweep(where)
        os.rmdir(where.mounts_dir)
        return {"removed": removed, "left": left(where)}
