"""What of containers is there without being needed, as anybody can see who is not their supervisor. A supervisor that
starts clears all of it away, but for processes of which it has no entry.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from imageapi.config import Site
from imageapi.linux import mountinfo, pidfd
from imageapi.linux.namespaces import CLONE_NEWNS, setns
from imageapi.records import Key
from imageapi.runtime import entries, output
from imageapi.runtime.entries import Entry
from imageapi.runtime.groups import name_of
from imageapi.runtime.keep import HOSTS, PIDS, PIN

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of <fcntl.h>: type, whence, start, length, and who holds it."""


class Leftover(NamedTuple):
    """One such thing: a clause, and the commands that take it away. `of` is the object it would be of if there were a
    record of it."""

    what: str
    remedy: str
    of: Key | None = None


class Scene(NamedTuple):
    """What is known before anything is looked for: the site, the objects there are records of, the entries of lives
    that go on, and the supervisor's pid (None: there is none)."""

    site: Site
    keys: Collection[Key]
    living: list[Entry]
    supervisor: int | None

    @property
    def names(self) -> set[str]:
        return {entry.name for entry in self.living}


def scene(site: Site, boot_id: str, keys: Collection[Key]) -> Scene:
    """Raises: OSError."""
    noted = entries.peek(site.supervisor_dir, boot_id)
    living = [entry for entry in noted if entry.life.running and pidfd.start_time(entry.life.pid) == entry.born]
    return Scene(site, keys, living, supervisor(site))


def supervisor(site: Site) -> int | None:
    """The pid of the site's supervisor: who holds its lock (F_GETLK of fcntl(2))."""
    try:
        lock = os.open(f"{site.supervisor_dir}/lock", os.O_RDONLY | os.O_CLOEXEC)  # where it can only be read, too
    except FileNotFoundError:
        return None
    try:
        kind, *_, pid = _FLOCK.unpack(fcntl.fcntl(lock, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0)))
        return None if kind == fcntl.F_UNLCK else int(pid)
    finally:
        os.close(lock)


def lives(seen: Scene) -> Iterator[Leftover]:
    """First processes without a record, and some that nobody watches."""
    for entry in seen.living:
        key, pid = Key("container", entry.life.id), entry.life.pid
        if key not in seen.keys:
            yield Leftover(f"process {pid} of {key} has no record", f"kill -9 {pid}", key)
        elif seen.supervisor is None:
            yield Leftover(f"process {pid} of {key} is watched by no supervisor", "start imageapi-server")


def fifos(seen: Scene) -> Iterator[Leftover]:
    """Those of no life, and not of the supervisor's child in waiting."""
    for name in _fifos(seen.site):
        if name not in seen.names and not _is_open(seen, name):
            path = f"{seen.site.supervisor_dir}/{name}{output.SUFFIX}"
            yield Leftover(f"the FIFO {path} is of no container", f"rm {path}")


def _fifos(site: Site) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        files = (file.removesuffix(output.SUFFIX) for file in os.listdir(site.supervisor_dir) if _is_fifo(file))
        return sorted(files)
    return []


def _is_fifo(file: str) -> bool:
    return file.endswith(output.SUFFIX)


def _is_open(seen: Scene, name: str) -> bool:
    """Whether the supervisor has the FIFO open: it is of a child that has no entry yet."""
    if seen.supervisor is None:
        return False
    directory = f"/proc/{seen.supervisor}/fd"
    with contextlib.suppress(FileNotFoundError):
        wanted = os.stat(f"{seen.site.supervisor_dir}/{name}{output.SUFFIX}")
        for number in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(f"{directory}/{number}"), wanted):
                    return True
    return False


def keep(seen: Scene) -> Iterator[Leftover]:
    """The keep without a supervisor and without anything in it; what is in it for nobody. To be called in a process of
    its own, which goes into the keep."""
    path = f"{seen.site.supervisor_dir}/keep"
    if mountinfo.at(path) is None:
        return
    if seen.supervisor is None and not seen.living:
        remedy = f"umount {path}/{PIN}; umount {path}; rmdir {path}"
        yield Leftover(f"{path} is mounted, and there is no supervisor", remedy)
        return
    needed = {*seen.names, *(name for name in _fifos(seen.site) if _is_open(seen, name))}
    for name in _kept(f"{path}/{PIN}"):
        if name not in needed:
            remedy = f"kill {seen.supervisor}" if seen.supervisor else "start imageapi-server"
            yield Leftover(f"{name} in {path} is of no container", f"{remedy} (the next supervisor clears it away)")


def _kept(pin: str) -> list[str]:
    try:
        namespace = os.open(pin, os.O_RDONLY | os.O_CLOEXEC)
        setns(namespace, CLONE_NEWNS)
        os.close(namespace)
        return sorted({*os.listdir(PIDS), *os.listdir(HOSTS)})
    except OSError:
        return []


def groups(seen: Scene) -> Iterator[Leftover]:
    """Control groups of no life, wherever they are."""
    used = {group for entry in seen.living for group in entry.groups}
    beginning = name_of(seen.site.mark_prefix)
    for mount in mountinfo.read(mention="cgroup"):
        if mount.fstype in ("cgroup", "cgroup2"):
            for path in _groups(mount.mountpoint, beginning):
                if path not in used:
                    yield Leftover(f"the control group {path} is of no container", f"rmdir {path}")


def _groups(top: str, beginning: str) -> Iterator[str]:
    """Those whose name begins so, without what is in them."""
    for directory, names, _ in os.walk(top):
        ours = [name for name in names if name.startswith(beginning)]
        yield from (f"{directory}/{name}" for name in ours)
        names[:] = [name for name in names if name not in ours]


def processes(seen: Scene) -> Iterator[Leftover]:
    """Processes of no life whose root is one of our mounts, if that has no record either."""
    beginning = f"{seen.site.mark_prefix}mount/"
    known = {_namespace(entry.life.pid) for entry in seen.living}
    for pid in mountinfo.namespaces_where(lambda each: _is_root(each, beginning), mention=beginning):
        for key in _roots(pid, beginning):
            if key not in seen.keys and _namespace(pid) not in known:
                yield Leftover(f"process {pid} has {key} as its root, which has no record", f"kill -9 {pid}", key)


def _is_root(mount: mountinfo.Mount, beginning: str) -> bool:
    return mount.mountpoint == "/" and mount.source.startswith(beginning)


def _roots(pid: int, beginning: str) -> list[Key]:
    with contextlib.suppress(OSError):
        roots = [each for each in mountinfo.read(pid, beginning) if _is_root(each, beginning)]
        return [Key("mount", int(each.source.removeprefix(beginning))) for each in roots]
    return []


def _namespace(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/mnt")
    return ""


SEARCHES: dict[str, Callable[[Scene], Iterator[Leftover]]] = {
    "the containers": lives,
    "the containers' output": fifos,
    "the supervisor's keep": keep,
    "the control groups": groups,
    "the mount namespaces": processes,
}
"""By what is looked through."""
