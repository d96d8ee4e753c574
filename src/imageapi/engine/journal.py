"""What the server itself has to say in the log of a container. That a log cannot be written stops nothing."""

from __future__ import annotations

import contextlib
import logging
import os

from imageapi.engine.graph import describe
from imageapi.engine.lives import run_of
from imageapi.records import AnyRecord
from imageapi.runtime import logs

log = logging.getLogger(__name__)

DELETED = "container deleted"


def say(record: AnyRecord, text: str) -> None:
    """Write a line."""
    try:
        logs.append(run_of(record).logfile, _author(record), text)
    except OSError as error:
        log.error("%s: '%s' is not in its log file: %s", describe(record), text, error)


def close(record: AnyRecord) -> None:
    """The container is gone: its log gets its last line, once, or goes, too, if nobody was ever told of it.

    That is done while there is still a record, by which the next server does it if this one is killed over it.
    """
    if run_of(record).untold:
        _erase(record)
    elif not _has_last_line(record):
        say(record, DELETED)


def _has_last_line(record: AnyRecord) -> bool:
    line = f" {_author(record)}: {DELETED}\n".encode()
    with contextlib.suppress(OSError), open(run_of(record).logfile, "rb") as file:
        file.seek(-len(line), os.SEEK_END)
        return file.read() == line
    return False


def _erase(record: AnyRecord) -> None:
    try:
        logs.remove(run_of(record).logfile)
    except OSError as error:
        log.error("a log that nobody knows of is left: %s", error)


def _author(record: AnyRecord) -> str:
    return f"container({record.id})"
