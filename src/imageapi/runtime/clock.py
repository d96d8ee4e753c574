"""Times as the API and the records write them: RFC 3339, in UTC, to the microsecond."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """The time, written."""
    return written(datetime.now(UTC))


def written(moment: datetime) -> str:
    """A moment in UTC, written."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
