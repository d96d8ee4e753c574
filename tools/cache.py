"""What takes long to make is made once, and kept in the user's cache: each thing whole or not at all.

A thing is a file or a directory, its name ends in a hash of what it is made of. Whoever asks for one holds it as long
as its process lives. Of each name the few that were asked for last are kept, for some days; others, which nobody holds,
are removed when one of that name is asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

KEPT = 6
"""Of one name: several checkouts, each with another recipe, may take turns on a machine."""
DAYS = 3
"""That one is kept which nobody asks for."""
NOTE = ".used"
"""The end of the name of the file whose time is when a thing was last asked for, and on which whoever uses it has a
lock. (The thing's own time must stay: a file that changes under its readers is seen.)"""

_held: dict[Path, int] = {}


def directory() -> Path:
    """Where they are. It may be deleted whenever nothing runs that uses it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imageapi"


def made_once(name: str, suffix: str, made_of: str, make: Callable[[Path], None]) -> Path:
    """What `make` has made of `made_of`, now or before. It gets the path of the file or directory it shall make, beside
    which it may leave others. Of two who want it at once the second waits for the first.
    """
    recipe = hashlib.sha256(f"{made_of} {platform.machine()}".encode()).hexdigest()
    path = directory() / f"{name}-{recipe[:12]}.{suffix}"
    with _lock(directory() / f"{name}.lock"):
        if not path.exists():
            with _scratch() as scratch:
                make(unfinished := Path(scratch) / path.name)
                unfinished.rename(path)
        _hold(path)
        _prune(name, suffix)
    return path


def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=directory(), prefix="making-")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hold(path: Path) -> None:
    """Note that it was asked for, and keep it from being removed by others until this process ends."""
    if path not in _held:
        _held[path] = os.open(_note(path), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(_held[path], fcntl.LOCK_SH)
    os.utime(_held[path])


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}{NOTE}")


def _prune(name: str, suffix: str) -> None:
    """Under the lock of the name. Nothing of ours is removed: we hold it."""
    used = sorted(((_last_used(path), path) for path in directory().glob(f"{name}-*.{suffix}")), reverse=True)
    for place, (when, path) in enumerate(used):
        if place >= KEPT or when < time.time() - DAYS * 86400:
            _remove_unless_held(path)


def _last_used(path: Path) -> float:
    note = _note(path)
    return (note if note.exists() else path).stat().st_mtime


def _remove_unless_held(path: Path) -> None:
    """It goes from its place at once: nobody finds half of it."""
    with _note(path).open("a") as note, contextlib.suppress(BlockingIOError):
        fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with _scratch() as scratch:
            path.rename(Path(scratch) / path.name)
        _note(path).unlink()
