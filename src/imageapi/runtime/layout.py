"""What every container finds in its root, and what systemd finds besides: tables, carried out in their order.

What owes nothing to the image is made before there is one, by the child in waiting (TREES); at the start these trees
are only put in their places. The log tells of each step in the order of the table all the same.

For systemd see its CONTAINER_INTERFACE: a writable /proc/sys or /sys would let it set the host's own, and without a
cgroup2 of its own it makes hierarchies on the host.
"""

from __future__ import annotations

from imageapi.linux.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_STRICTATIME
from imageapi.runtime.steps import FileSystem, Link, Node, ReadOnly, Step

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOST = "/run/host"
"""Where a container manager shows itself to systemd."""
NOTIFY = "notify"
"""The name in it of the socket for sd_notify(3)."""

_KERNEL = MS_NOSUID | MS_NODEV | MS_NOEXEC
_TERMINALS = "newinstance,ptmxmode=0666,mode=0620,gid=5"

TREES = ("/proc", "/dev", "/sys")
"""What is made ahead, with all that a table has below them: it is the same whatever the image."""

FILE_SYSTEMS: tuple[Step, ...] = (
    FileSystem("/proc", "proc", _KERNEL),
    FileSystem("/dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755"),
    FileSystem("/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777", ours=True),
    FileSystem("/dev/mqueue", "mqueue", _KERNEL, ours=True),
    FileSystem("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, _TERMINALS, ours=True),
)
NODES: tuple[Step, ...] = (
    Node("/dev/null", 1, 3),
    Node("/dev/zero", 1, 5),
    Node("/dev/full", 1, 7),
    Node("/dev/tty", 5, 0),
    Node("/dev/random", 1, 8),
    Node("/dev/urandom", 1, 9),
)
LINKS: tuple[Step, ...] = (
    Link("/dev/ptmx", "/dev/pts/ptmx"),
    Link("/dev/fd", "/proc/self/fd"),
    Link("/dev/stdin", "/proc/self/fd/0"),
    Link("/dev/stdout", "/proc/self/fd/1"),
    Link("/dev/stderr", "/proc/self/fd/2"),
)
PLAIN: tuple[Step, ...] = (
    *FILE_SYSTEMS,
    FileSystem("/sys", "sysfs", _KERNEL),
    *NODES,
    *LINKS,
)
SYSTEMD: tuple[Step, ...] = (
    *FILE_SYSTEMS,
    ReadOnly("/proc/sys"),
    FileSystem("/sys", "sysfs", _KERNEL | MS_RDONLY),
    FileSystem("/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"),
    FileSystem("/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    FileSystem("/sys/fs/cgroup", "cgroup2", _KERNEL),
    FileSystem("/var/lib/journal", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755", optional=True),
    *NODES,
    Node("/dev/console", 1, 3, told=False),
    *LINKS,
)
"""The console is the null device: systemd takes 43 s to halt when it is a terminal whose other end is gone."""


def is_ahead(step: Step) -> bool:
    """Whether a step is part of one of the TREES."""
    return step.path.startswith(TREES)


def environment(*, systemd: bool, uuid: str) -> dict[str, str]:
    """All that a container gets of its environment; `uuid` is its own."""
    if not systemd:
        return {"PATH": PATH}
    return {
        "PATH": PATH,
        "container": "imageapi",
        "container_uuid": uuid,
        "NOTIFY_SOCKET": f"{HOST}/{NOTIFY}",
    }
