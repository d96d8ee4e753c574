"""qemu-storage-daemon as a helper: an image that QEMU can read becomes a regular file, through FUSE.

    helpers/attach-3/daemon   -> ../daemon-<group>-0    written first: whatever a crash leaves is found by it
    helpers/attach-3/export                             the file; the FUSE mount lies on it
    helpers/attach-3/left                               nothing of the kernel's stands on it, but the daemon hangs
    helpers/daemon-<group>-0/{qmp,pid}                  one daemon: at most `LIMIT` images of one group

A daemon runs detached and outlives whoever started it. A group is one store seen by one user: a store that hangs stops
its own images only. Each image has a thread of its own in the daemon, so that one which waits for its store, or one
that is just being opened, holds up no other. A daemon ends with its last image.

A daemon lives in the mount namespace of whoever starts it, which has to be the host's.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from imageapi.config import Site
from imageapi.drivers import daemon_process, locks
from imageapi.drivers.daemon_process import (
    EXPORT,
    LEFT,
    PACKAGES,
    PROGRAM,
    QUIT_TIMEOUT,
    Daemon,
    link,
    missing,
)
from imageapi.drivers.deadline import Deadline
from imageapi.drivers.qmp import Qmp, QmpError, descriptor, listens
from imageapi.errors import Conflict, TimedOut
from imageapi.linux import mount, mountinfo
from imageapi.linux.tree import remove_tree
from imageapi.records import Helper, Key
from imageapi.spec import COLLECTIONS, Secret

__all__ = ["PACKAGES", "PROGRAM", "missing"]

PREFIX = "daemon-"
"""How the directory of a daemon begins."""

LIMIT = 20
"""The most images of one daemon: its crash takes no more than these."""

LOCK_TIMEOUT = 5.0
"""Seconds to wait for a daemon that is busy with another image; then another daemon is taken, or one comes again."""

CLOSE_TIMEOUT = 2.0
"""Seconds for a daemon to let go of an image that is only read."""

SILENCE = 1.0
"""Seconds within which whoever reads from an image that works gets an answer, if only an error."""

LOST_WITH_IT = ", and then what was written and has not reached the store is lost"

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


# ---------------------------------------------------------------------------------------------- the verbs


def export(site: Site, key: Key, source: Source, deadline: Deadline) -> str:
    """Make the image a file and return its path. Leaves nothing when it fails, unless its daemon hangs and serves
    others too: then `withdraw` has to be called until it succeeds.

    Raises: QmpError in QEMU's words; TimeoutError; ConnectionError when the daemon ended; errors.Unsupported without
    the program; errors.Exhausted.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(_give_up, site, key)
        with _joined(site, key, source.group, deadline) as daemon:
            _write_files(site, key, source)
            with daemon.conversation(deadline) as qmp:
                _open(qmp, _node(site, key), export_path(site, key), source)
        undo.pop_all()
    return export_path(site, key)


def _give_up(site: Site, key: Key) -> None:
    with contextlib.suppress(TimeoutError, TimedOut, ConnectionError):
        withdraw(site, key, Deadline(QUIT_TIMEOUT), expendable=True)


def restore(site: Site, key: Key, source: Source, deadline: Deadline) -> None:
    """Make the image a file again, at the same place, when its daemon has ended or the kernel was cut off from it.

    Raises: as `export`, but nothing is undone, since the image's user is still there.
    """
    name = _daemon_of(site, key)
    if name is None:
        raise Conflict(f"the storage daemon of {key} is not known any more")
    with _locked(site, name, deadline) as daemon:
        daemon.ensure_answering(_directory(key), deadline)
        if mountinfo.at(export_path(site, key)) is None:
            _write_files(site, key, source)
            with _freed(daemon, key), daemon.conversation(deadline) as qmp:
                _close(qmp, _node(site, key), deadline)
                _open(qmp, _node(site, key), export_path(site, key), source)


@contextlib.contextmanager
def _freed(daemon: Daemon, key: Key) -> Iterator[None]:
    """A daemon that hangs in what it is asked within is killed, if nobody needs it: the next try finds a new one."""
    try:
        yield
    except TimeoutError:
        if not daemon.serves_others(_directory(key)):
            daemon.kill()
        raise


