"""What the server itself has to say in the log of a container. That a log cannot be written stops nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

from imageapi.engine.graph import describe
from imageapi.engine.lives import run_of
from imageapi.records import AnyRecord
from imageapi.runtime import logs

log = logging.getLogger(__name__)

DELETED = "container deleted"


def say(record: AnyRecord, text: str) -> None:
    """Write a line."""
    _write(logs.append, record, text)


def close(record: AnyRecord) -> None:
    """The container is gone: its log gets its last line, once, or goes, too, if nobody was ever told of it.

    That is done while there is still a record, by which the next server does it if this one is killed over it.
    """
    if run_of(record).untold:
        _erase(record)
    else:
        _write(logs.append_last, record, DELETED)


def _write(how: Callable[[str, str, str], None], record: AnyRecord, text: str) -> None:
    try:
        how(run_of(record).logfile, f"container({record.id})", text)
    except OSError as error:
        log.error("%s: '%s' is not in its log file: %s", describe(record), text, error)


def _erase(record: AnyRecord) -> None:
    try:
        logs.remove(run_of(record).logfile)
    except OSError as error:
        log.error("a log that nobody knows of is left: %s", error)
