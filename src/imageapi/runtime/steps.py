"""What is done to make a root a container's: each step is a value that can say what it does before it does it.

A step is carried out by the container's own first process, inside its new root, where no path leads to the host.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import NamedTuple

from imageapi.errors import Invalid
from imageapi.linux.libc import AT_FDCWD
from imageapi.linux.mount import (
    MOVE_MOUNT_F_EMPTY_PATH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REMOUNT,
    mount,
    move_mount,
)


class FileSystem(NamedTuple):
    """A new file system of the kernel's. `ours`: the mountpoint is in one of those, and is made. `optional`: an image
    that neither has the mountpoint nor can take it goes without."""

    target: str
    fstype: str
    flags: int = MS_NOSUID | MS_NODEV
    options: str | None = None
    ours: bool = False
    optional: bool = False

    def describe(self) -> str:
        return f"mounting {self.target}"

    def execute(self) -> None:
        if self.ours:
            os.mkdir(self.target, 0o755)
        try:
            self._mount()
        except FileNotFoundError:
            if self._make_mountpoint():
                self._mount()
        except NotADirectoryError:
            raise Invalid(f"{self.target} in the image is no directory; make it one in the image") from None

    def _mount(self) -> None:
        mount(self.fstype, self.target, self.fstype, self.flags, self.options)

    def _make_mountpoint(self) -> bool:
        """Whether the image has taken a directory at the target.

        Raises: errors.Invalid, when it has not and must.
        """
        try:
            os.makedirs(self.target, 0o755)
        except OSError as error:
            if self.optional:
                return False
            raise Invalid(self._remedy(error)) from None
        return True

    def _remedy(self, error: OSError) -> str:
        if error.errno == errno.EROFS:
            return (
                f"the image has no directory {self.target} and is read-only; run the container on an overlay over it, "
                f"or make the directory in the image"
            )
        if isinstance(error, FileExistsError):
            return f"{self.target} in the image is a symbolic link that leads nowhere; make it a directory"
        return f"the image has no directory {self.target}, and it cannot be made: {error.strerror}"


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
    """A tree that was handed in as a descriptor, which is closed."""

    path: str
    descriptor: int

    def describe(self) -> str:
        return ""

    def execute(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, 0o755)
        move_mount(self.descriptor, "", AT_FDCWD, self.path, MOVE_MOUNT_F_EMPTY_PATH)
        os.close(self.descriptor)


Step = FileSystem | Node | Link | ReadOnly | Tree
"""`describe` gives the line of the log, or "" where it has none; `execute` raises OSError or errors.Problem."""
