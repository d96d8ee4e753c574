"""qemu-storage-daemon as a helper: an image that QEMU can read becomes a regular file, through FUSE.

    helpers/attach-3/daemon   -> ../daemon-<group>-0    written first: whatever a crash leaves is found by it
    helpers/attach-3/export                             the file; the FUSE mount lies on it
    helpers/daemon-<group>-0/{qmp,pid}                  one daemon: at most `LIMIT` images of one group

A daemon runs detached and outlives whoever started it. All that is known of it is in these files and in itself, so any
process can take over. Its directory is its lock (flock(2)): who talks to it, or ends it, holds that. A group is one
store seen by one user: a store that hangs stops its own images only. A daemon ends with its last image.

A daemon lives in the mount namespace of whoever starts it, which has to be the host's.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from imageapi.config import Site
from imageapi.drivers.qmp import Deadline, Qmp, QmpError, conversation, descriptor, listens
from imageapi.errors import Conflict, Problem, Unsupported
from imageapi.linux import mount, mountinfo, process, scope
from imageapi.linux.tree import remove_tree
from imageapi.records import Key
from imageapi.spec import COLLECTIONS, Secret

PROGRAM = "qemu-storage-daemon"
PACKAGES = "qemu-storage-daemon and its block drivers (on Debian: qemu-system-common and qemu-block-extra)"
FUSE = "/dev/fuse"
LIMIT = 20
"""The most images of one daemon: its crash takes no more than these."""

QUIT_TIMEOUT = 2.0
"""Seconds for a daemon without images to end by itself; then it is killed."""

GREETING_TIMEOUT = 5.0
"""Seconds after which a daemon that nobody else talks to, and that does not greet, hangs."""

SECRET_ID = "key"
"""Under which a daemon has a secret while it opens an image. One at a time: the daemon is locked."""


class Source(NamedTuple):
    """What a daemon is to open: the arguments of `blockdev-add`, the secret (in base64) that they need under the name
    `secret_argument`, and the text of the files they name by `private_path`."""

    group: str
    blockdev: dict[str, Any]
    secret: Secret | None
    files: Mapping[str, str]
    read_only: bool
    secret_argument: str = "key-secret"


def missing() -> str | None:
    """What keeps a daemon from being used here, and the remedy. Its block drivers are seen only when they are used."""
    if process.find_program(PROGRAM) is None:
        return f"install {PACKAGES}"
    if not os.path.exists(FUSE):
        return f"there is no {FUSE}; load the module fuse"
    return None


# ---------------------------------------------------------------------------------------------- the verbs


def export(site: Site, key: Key, source: Source, deadline: Deadline) -> str:
    """Make the image a file and return its path. Leaves nothing when it fails, unless its daemon hangs and serves
    others too: then `withdraw` has to be called until it succeeds.

    Raises: QmpError in QEMU's words; TimeoutError; ConnectionError when the daemon ended; errors.Unsupported without
    the program.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(_give_up, site, key)
        with _joined(site, key, source.group, deadline) as daemon:
            daemon.ensure_running(deadline)
            _write_files(site, key, source)
            with daemon.conversation(deadline) as qmp:
                _open(qmp, _node(site, key), export_path(site, key), source)
        undo.pop_all()
    return export_path(site, key)


def _give_up(site: Site, key: Key) -> None:
    with contextlib.suppress(TimeoutError, ConnectionError):
        withdraw(site, key, Deadline(QUIT_TIMEOUT), expendable=True)


def settle(site: Site, key: Key, deadline: Deadline, *, expendable: bool) -> None:
    """See that whoever looks at the image's file now gets an answer, if only an error: its daemon answers, or is dead.
    One that hangs is killed when it serves this image alone and the image is `expendable`: nothing written is lost.

    Raises: TimeoutError when it hangs and may not be killed.
    """
    name = _daemon_of(site, key)
    if name is None:
        return
    with _locked(site, name, deadline) as daemon, _killing(daemon, key, expendable=expendable):
        daemon.greet(Deadline(GREETING_TIMEOUT))


