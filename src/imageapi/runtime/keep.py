"""What must outlive the supervisor, and where it works: two mount namespaces.

The *keep* is nearly empty and is pinned: a file under the supervisor's directory is its name, so that it stands when
no process is in it. The first processes' pidfds are parked in it, so that whoever comes next learns how they ended
(6.15), and the directories whose sockets systemd notifies. The supervisor itself works in a copy of its root alone:
every container's namespace begins as a copy of that, and costs the same for the first and the thousandth.

In the host's namespace there are two mounts: the keep's tmpfs, which carries our mark, and the pin in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

from imageapi.linux import pidfd
from imageapi.linux.libc import AT_EMPTY_PATH, AT_FDCWD
from imageapi.linux.mount import (
    MNT_DETACH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MOVE_MOUNT_F_EMPTY_PATH,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    OPEN_TREE_CLOEXEC,
    OPEN_TREE_CLONE,
    mount,
    mount_setattr,
    move_mount,
    open_tree,
    pivot_root,
    umount,
)
from imageapi.linux.namespaces import CLONE_NEWNS, setns, unshare
from imageapi.runtime.init import PLACE
from imageapi.runtime.layout import NOTIFY, TREES

PIDS = "/pids"
HOSTS = "/hosts"
DIRECTORIES = (PLACE, *TREES, PIDS, HOSTS)
PIN = "pin"
_SAFE = MS_NOSUID | MS_NODEV | MS_NOEXEC


class Keep:
    """The keep at `path`, a directory of the supervisor's; `mark` is its mount's source. Making one takes the calling
    process out of the host's mount namespace for good."""

    def __init__(self, path: str, mark: str) -> None:
        self._path = path
        self._host = _own_namespace()
        self._keep = self._find() or self._make(mark)
        self._own = self._enter()

    def _find(self) -> int | None:
        """Enter the keep that a supervisor before us left; None when there is none."""
        try:
            pin = os.open(f"{self._path}/{PIN}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise
        try:
            setns(pin, CLONE_NEWNS)
        except OSError:
            os.close(pin)
            return None
        _make_directories("")
        return pin

    def _make(self, mark: str) -> int:
        """A new keep, entered. What a supervisor that was killed here has left is removed first."""
        self._unpin()
        os.mkdir(self._path, 0o700)
        mount(mark, self._path, "tmpfs", _SAFE, "mode=700,size=4m")
        mount(None, self._path, None, MS_PRIVATE, None)
        _make_directories(self._path)
        os.close(os.open(f"{self._path}/{PIN}", os.O_CREAT | os.O_CLOEXEC, 0o600))
        keep = self._split_off()
        setns(self._host, CLONE_NEWNS)
        _move(open_tree(keep, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH), f"{self._path}/{PIN}")
        setns(keep, CLONE_NEWNS)
        return keep

    def _split_off(self) -> int:
        """Have the keep's tmpfs as the root of a new namespace, with nothing else in it."""
        unshare(CLONE_NEWNS)
        mount(None, "/", None, MS_REC | MS_PRIVATE, None)
        namespace = _own_namespace()
        os.chdir(self._path)
        _pivot_here()
        return namespace

    def _enter(self) -> int:
        """From the keep, go into a namespace with a copy of its root, without what is parked, and a /proc."""
        root = open_tree(AT_FDCWD, "/", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
        unshare(CLONE_NEWNS)
        move_mount(root, "", AT_FDCWD, PLACE, MOVE_MOUNT_F_EMPTY_PATH)
        os.fchdir(root)
        os.close(root)
        _pivot_here()
        _mount_proc()
        return _own_namespace()

    @staticmethod
    def is_whole() -> bool:
        """Whether nobody has removed its directories, as can be done in the host's namespace: the root's links count
        them. To be called inside."""
        return os.stat("/").st_nlink >= 2 + len(DIRECTORIES)

    @staticmethod
    def restore() -> None:
        """Make again what somebody has removed; what was mounted there in other namespaces is unmounted by that
        (mount_namespaces(7)), as what was parked is. To be called inside."""
        _make_directories("")
        if not os.path.exists("/proc/self"):
            _mount_proc()

    def outside(self) -> contextlib.AbstractContextManager[None]:
        """Be in the host's mount namespace for the while of a `with`."""
        return self._visit(self._host)

    def _inside(self) -> contextlib.AbstractContextManager[None]:
        return self._visit(self._keep)

    @contextlib.contextmanager
    def _visit(self, namespace: int) -> Iterator[None]:
        setns(namespace, CLONE_NEWNS)
        try:
            yield
        finally:
            setns(self._own, CLONE_NEWNS)

    # ---------------------------------------------------------------------------------------- first processes

    def park(self, descriptor: int, name: str) -> bool:
        """Keep a process's pidfd under `name`; whether the kernel can."""
        path = f"{PIDS}/{name}"
        with self._inside():
            try:
                os.mknod(path, 0o600)
                pidfd.park(descriptor, path)
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                return False
        return True

    def parked(self, name: str) -> int | None:
        """The pidfd kept under `name`; None when there is none."""
        with self._inside():
            try:
                found = os.open(f"{PIDS}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
        if pidfd.is_pidfd(found):
            return found
        os.close(found)
        return None

    def unpark(self, name: str) -> None:
        """Let go of what is kept under `name`; nothing kept is no error."""
        with self._inside(), contextlib.suppress(FileNotFoundError):
            with contextlib.suppress(OSError):
                umount(f"{PIDS}/{name}", MNT_DETACH)
            os.unlink(f"{PIDS}/{name}")

    def names(self) -> list[str]:
        """Under what something is kept."""
        return sorted({*os.listdir(PIDS), *os.listdir(HOSTS)})

    # ------------------------------------------------------------------------------- the sockets systemd notifies

    def listen(self, name: str) -> socket.socket:
        """The socket that a container's systemd notifies, made anew in the directory of `name`."""
        os.makedirs(f"{HOSTS}/{name}", 0o755, exist_ok=True)
        path = f"{HOSTS}/{name}/{NOTIFY}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        listener.bind(path)
        return listener

    def host_tree(self, name: str) -> int:
        """That directory as a tree to be mounted read-only in the container."""
        tree = open_tree(AT_FDCWD, f"{HOSTS}/{name}", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
        mount_setattr(tree, "", set=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)
        return tree

    def drop_host(self, name: str) -> None:
        """Remove the directory of `name`; one that is gone is no error."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{HOSTS}/{name}/{NOTIFY}")
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(f"{HOSTS}/{name}")

    # ------------------------------------------------------------------------------------------------- the end

    def remove(self) -> None:
        """Unpin the keep: it goes with its last process. This process is in the host's namespace afterwards."""
        setns(self._host, CLONE_NEWNS)
        self._unpin()

    def _unpin(self) -> None:
        """Take the keep's mounts away, in the host's namespace, and its directory."""
        for path in (f"{self._path}/{PIN}", self._path):
            with contextlib.suppress(FileNotFoundError):
                _umount_all(path)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self._path)


def _make_directories(root: str) -> None:
    for directory in DIRECTORIES:
        os.makedirs(f"{root}{directory}", 0o700, exist_ok=True)


def _mount_proc() -> None:
    mount("proc", "/proc", "proc", _SAFE, None)


def _own_namespace() -> int:
    return os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


def _move(tree: int, path: str) -> None:
    try:
        move_mount(tree, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def _pivot_here() -> None:
    """Make the working directory, a mount, the root, and let the old one go."""
    pivot_root(".", ".")
    umount(".", MNT_DETACH)
    os.chdir("/")


def _umount_all(path: str) -> None:
    """Umount until `path` is no mountpoint (EINVAL)."""
    with contextlib.suppress(OSError):
        while True:
            umount(path, MNT_DETACH)
