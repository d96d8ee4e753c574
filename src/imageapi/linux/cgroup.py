"""Control groups, of both versions and of hosts that mix them (cgroups(7)).

Groups are made, entered and removed through the descriptor of a hierarchy's directory, so that it can be done where
the hierarchy is not mounted.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from imageapi.linux import mountinfo

CGROUP2 = ""
"""The `controllers` of the version 2 hierarchy."""


class Hierarchy(NamedTuple):
    """A mounted hierarchy: `controllers` as /proc/self/cgroup names it ("" is version 2), and the directory of the
    group this process is in."""

    controllers: str
    directory: str

    @property
    def is_v2(self) -> bool:
        return self.controllers == CGROUP2


def hierarchies() -> list[Hierarchy]:
    """The hierarchies that are mounted where this process can see its own group."""
    found: dict[str, Hierarchy] = {}
    groups = own_groups()
    for mount in mountinfo.read():
        for controllers, path in groups.items():
            if _is_of(mount, controllers) and _inside(path, mount.root):
                found.setdefault(controllers, Hierarchy(controllers, _directory(mount, path)))
    return list(found.values())


def own_groups(pid: int | str = "self") -> dict[str, str]:
    """The group of a process in each hierarchy, by the controllers that /proc names the hierarchy by."""
    with open(f"/proc/{pid}/cgroup") as file:
        lines = (line.rstrip("\n").split(":", 2) for line in file)
        return {controllers: path for _, controllers, path in lines}


def freezer() -> str | None:
    """Where the version 1 freezer is mounted from its root; None on a host without."""
    return next((one.mountpoint for one in mountinfo.read() if one.root == "/" and _is_of(one, "freezer")), None)


def _is_of(mount: mountinfo.Mount, controllers: str) -> bool:
    if controllers == CGROUP2:
        return mount.fstype == "cgroup2"
    return mount.fstype == "cgroup" and set(controllers.split(",")) <= set(mount.super_options.split(","))


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _directory(mount: mountinfo.Mount, path: str) -> str:
    return os.path.normpath(os.path.join(mount.mountpoint, os.path.relpath(path, mount.root)))


# ------------------------------------------------------------------------------------------------ groups


def make(directory: int, name: str) -> None:
    """Make the group `name` in `directory`; one that is there is taken. A new cpuset of version 1 gets its parent's
    processors and memory nodes: it takes no process without."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=directory)
    if _has(directory, "tasks") and _has(directory, "cpuset.cpus"):  # version 2 has no tasks, and inherits by itself
        for file in ("cpuset.cpus", "cpuset.mems"):
            write(directory, f"{name}/{file}", read(directory, file).strip())


def enter(directory: int, name: str) -> None:
    """Move this process into the group. It takes an RCU grace period: some milliseconds on an idle host."""
    write(directory, f"{name}/cgroup.procs", "0")


def remove(directory: int, name: str) -> bool:
    """Remove the group and all below it; whether it is gone. A group stays busy until its last process is reaped."""
    try:
        for child in _children(directory, name):
            remove(directory, f"{name}/{child}")
        os.rmdir(name, dir_fd=directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def kill(directory: int, name: str) -> None:
    """SIGKILL for every process in the group and below it (version 2, 5.14)."""
    with contextlib.suppress(FileNotFoundError):
        write(directory, f"{name}/cgroup.kill", "1")


def thaw(directory: int, name: str) -> None:
    """Let go on what a version 1 freezer stopped: not even SIGKILL ends a process in it."""
    with contextlib.suppress(FileNotFoundError):
        write(directory, f"{name}/freezer.state", "THAWED")


def groups(directory: int) -> list[str]:
    """The names of the groups in `directory`."""
    return list(_children(directory, "."))


def _children(directory: int, name: str) -> Iterator[str]:
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        with os.scandir(descriptor) as entries:
            yield from [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    finally:
        os.close(descriptor)


def read(directory: int, path: str) -> str:
    """A control file's content."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(descriptor, 65536).decode()
    finally:
        os.close(descriptor)


def write(directory: int, path: str, text: str) -> None:
    """Write a control file, in one write(2)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _has(directory: int, path: str) -> bool:
    try:
        os.stat(path, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True
