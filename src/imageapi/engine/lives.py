"""The life of a container as its record has it, and the times in it."""

from __future__ import annotations

from datetime import UTC, datetime

from imageapi.records import AnyRecord, Run


def now() -> str:
    """The time as the API writes it: RFC 3339, in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def run_of(record: AnyRecord) -> Run:
    """The container's life; it has one as soon as it is made."""
    if record.run is None:
        raise ValueError(f"{record.key} has not been made yet")
    return record.run