def check_answers(site: Site, key: Key, deadline: Deadline, *, caches: bool) -> None:
    """See that the daemon of an image, if it lives, is there to be asked, or help it to its end if it is ending: one
    that has been told to closes its files first, and then its images, which may wait for their store. Where its driver
    `caches` what was written, that is awaited; else it has nothing that could be lost.

    Raises: errors.TimedOut, with what is to be done about it.
    """
    name = _daemon_of(site, key)
    if name is None:
        return
    with _locked(site, name, deadline) as daemon:
        if not daemon.hangs(deadline):
            return
        if not (daemon.shows_nothing() and _ended(daemon, deadline, kill=not caches)):
            raise daemon.silence(LOST_WITH_IT)


def _ended(daemon: Daemon, deadline: Deadline, *, kill: bool) -> bool:
    if kill:
        daemon.kill()
    with contextlib.suppress(TimeoutError):
        daemon.await_end(deadline)
        return True
    return False


def withdraw(site: Site, key: Key, deadline: Deadline, *, expendable: bool) -> None:
    """Undo `export`, or what a crash left of it; a second time it does nothing. A daemon that hangs is killed when
    that costs nobody anything: it serves this image alone, and what was written to it is `expendable`.

    Raises: errors.Conflict while something still uses the file; errors.TimedOut when the daemon hangs; TimeoutError
    when it is busy.
    """
    name = _daemon_of(site, key)
    if name is None:
        _unmount_export(site, key)
        if known(site, key):
            _close_wherever(site, key)
        _remove_directory(site, key)
        return
    with _locked(site, name, deadline.within(LOCK_TIMEOUT)) as daemon:
        with _killing(site, daemon, key, expendable=expendable):
            _let_go(daemon, _node(site, key), deadline.within(CLOSE_TIMEOUT) if expendable else deadline)
        _leave(site, key, daemon)


def _close_wherever(site: Site, key: Key) -> None:
    """Somebody has removed what says which daemon has the image open: so all are told to close it."""
    for name in daemons(site):
        with contextlib.suppress(TimeoutError), _locked(site, name, Deadline(LOCK_TIMEOUT)) as daemon:
            _let_go(daemon, _node(site, key), Deadline(CLOSE_TIMEOUT))
            if not daemon.members():
                daemon.end()


def end_idle(site: Site, name: str) -> None:
    """End a daemon that has no member. Raises: TimeoutError."""
    with _locked(site, name, Deadline(LOCK_TIMEOUT)) as daemon:
        if not daemon.members():
            daemon.end()


def idle(site: Site) -> dict[str, int | None]:
    """The daemons without a member, which nobody would ever end, and their pids: somebody has removed what their
    images were known by. None, while it is not known whose an image is."""
    if any(_daemon_of(site, key) is None for key in exports(site)):
        return {}
    found = (Daemon(site, name, -1) for name in daemons(site))
    return {os.path.basename(each.path): each.pid() for each in found if not each.members()}


def daemons(site: Site) -> list[str]:
    """The directories of all daemons of the site."""
    return sorted(name for name in os.listdir(site.helpers_dir) if name.startswith(PREFIX))


@contextlib.contextmanager
def _killing(site: Site, daemon: Daemon, key: Key, *, expendable: bool) -> Iterator[None]:
    """What is asked within has a deadline. A daemon that misses it is killed if that costs nobody anything."""
    try:
        yield
    except TimeoutError:
        if not expendable:
            raise daemon.silence(LOST_WITH_IT) from None
        if daemon.serves_others(_directory(key)):
            _write(private_path(site, key, LEFT), "")
            raise daemon.silence() from None
        daemon.kill()


@contextlib.contextmanager
def cut_off_when_late(site: Site, key: Key, seconds: float, *, expendable: bool = True) -> Iterator[None]:
    """What is done within may wait for the image, and if that is `expendable`, not for ever: after so many `seconds`
    the kernel is cut off from the daemon, so that whoever waits gets an error.

    Raises: TimeoutError for an error that came of this.
    """
    late = threading.Timer(seconds, sever, (site, key))
    if expendable:
        late.start()
    try:
        yield
    except OSError:
        if late.finished.is_set():
            raise TimeoutError("the image did not answer") from None
        raise
    finally:
        late.cancel()
        if expendable:
            late.join()


def sever(site: Site, key: Key) -> None:
    """Cut the kernel off from the daemon that has the image open: all that waits for it fails at once."""
    daemon_process.detach(export_path(site, key))


