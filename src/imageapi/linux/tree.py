"""Delete a directory tree that strangers filled: no symlink, mount or depth in it leads out of it."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator

from imageapi.linux.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_INSIDE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV


def remove_tree(path: str) -> None:
    """Remove the directory `path` and all in it; nothing when it does not exist. A tree of any depth takes three
    descriptors and no stack: a directory's subdirectories are first moved up to the top.

    Raises: OSError; EXDEV or EBUSY at a mount, whose content stays as it is (what was not in it may be gone).
    """
    parent = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _remove(parent, os.path.basename(path))
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(parent)


def _remove(parent: int, name: str) -> None:
    if _removed_empty(parent, name):
        return
    try:
        top = openat2(parent, name, _DIRECTORY, _INSIDE)
    except FileNotFoundError:
        return
    try:
        prefix = os.urandom(8).hex()
        fresh = (f"{prefix}.{number}" for number in itertools.count())
        while names := os.listdir(top):
            for inner in names:
                _take_away(top, inner, fresh)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent)


def _removed_empty(parent: int, name: str) -> bool:
    """Whether the directory has had nothing in it. Raises: OSError, but not for one that has, or is gone."""
    try:
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            return False
        raise
    return True


def _take_away(top: int, name: str, fresh: Iterator[str]) -> None:
    """Remove `name` from the directory `top`, its own subdirectories becoming entries of `top`."""
    try:
        os.unlink(name, dir_fd=top)
        return
    except IsADirectoryError:
        if _removed_empty(top, name):
            return
        child = openat2(top, name, _DIRECTORY, _INSIDE)
    try:
        for inner in os.listdir(child):
            _move_up_or_unlink(child, inner, top, fresh)
    finally:
        os.close(child)
    os.rmdir(name, dir_fd=top)


def _move_up_or_unlink(child: int, name: str, top: int, fresh: Iterator[str]) -> None:
    try:
        os.unlink(name, dir_fd=child)
    except IsADirectoryError:
        os.rename(name, next(fresh), src_dir_fd=child, dst_dir_fd=top)
