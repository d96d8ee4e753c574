"""What is done to make a root a container's: each step is a value that can say what it does before it does it.

A step is carried out by the container's own first process, in the image, where no path leads to the host; or, if it
owes nothing to the image, in that process's first root, before there is one (layout.TREES).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from imageapi.errors import Invalid
from imageapi.linux.libc import AT_FDCWD, AT_RECURSIVE
from imageapi.linux.mount import (
    MNT_DETACH,
    MOVE_MOUNT_F_EMPTY_PATH,
    MOVE_MOUNT_T_SYMLINKS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REMOUNT,
    OPEN_TREE_CLOEXEC,
    OPEN_TREE_CLONE,
    mount,
    move_mount,
    open_tree,
    umount,
)


class FileSystem(NamedTuple):
    """A new file system of the kernel's. `ours`: the mountpoint is in one of those, and is made. `optional`: an image
    that neither has the mountpoint nor can take it goes without."""

    path: str
    fstype: str
    flags: int = MS_NOSUID | MS_NODEV
    options: str | None = None
    ours: bool = False
    optional: bool = False

    def describe(self) -> str:
        return f"mounting {self.path}"

    def execute(self) -> None:
        if self.ours:
            os.mkdir(self.path, 0o755)
        _attach(self.path, partial(mount, self.fstype, self.path, self.fstype, self.flags, self.options), self.optional)


class Node(NamedTuple):
    """A character device everybody may read and write."""

    path: str
    major: int
    minor: int
    told: bool = True

    def describe(self) -> str:
        return f"making device file {self.path}" if self.told else ""

    def execute(self) -> None:
        os.mknod(self.path, stat.S_IFCHR | 0o666, os.makedev(self.major, self.minor))


class Link(NamedTuple):
    """A symbolic link."""

    path: str
    target: str

    def describe(self) -> str:
        return f"creating symlink {self.target} -> {self.path}"

    def execute(self) -> None:
        os.symlink(self.target, self.path)


class ReadOnly(NamedTuple):
    """A directory that cannot be written through from here on."""

    path: str

    def describe(self) -> str:
        return ""

    def execute(self) -> None:
        mount(self.path, self.path, None, MS_BIND, None)
        flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
        mount(None, self.path, None, flags, None)


class Tree(NamedTuple):
    """A tree that was made elsewhere: its descriptor is closed."""

    path: str
    descriptor: int

    def describe(self) -> str:
        return ""

    def execute(self) -> None:
        flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_SYMLINKS
        _attach(self.path, partial(move_mount, self.descriptor, "", AT_FDCWD, self.path, flags))
        os.close(self.descriptor)


Step = FileSystem | Node | Link | ReadOnly | Tree
"""`describe` gives the line of the log, or "" where it has none; `execute` raises OSError or errors.Problem."""


def take(path: str) -> int:
    """The tree at `path`, as a descriptor for a Tree; it is mounted nowhere then."""
    tree = open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE)
    umount(path, MNT_DETACH)
    return tree


def _attach(path: str, mount: Callable[[], None], optional: bool = False) -> None:
    """Mount on a directory of the image, which is made if the image has none and can take it; an `optional` one is
    left out otherwise.

    Raises: errors.Invalid, when it has not and must, or has something else there.
    """
    try:
        mount()
    except FileNotFoundError:
        if _make_mountpoint(path, optional):
            mount()
    except OSError:
        if os.path.isdir(path):
            raise
        raise Invalid(f"{path} in the image is no directory; make it one in the image") from None


def _make_mountpoint(path: str, optional: bool) -> bool:
    """Whether the image has taken a directory there."""
    try:
        os.makedirs(path, 0o755)
    except OSError as error:
        if optional:
            return False
        raise Invalid(_remedy(path, error)) from None
    return True


def _remedy(path: str, error: OSError) -> str:
    if error.errno == errno.EROFS:
        return (
            f"the image has no directory {path} and is read-only; run the container on an overlay over it, or make the "
            f"directory in the image"
        )
    if isinstance(error, FileExistsError):
        return f"{path} in the image is a symbolic link that leads nowhere; make it a directory"
    return f"the image has no directory {path}, and it cannot be made: {error.strerror}"
