"""What the server keeps of each object: the spec it was asked for, and what it has learnt since.

The kernel is the truth; a record is what we intended. References are computed from the edges in the specs and from
`pinned`, never counted. A record changes only in the event loop.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, NamedTuple

import msgspec

from imageapi import spec
from imageapi.spec import O

SCHEMA = 1
"""The version of the stored form. A record of another version is not read."""


class Key(NamedTuple):
    """Where an object is found: its collection and its id there."""

    collection: str
    id: int

    def __str__(self) -> str:
        return f"{self.collection} {self.id}"


class Phase(StrEnum):
    """How far the kernel's side of an object has come."""

    PLANNED = "planned"
    ACQUIRING = "acquiring"
    LIVE = "live"
    RELEASING = "releasing"


class Helper(NamedTuple):
    """A process that an object cannot do without: its number, and when it began, in clock ticks since the boot."""

    pid: int
    start_time: int


class Facts(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a driver's acquire learnt. `detail` is the driver's own and only it reads it; whoever has a `helper` can be
    mended when that has ended."""

    device_file: str | None = None
    device_id: int | None = None
    mountpoint: str | None = None
    upperdir: str | None = None
    workdir: str | None = None
    helper: Helper | None = None
    detail: dict[str, Any] = {}


class Run(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A container's life: its state, and what is known of its last start. Times are RFC 3339 in UTC. `before` is, of a
    start that is under way, what is so again if it is cut off. `stop_asked`: when its end was asked for, in seconds
    since the boot. `untold`: its create has not succeeded, so that nobody needs its log."""

    state: spec.State = "created"
    logfile: str = ""
    attempt: int = 0
    pid: int | None = None
    start_time: int | None = None
    exit_code: int | None = None
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    stop_requested: bool = False
    stop_asked: float | None = None
    untold: bool = False
    before: Run | None = None


class Record(msgspec.Struct, Generic[O], kw_only=True, omit_defaults=True):
    """One object. `token` is the number its directories carry, chosen before anything is made, so that what a crash
    left can be found from the record alone."""

    id: int
    spec: O
    token: int
    phase: Phase = Phase.PLANNED
    pinned: bool = False
    facts: Facts = msgspec.field(default_factory=Facts)
    run: Run | None = None
    problem: str | None = None
    schema: int = SCHEMA
    boot_id: str = ""

    @property
    def key(self) -> Key:
        return Key(self.spec.COLLECTION, self.id)

    @property
    def kind(self) -> str:
        """The kind in the record's collection; a container's is `container`."""
        return getattr(self.spec, "kind", None) or self.spec.COLLECTION

    @property
    def definition(self) -> Any:
        """The kind's own part of the spec, as its driver reads it; a container's is the whole."""
        part = spec.own_part(self.spec)
        if part is None:
            raise ValueError(f"the record of {self.key} holds a reference, not a definition")
        return part

    def edges(self) -> list[Key]:
        """The objects this one stands on, in the order its spec names them."""
        return [Key(need.COLLECTION, need.id) for need in spec.needs(self.definition) if need.id is not None]


AnyRecord = Record[Any]


def snapshot(record: AnyRecord, **changes: Any) -> AnyRecord:
    """The record as it is now, whatever becomes of it."""
    run = msgspec.structs.replace(record.run) if record.run else None
    return msgspec.structs.replace(record, facts=msgspec.structs.replace(record.facts), run=run, **changes)


RECORD_TYPES: dict[str, Any] = {
    "attach": Record[spec.Attachment],
    "mount": Record[spec.Mount],
    "container": Record[spec.Container],
}


def encode(record: AnyRecord) -> bytes:
    """A record as it is stored and as it goes to a worker: secrets included."""
    return msgspec.json.encode(record, enc_hook=spec.revealing_hook)


def decode(collection: str, data: bytes) -> AnyRecord:
    """The record in `data`.

    Raises: msgspec.MsgspecError when it is not one of ours.
    """
    record: AnyRecord = msgspec.json.decode(data, type=RECORD_TYPES[collection], dec_hook=spec.decode_hook)
    return record
