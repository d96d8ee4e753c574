"""What the tests of the rbd driver do with it, and look at."""

from __future__ import annotations

from drivers.exporting import refused
from imageapi import errors
from imageapi.config import Site
from imageapi.drivers.attach.rbd import Driver
from imageapi.records import AnyRecord, Record
from imageapi.spec import Attachment, Rbd, RbdOptions, Secret
from lab.ceph import Cluster

DRIVER = Driver()
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


def problem(site: Site, what: Rbd) -> errors.Problem:
    """Why `what` cannot be attached; it must leave nothing, and not tell the key."""
    refusal = refused(site, record(what))
    assert what.options.secret is None or what.options.secret.reveal() not in str(refusal.to_dict())
    return refusal
