"""Records on disk: one JSON file a record under `state/`, without fsync.

The directory is void after a reboot, so what matters is that a process killed at any instruction leaves each file old
or new, never torn; an empty one is of a record that was not written, and nothing was made for it. The caller writes a
plan's records children first: a crash in between leaves records that nothing holds, which the next start collects. One
server writes (it holds the run directory's lock).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from imageapi import records
from imageapi.linux import whole
from imageapi.records import SCHEMA, AnyRecord, Key

log = logging.getLogger(__name__)

SUFFIX = ".json"
COUNTERS = "counters.json"


class Store:
    """The files of one state directory, which is root's alone: records hold secrets."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._counters: dict[str, int] = {}
        self._make_directories()

    def _make_directories(self) -> None:
        for collection in records.RECORD_TYPES:
            os.makedirs(f"{self._directory}/{collection}", mode=0o700, exist_ok=True)

    def save(self, record: AnyRecord) -> None:
        """Write one record, over its former self."""
        self._write(self._path(record.key), records.encode(record))

    def _write(self, path: str, data: bytes) -> None:
        try:
            whole.write(path, data)
        except FileNotFoundError:  # somebody has removed the directory
            self._make_directories()
            whole.write(path, data)

    def save_all(self, several: Iterable[AnyRecord]) -> None:
        """Write a plan's records, children first; a failure leaves none of them.

        Raises: OSError, when there is no room.
        """
        with contextlib.ExitStack() as undo:
            for record in several:
                undo.callback(self.remove, record.key)
                self.save(record)
            undo.pop_all()

    def remove(self, key: Key) -> None:
        """Forget a record; one that is not there is forgotten already."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(key))

    def save_counters(self, following: dict[str, int], *, anew: bool = False) -> None:
        """Write the ids that come next, which records that are gone no longer tell; those just written only `anew`."""
        if anew or following != self._counters:
            self._write(f"{self._directory}/{COUNTERS}", msgspec.json.encode(following))
            self._counters = following

    def counters(self) -> dict[str, int]:
        """The ids that come next, as they were last written."""
        try:
            with open(f"{self._directory}/{COUNTERS}", "rb") as file:
                return msgspec.json.decode(file.read(), type=dict[str, int])
        except FileNotFoundError:
            return {}
        except msgspec.MsgspecError as error:
            log.error("%s/%s cannot be read: ids continue after the records (%s)", self._directory, COUNTERS, error)
            return {}

    def load(self) -> Contents:
        """All that is there. A file that cannot be read is named in the log and left alone."""
        for collection in records.RECORD_TYPES:
            self._discard_unfinished(f"{self._directory}/{collection}")
        contents = peek(self._directory)
        for path in contents.unread:
            log.error("%s is no record that this version can read; what it may stand for is left alone", path)
        return contents

    @staticmethod
    def _discard_unfinished(directory: str) -> None:
        """Remove what a writer that was killed had only begun."""
        for entry in os.scandir(directory):
            if entry.is_file() and (entry.name.endswith(whole.BESIDE) or entry.stat().st_size == 0):
                os.unlink(entry)

    def _path(self, key: Key) -> str:
        return f"{self._directory}/{key.collection}/{key.id}{SUFFIX}"


def _read(collection: str, path: str) -> AnyRecord | None:
    """The record in a file; None for one of another version. Raises: msgspec.MsgspecError; OSError."""
    with open(path, "rb") as file:
        record = records.decode(collection, file.read())
    return record if record.schema == SCHEMA else None


class Contents(NamedTuple):
    """What is in a state directory: records, by collection and id, and the files that are none, or that this version
    cannot read."""

    records: list[AnyRecord]
    unread: list[str]

    def hidden(self) -> set[Key]:
        """The objects whose records cannot be read."""
        return {key for key in map(subject, self.unread) if key is not None}


def subject(path: str) -> Key | None:
    """Whose record a file is by its name."""
    directory, name = os.path.split(path)
    number = name.removesuffix(SUFFIX)
    return Key(os.path.basename(directory), int(number)) if number.isdecimal() and name != number else None


def peek(directory: str) -> Contents:
    """All that is in a state directory that a server may be writing to. A record that goes meanwhile is not there; one
    that is just being written is one that cannot be read, until the next look."""
    found, unread = [], []
    for collection in records.RECORD_TYPES:
        for path in _files(f"{directory}/{collection}"):
            with contextlib.suppress(FileNotFoundError):
                record = _peek(collection, path)
                if record is None:
                    unread.append(path)
                else:
                    found.append(record)
    return Contents(found, unread)


def _peek(collection: str, path: str) -> AnyRecord | None:
    with contextlib.suppress(msgspec.MsgspecError, IsADirectoryError):
        return _read(collection, path) if path.endswith(SUFFIX) else None
    return None


def _files(directory: str) -> list[str]:
    """What is in a directory, in order of the numbers that are the names."""
    with contextlib.suppress(FileNotFoundError):
        return [f"{directory}/{name}" for name in sorted(os.listdir(directory), key=lambda name: (len(name), name))]
    return []
