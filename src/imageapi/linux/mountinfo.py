"""What is mounted where: /proc/<pid>/mountinfo (proc_pid_mountinfo(5)), which never touches a file system."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

_OCTAL = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One mount. `dev` is "major:minor" of its st_dev, `root` the directory of that file system which is seen, and
    `tags` its propagation: `shared:N`, `master:N`, `unbindable`; none for a private one."""

    id: int
    parent: int
    dev: str
    root: str
    mountpoint: str
    options: str
    tags: tuple[str, ...]
    fstype: str
    source: str
    super_options: str

    @property
    def read_only(self) -> bool:
        """Whether the mount itself is read-only, whatever its file system is."""
        return "ro" in self.options.split(",")


def _text(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))


def _parse(line: bytes) -> Mount:
    fields = line.split(b" ")
    dash = fields.index(b"-", 6)
    dev, root, mountpoint, options = map(_text, fields[2:6])
    tags = tuple(map(_text, fields[6:dash]))
    fstype, source, super_options = map(_text, fields[dash + 1 : dash + 4])
    return Mount(int(fields[0]), int(fields[1]), dev, root, mountpoint, options, tags, fstype, source, super_options)


_ESCAPED = " \t\n\\#"
"""What the kernel writes as octal, "#" only in some of the fields."""


def read(pid: int | str = "self", mention: str = "") -> list[Mount]:
    """The mounts that `pid` sees; of a host with a thousand, those alone whose line holds `mention` are taken apart
    (more, where the kernel may have written that otherwise). Raises: OSError when the process is gone."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        lines = file.read().split(b"\n")[:-1]  # a path may hold what else divides lines
    wanted = b"" if any(letter in mention for letter in _ESCAPED) else os.fsencode(mention)
    return [_parse(line) for line in lines if wanted in line]


def place(path: str) -> str:
    """`path` as mountinfo spells it. Only its parent is resolved: looking at what is mounted there might hang."""
    parent, name = os.path.split(path.rstrip("/"))
    return os.path.join(os.path.realpath(parent), name)


def stack(path: str, mounts: Iterable[Mount] | None = None) -> list[Mount]:
    """The mounts at exactly `path`, lowest first."""
    spot = place(path)
    known = read(mention=spot) if mounts is None else mounts
    return stacked(mount for mount in known if mount.mountpoint == spot)


def stacked(mounts: Iterable[Mount]) -> list[Mount]:
    """All mounts of one mountpoint, lowest first."""
    here = {mount.id: mount for mount in mounts}
    above = {mount.parent: mount for mount in here.values()}
    lowest = next((mount for mount in here.values() if mount.parent not in here), None)
    found = []
    while lowest is not None:
        found.append(lowest)
        lowest = above.get(lowest.id)
    return found


def at(path: str, mounts: list[Mount] | None = None) -> Mount | None:
    """The topmost mount at exactly `path`: the one umount(2) would take."""
    return next(reversed(stack(path, mounts)), None)


def below(path: str, mounts: list[Mount] | None = None) -> list[Mount]:
    """The mounts inside `path`, not at it, the deepest first: the order in which they can be unmounted."""
    inside = f"{place(path)}/"
    known = read(mention=inside) if mounts is None else mounts
    found = [mount for mount in known if mount.mountpoint.startswith(inside)]
    return sorted(found, key=lambda mount: mount.mountpoint.count("/"), reverse=True)


def beside(path: str, mounts: list[Mount] | None = None) -> list[Mount]:
    """The mounts that stay when the lowest one at `path` is unmounted: all but itself, and its likes on the same
    directory of a peer or a slave of the mount that it is on (mount_namespaces(7)), where the kernel has put them."""
    known = read() if mounts is None else mounts
    by_id = {mount.id: mount for mount in known}
    lowest = next(iter(stack(path, known)), None)
    if lowest is None:
        return known
    return [each for each in known if each is not lowest and not _goes_with(lowest, each, by_id)]


def _goes_with(one: Mount, other: Mount, by_id: dict[int, Mount]) -> bool:
    below, others_below = by_id.get(one.parent), by_id.get(other.parent)
    if below is None or others_below is None or _within(one, below) != _within(other, others_below):
        return False
    heard = {tag.partition(":")[2] for tag in others_below.tags if tag.startswith(("shared:", "master:"))}
    return any(f"shared:{group}" in below.tags for group in heard)


def _within(mount: Mount, below: Mount) -> tuple[str, str]:
    """The directory of a file system that a mount is on."""
    return below.dev, os.path.normpath(f"{below.root}/{os.path.relpath(mount.mountpoint, below.mountpoint)}")


def holding(path: str, mounts: list[Mount]) -> Mount:
    """The mount that `path`, which goes over no symbolic link, is on. Raises: ValueError, where there is none."""
    above = (each for each in mounts if f"{path}/".startswith(f"{each.mountpoint.rstrip('/')}/"))
    return max(above, key=lambda each: len(each.mountpoint))


def _namespaces() -> Iterator[int]:
    """One process of every mount namespace but our own."""
    seen = {os.readlink("/proc/self/ns/mnt")}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended, or is a zombie and has no namespace
            namespace = os.readlink(f"/proc/{name}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                yield int(name)


def namespaces_where(wanted: Callable[[Mount], bool], mention: str = "") -> list[int]:
    """One process of every other mount namespace that has such a mount; `mention` as in `read`."""
    found = []
    for pid in _namespaces():
        with contextlib.suppress(OSError):
            if any(map(wanted, read(pid, mention))):
                found.append(pid)
    return found


def holders(dev: str) -> list[int]:
    """One process of every other mount namespace that still has a mount of the st_dev `dev` ("7:3"): umount and
    LOOP_CLR_FD both succeed while it does, and the file system stays up. A detached tree is not seen."""
    return namespaces_where(lambda mount: mount.dev == dev, mention=dev)
