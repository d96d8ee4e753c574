"""What the records say and what the host shows, compared: a job of a worker, which reads the records from disk.

So the event loop, which would have to hand a thousand records over, only takes what was found. It must compare that
with what it has done meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple

from imageapi.config import Site
from imageapi.drivers.audit import Host, Wrong
from imageapi.drivers.base import driver
from imageapi.errors import Problem
from imageapi.linux import inotify, process
from imageapi.records import AnyRecord, Key, Phase
from imageapi.spec import Container
from imageapi.store import peek


class Finding(NamedTuple):
    """What is wrong with an object, which is the one of this token."""

    key: Key
    token: int
    wrong: Wrong


class Look(NamedTuple):
    """One look at the host: the objects of which there is a record on disk, what was found, and the numbers of the
    inotify watches by which changes are told."""

    written: set[Key]
    findings: list[Finding]
    watches: set[int]


class Found(NamedTuple):
    """One thing that is not as it should be: a sentence, and what would mend it. `about` is the object it is about;
    `of` the object that it would be of, if there were a record, or the number that its directories would have."""

    problem: str
    remedy: str
    about: Key | None = None
    of: Key | int | None = None


class Report(NamedTuple):
    """What was found, and what could not be looked at, each with its reason."""

    found: list[Found]
    unseen: dict[str, str]


def look(site: Site, boot_id: str, instance: int) -> Look:
    """Compare all live objects with the host; `instance` is that of inotify, -1 for none.

    Raises: OSError.
    """
    process.name("imageapi-audit")
    records = peek(site.state_dir).records
    host = Host(instance)
    for directory in (site.run_dir, site.mounts_dir, site.state_dir):
        host.watch(directory, inotify.ENTRIES)
    findings = audit([record for record in records if is_live(record, boot_id)], site, host)
    return Look({record.key for record in records}, findings, host.watches)


def is_live(record: AnyRecord, boot_id: str) -> bool:
    """Whether the kernel should have the object. The records of another boot mean nothing."""
    return record.phase is Phase.LIVE and record.boot_id == boot_id and not isinstance(record.spec, Container)


def audit(records: list[AnyRecord], site: Site, host: Host) -> list[Finding]:
    """What is wrong with each of the records, which must be older than the look at the host."""
    found = ((record, _audited(record, site, host)) for record in records)
    return [Finding(record.key, record.token, wrong) for record, wrong in found if wrong is not None]


def _audited(record: AnyRecord, site: Site, host: Host) -> Wrong | None:
    """An object that cannot be looked at is one of which something is wrong."""
    try:
        return driver(record.key.collection, record.kind).audit(record, site, host)
    except (OSError, Problem) as error:
        return Wrong(f"it could not be looked at: {error}", "see to what is said of it")