def withdraw(site: Site, key: Key, deadline: Deadline, *, expendable: bool) -> None:
    """Undo `export`, or what a crash left of it; a second time it does nothing. `expendable` is as for `settle`.

    Raises: errors.Conflict while something still uses the file; TimeoutError when the daemon hangs.
    """
    name = _daemon_of(site, key)
    if name is None:
        _unmount_export(site, key)
        _remove_directory(site, key)
        return
    with _locked(site, name, deadline) as daemon:
        with _killing(daemon, key, expendable=expendable):
            daemon.close(_node(site, key), deadline)
        _leave(site, key, daemon)


@contextlib.contextmanager
def _killing(daemon: Daemon, key: Key, *, expendable: bool) -> Iterator[None]:
    """What is asked within has a deadline. A daemon that misses it is killed if that costs nobody anything."""
    try:
        yield
    except TimeoutError:
        if not expendable or daemon.members() != [_directory(key)]:
            raise
        daemon.kill()


def known(site: Site, key: Key) -> bool:
    """Whether anything of an export may be there."""
    return os.path.isdir(f"{site.helpers_dir}/{_directory(key)}")


def process_of(site: Site, key: Key) -> int | None:
    """The pid of the daemon that has the image open; None when there is none, or it has ended."""
    name = _daemon_of(site, key)
    return None if name is None else Daemon(site, name, -1).pid()


def exports(site: Site) -> list[Key]:
    """Every object of which an export, or a part of one, may be there."""
    names = (name.rpartition("-") for name in os.listdir(site.helpers_dir))
    return [Key(collection, int(number)) for collection, _, number in names if collection in COLLECTIONS]


def standing(site: Site, key: Key) -> bool:
    """Whether the image's file stands and its daemon lives."""
    name = _daemon_of(site, key)
    if name is None or mountinfo.at(export_path(site, key)) is None:
        return False
    try:
        directory = descriptor(f"{site.helpers_dir}/{name}")
    except FileNotFoundError:
        return False
    try:
        return listens(directory, "qmp")
    finally:
        os.close(directory)


def export_path(site: Site, key: Key) -> str:
    """Where the image of `key` is a file."""
    return private_path(site, key, "export")


def private_path(site: Site, key: Key, name: str) -> str:
    """Where the file `name` of `Source.files` is for the daemon to read."""
    return f"{site.helpers_dir}/{_directory(key)}/{name}"


# --------------------------------------------------------------------------------------------- one daemon