def is_silent(site: Site, key: Key) -> bool:
    """Whether the image's file is there, and a read of it gets no answer at all within `SILENCE`. Who looks gets one
    when the file is severed, at the latest."""
    looking = threading.Thread(target=_look, args=(export_path(site, key),), daemon=True)
    looking.start()
    looking.join(SILENCE)
    return looking.is_alive()


def _look(path: str) -> None:
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.preadv(file, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
        finally:
            os.close(file)


def helper(site: Site, key: Key) -> Helper | None:
    """The process without which the image is gone; None when there is none, or it has ended."""
    name = _daemon_of(site, key)
    return None if name is None else Daemon(site, name, -1).helper()


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
    """Whether the image's file stands and its daemon lives: one whose first thread has ended listens until the last
    one has."""
    name = _daemon_of(site, key)
    if name is None or mountinfo.at(export_path(site, key)) is None or helper(site, key) is None:
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
    return private_path(site, key, EXPORT)


def private_path(site: Site, key: Key, name: str) -> str:
    """Where the file `name` of `Source.files` is for the daemon to read."""
    return f"{site.helpers_dir}/{_directory(key)}/{name}"


# --------------------------------------------------------------------------------- what is said to a daemon


def _let_go(daemon: Daemon, node: str, deadline: Deadline) -> None:
    """Have it close one image, if it lives and has it open."""
    if daemon.listens:
        with contextlib.suppress(ConnectionError), daemon.conversation(deadline) as qmp:
            _close(qmp, node, deadline)


def _open(qmp: Qmp, node: str, path: str, source: Source) -> None:
    """Open the image and export it, in a thread of its own."""
    with contextlib.ExitStack() as undo:
        _add_node(qmp, node, source)
        undo.callback(qmp.execute, "blockdev-del", node_name=node)
        qmp.execute("object-add", qom_type="iothread", id=node)
        undo.callback(qmp.execute, "object-del", id=node)
        names = {"type": "fuse", "id": node, "node_name": node, "mountpoint": path, "iothread": node}
        qmp.execute("block-export-add", **names, writable=not source.read_only)
        undo.pop_all()


def _write_files(site: Site, key: Key, source: Source) -> None:
    for name, text in {**source.files, EXPORT: ""}.items():
        _write(private_path(site, key, name), text)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
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
    with contextlib.suppress(QmpError):
        qmp.execute("object-del", id=node)


def _drop_secret(qmp: Qmp) -> None:
    """Normally there is none; a caller that was killed while the image was opened leaves it."""
    with contextlib.suppress(QmpError):
        qmp.execute("object-del", id=SECRET_ID)


# ----------------------------------------------------------------------------------------- files and locks


@contextlib.contextmanager
def _joined(site: Site, key: Key, group: str, deadline: Deadline) -> Iterator[Daemon]:
    """The first daemon of the group that has room and answers, locked, with `key` as a member. Membership comes first:
    nothing of a daemon is ever there that no member would find. So two that come for the last place may both be
    counted, and one of them moves on."""
    for number in itertools.count():
        with contextlib.ExitStack() as held:
            if (daemon := _entered(held, site, key, f"{PREFIX}{group}-{number}", deadline)) is not None:
                yield daemon
                return


def _entered(held: contextlib.ExitStack, site: Site, key: Key, name: str, deadline: Deadline) -> Daemon | None:
    """The daemon `name`, locked, running, and with `key` as a member; None when it is full, or hangs with others."""
    _become_member(site, key, name)
    try:
        daemon = held.enter_context(_locked(site, name, deadline.within(LOCK_TIMEOUT)))
        if len(daemon.members()) > LIMIT:
            return None
        daemon.ensure_answering(_directory(key), deadline)
    except (TimeoutError, TimedOut):
        deadline.left()
        return None
    return daemon


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
        directory = locks.locked_directory(path, deadline)
    try:
        yield Daemon(site, name, directory)
    finally:
        os.close(directory)


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
    for each in (site.helpers_dir, path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(each, 0o700)


def _directory(key: Key) -> str:
    return f"{key.collection}-{key.id}"


def _node(site: Site, key: Key) -> str:
    """QEMU allows 31 letters, digits, '-', '.' and '_', and a letter first."""
    return f"i{site.instance}-{_directory(key)}"


def _daemon_of(site: Site, key: Key) -> str | None:
    return link(f"{site.helpers_dir}/{_directory(key)}")
