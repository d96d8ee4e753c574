"""What the server itself has to say in the log of a container. That a log cannot be written stops nothing."""

from __future__ import annotations

import logging

from imageapi.engine.graph import describe
from imageapi.engine.lives import run_of
from imageapi.records import AnyRecord
from imageapi.runtime import logs

log = logging.getLogger(__name__)

DELETED = "container deleted"


def say(record: AnyRecord, text: str) -> None:
    """Write a line."""
    try:
        logs.append(run_of(record).logfile, f"container({record.id})", text)
    except OSError as error:
        log.error("%s: '%s' is not in its log file: %s", describe(record), text, error)


def erase(record: AnyRecord) -> None:
    """Remove the log: nobody was ever told of it."""
    try:
        logs.remove(run_of(record).logfile)
    except OSError as error:
        log.error("a log that nobody knows of is left: %s", error)