class Daemon:
    """A daemon whose lock is held. It may be running, not yet running, or dead."""

    def __init__(self, site: Site, name: str, directory: int) -> None:
        self._site = site
        self._name = name
        self._directory = directory
        self.path = f"{site.helpers_dir}/{name}"

    def members(self) -> list[str]:
        """The directories of the images it serves, those included that are only on the way."""
        helpers = self._site.helpers_dir
        return [entry for entry in os.listdir(helpers) if _link(f"{helpers}/{entry}") == self._name]

    def conversation(self, deadline: Deadline) -> contextlib.AbstractContextManager[Qmp]:
        """Talk to it."""
        return conversation(self._directory, "qmp", deadline)

    def ensure_running(self, deadline: Deadline) -> None:
        """Start it, unless it runs.

        Raises: errors.Unsupported, errors.Problem, TimeoutError.
        """
        if listens(self._directory, "qmp"):
            return
        self.kill()
        for name in ("qmp", "pid"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._directory)
        self._start(deadline)

    def _start(self, deadline: Deadline) -> None:
        chardev = "socket,path=qmp,server=on,wait=off,id=qmp"
        command = [PROGRAM, "--daemonize", *self._identity, "--chardev", chardev, "--monitor", "chardev=qmp"]
        environment = {"PATH": os.environ.get("PATH", os.defpath)}
        try:
            done = subprocess.run(
                command,
                cwd=self.path,
                env=environment,
                umask=0o077,
                timeout=deadline.left(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError:
            raise Unsupported(f"this host has no {PROGRAM}: install {PACKAGES}") from None
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{PROGRAM} did not start in time") from None
        if done.returncode:
            raise Problem(f"{PROGRAM} did not start", step="start the storage daemon", detail=done.stderr.strip())
        with contextlib.suppress(OSError):  # it stays in the unit of the server, whose KillMode= spares it
            scope.join(self._site.scope, self.pid() or 0)

    @property
    def _identity(self) -> tuple[str, str]:
        """The words of its command line that no other process has."""
        return "--pidfile", f"{self.path}/pid"

    def greet(self, deadline: Deadline) -> None:
        """See that it answers, if it lives.

        Raises: TimeoutError.
        """
        if listens(self._directory, "qmp"):
            with contextlib.suppress(ConnectionError), self.conversation(deadline):
                pass

    def close(self, node: str, deadline: Deadline) -> None:
        """Let go of one image, if a living daemon holds it."""
        if not listens(self._directory, "qmp"):
            return
        with contextlib.suppress(ConnectionError), self.conversation(deadline) as qmp:
            _close(qmp, node, deadline)

    def end(self) -> None:
        """End it and remove its directory."""
        if listens(self._directory, "qmp"):
            with contextlib.suppress(TimeoutError, ConnectionError):
                self._quit(Deadline(QUIT_TIMEOUT))
        self.kill()
        remove_tree(self.path)

    def _quit(self, deadline: Deadline) -> None:
        with self._process() as pidfd:
            with self.conversation(deadline) as qmp:
                qmp.execute("quit")
            if pidfd is not None:
                _await_end(pidfd, deadline.left())

    def kill(self) -> None:
        """SIGKILL it, if it runs."""
        with self._process() as pidfd:
            if pidfd is None:
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            _await_end(pidfd, QUIT_TIMEOUT)

    def pid(self) -> int | None:
        """Its number; None when it has ended. The one in the file may be another's by now: its command line tells."""
        try:
            with open(f"{self.path}/pid", encoding="ascii") as file:
                pid = int(file.read())
        except (FileNotFoundError, ValueError):
            return None
        return pid if self._identity[1].encode() in _command_line(pid) else None

    @contextlib.contextmanager
    def _process(self) -> Iterator[int | None]:
        """A pidfd of it; None when it has ended. It is looked at again once the pidfd holds the process."""
        pid = self.pid()
        try:
            pidfd = None if pid is None else os.pidfd_open(pid)
        except ProcessLookupError:
            pidfd = None
        if pidfd is None:
            yield None
            return
        try:
            yield pidfd if self.pid() == pid else None
        finally:
            os.close(pidfd)


def _command_line(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _await_end(pidfd: int, seconds: float) -> None:
    """A pidfd is readable once its process is a zombie, whoever has to reap it."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    if not poller.poll(seconds * 1000):
        raise TimeoutError(f"{PROGRAM} did not end")


# --------------------------------------------------------------------------------- what is said to a daemon


def _open(qmp: Qmp, node: str, path: str, source: Source) -> None:
    with contextlib.ExitStack() as undo:
        _add_node(qmp, node, source)
        undo.callback(qmp.execute, "blockdev-del", node_name=node)
        names = {"type": "fuse", "id": node, "node_name": node, "mountpoint": path}
        qmp.execute("block-export-add", **names, writable=not source.read_only)
        undo.pop_all()


def _write_files(site: Site, key: Key, source: Source) -> None:
    for name, text in {**source.files, "export": ""}.items():
        with open(private_path(site, key, name), "w", encoding="utf-8") as file:
            file.write(text)


def _add_node(qmp: Qmp, node: str, source: Source) -> None:
    """Open the image. QEMU reads the secret while it does so, and keeps it no longer than that."""
    arguments = {**source.blockdev, "node-name": node, "read-only": source.read_only}
    if source.secret is None:
        qmp.execute("blockdev-add", **arguments)
        return
    _drop_secret(qmp)
    qmp.execute("object-add", qom_type="secret", id=SECRET_ID, data=source.secret, format="base64")
    try:
        qmp.execute("blockdev-add", **arguments, **{source.secret_argument: SECRET_ID})
    finally:
        _drop_secret(qmp)


def _close(qmp: Qmp, node: str, deadline: Deadline) -> None:
    """Take away the export and the node. A caller that was killed may have given the same commands, which the daemon
    still carries out beside ours: an error counts only if the thing is there afterwards. Which nodes there are is asked
    only then: the answer describes all of them, 0.2 ms each."""
    _drop_secret(qmp)
    with contextlib.suppress(QmpError):
        qmp.execute("block-export-del", id=node, mode="hard")
    deadline.wait(lambda: all(export["id"] != node for export in qmp.execute("query-block-exports")))
    try:
        qmp.execute("blockdev-del", node_name=node)
    except QmpError:
        if any(each["node-name"] == node for each in qmp.execute("query-named-block-nodes", flat=True)):
            raise


def _drop_secret(qmp: Qmp) -> None:
    """Normally there is none; a caller that was killed while the image was opened leaves it."""
    with contextlib.suppress(QmpError):
        qmp.execute("object-del", id=SECRET_ID)


# ----------------------------------------------------------------------------------------- files and locks


@contextlib.contextmanager
def _joined(site: Site, key: Key, group: str, deadline: Deadline) -> Iterator[Daemon]:
    """The first daemon of the group that has room, locked, with `key` as a member. Membership comes first: nothing of
    a daemon is ever there that no member would find. So two that come for the last place may both be counted, and one
    of them moves on."""
    for number in itertools.count():
        name = f"daemon-{group}-{number}"
        _become_member(site, key, name)
        with _locked(site, name, deadline) as daemon:
            if len(daemon.members()) <= LIMIT:
                yield daemon
                return


def _become_member(site: Site, key: Key, daemon: str) -> None:
    _make_directory(site, f"{site.helpers_dir}/{_directory(key)}")
    new = private_path(site, key, "daemon.new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    os.symlink(f"../{daemon}", new)
    os.rename(new, private_path(site, key, "daemon"))


@contextlib.contextmanager
def _locked(site: Site, name: str, deadline: Deadline) -> Iterator[Daemon]:
    """Hold a daemon's lock. Its directory is made if it is not there, and may be gone afterwards."""
    path = f"{site.helpers_dir}/{name}"
    directory = None
    while directory is None:
        _make_directory(site, path)
        directory = _flock(path, deadline)
    try:
        yield Daemon(site, name, directory)
    finally:
        os.close(directory)


def _flock(path: str, deadline: Deadline) -> int | None:
    """`path` opened and locked; None when it was removed meanwhile."""
    with contextlib.ExitStack() as undo:
        try:
            directory = descriptor(path)
            undo.callback(os.close, directory)
            deadline.wait(lambda: _try_flock(directory))
            if not os.path.samestat(os.fstat(directory), os.stat(path)):
                return None
        except FileNotFoundError:
            return None
        undo.pop_all()
        return directory


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leave(site: Site, key: Key, daemon: Daemon) -> None:
    """The member's own directory goes last: as long as it is there, this can be done again."""
    _unmount_export(site, key)
    if daemon.members() == [_directory(key)]:
        daemon.end()
    _remove_directory(site, key)


def _unmount_export(site: Site, key: Key) -> None:
    """Take away the mount that a dead daemon left on the image's file.

    Raises: errors.Conflict.
    """
    path = export_path(site, key)
    try:
        while (stale := mountinfo.at(path)) is not None and stale.fstype == "fuse":
            mount.umount(path, mount.UMOUNT_NOFOLLOW)
    except OSError as error:
        raise Conflict(f"the storage daemon's file of {key} is still in use", detail=str(error)) from error


def _remove_directory(site: Site, key: Key) -> None:
    remove_tree(f"{site.helpers_dir}/{_directory(key)}")


def _make_directory(site: Site, path: str) -> None:
    os.makedirs(site.helpers_dir, mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)


def _directory(key: Key) -> str:
    return f"{key.collection}-{key.id}"


def _node(site: Site, key: Key) -> str:
    """QEMU allows 31 letters, digits, '-', '.' and '_', and a letter first."""
    return f"i{site.instance}-{_directory(key)}"


def _daemon_of(site: Site, key: Key) -> str | None:
    return _link(f"{site.helpers_dir}/{_directory(key)}")


def _link(directory: str) -> str | None:
    """The daemon that the image in `directory` belongs to."""
    try:
        return os.path.basename(os.readlink(f"{directory}/daemon"))
    except OSError:
        return None
