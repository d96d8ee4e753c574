"""The kernel way: open-iscsi logs in, and the kernel's initiator has the logical unit as a SCSI disk.

An attachment has a session of its own at each portal it uses, with only its LUN scanned. So nothing has to be counted:
a session has one user, which its interface's name tells, and ends with it; sessions of others are never touched; and
the limits and secrets of one attachment are not those of another.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence

from imageapi.config import Site
from imageapi.drivers import block, exported, holders
from imageapi.drivers.deadline import Deadline
from imageapi.drivers.iscsi import database, login, multipath, pdu, portals
from imageapi.drivers.iscsi.login import Refused
from imageapi.drivers.iscsi.portals import Portal
from imageapi.errors import Invalid, Problem, TimedOut, Unsupported
from imageapi.linux import blockqueue, iscsi, process
from imageapi.linux.iscsi import Session
from imageapi.records import Key
from imageapi.spec import Iscsi

PROGRAM = "iscsiadm"
REFUSED = "see the target's log, and the kernel's"
"""Where to look when the target refuses writes."""

FOR_OTHERS = database.LOGIN_SECONDS + 2.0
"""Seconds that must be left for a further portal: what its login takes at the most, and some for what follows."""

NOT_RUNNING = (18, 20)
NOT_IN = 24
NO_ANSWER = (4, 8, 11)
"""What iscsiadm ends with (iscsiadm(8), EXIT STATUS): iscsid is not there; the login is refused; nobody answers."""


def available() -> bool:
    """Whether the kernel has the initiator, once its module has been asked for, and open-iscsi is installed."""
    if process.find_program(PROGRAM) is None:
        return False
    modules = f"/lib/modules/{os.uname().release}"
    if not iscsi.available() and process.find_program("modprobe") and os.path.isdir(modules):
        subprocess.run(["modprobe", "iscsi_tcp"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    return iscsi.available()


def acquire(key: Key, definition: Iscsi, site: Site) -> str:
    """Attach the logical unit and return its block device. Leaves nothing when it fails.

    Raises: errors.Problem in the user's terms; OSError.
    """
    deadline = Deadline(exported.DEADLINE)
    release(key, definition, site)
    found = portals.reach(definition, deadline, discover=multipath.runs())
    with contextlib.ExitStack() as undo:
        undo.callback(abandon, key, site)
        _log_in(database.mark(site, key), definition, found, deadline)
        device = _device(ours(site, key), definition, deadline)
        if definition.ro:
            blockqueue.set_read_only(device)
        block.set_scheduler(device, definition.scheduler)
        undo.pop_all()
    return device


def release(key: Key, definition: Iscsi, site: Site) -> None:
    """Flush, and end the sessions. Idempotent.

    Raises: errors.Conflict while the device is in use; errors.TimedOut; errors.Problem when writes were lost.
    """
    device = observe(key, site)
    if device is not None:
        _check_free(device)
        if not definition.ro:
            _flush(key, definition, device, site)
    _end(key, site)


def abandon(key: Key, site: Site) -> None:
    """End the sessions of something that nobody has a record of. What was written and not flushed is lost.

    Raises: errors.Conflict while the device is in use; errors.Problem.
    """
    device = observe(key, site)
    if device is not None:
        _check_free(device)
    _end(key, site)


def observe(key: Key, site: Site) -> str | None:
    """The block device, if it is there: the multipath device where several sessions are one."""
    disks = [disk for session in ours(site, key) for disk in iscsi.disks(session)]
    return _top(disks) if disks else None


def ours(site: Site, key: Key) -> list[Session]:
    """The sessions that were made for `key`."""
    name = database.mark(site, key)
    return [session for session in iscsi.sessions() if session.interface == name]


def strays(site: Site) -> list[Key]:
    """Every object for which a session, or a record of open-iscsi's, may be there."""
    prefix = database.prefix(site)
    names = {session.interface for session in iscsi.sessions()} | set(database.marked(prefix))
    parts = (name.removeprefix(prefix).partition("-") for name in names if name.startswith(prefix))
    return [Key(collection, int(number)) for collection, _, number in parts if number.isdigit()]


# ------------------------------------------------------------------------------------------------- coming


def _log_in(name: str, definition: Iscsi, found: Sequence[Portal], deadline: Deadline) -> None:
    """A session at each portal. One that the target named and that does not answer is left out, and so are the rest
    when they take too much of the time: an attachment needs no more than the first.

    Raises: errors.Problem when the first, which let us in before, does not.
    """
    first, *others = found
    _log_in_at(first, name, definition, deadline)
    for portal in portals.open_to_us(others):
        if deadline.left() < FOR_OTHERS:
            break
        with contextlib.suppress(Problem):
            _log_in_at(portal, name, definition, deadline)


def _log_in_at(portal: Portal, name: str, definition: Iscsi, deadline: Deadline) -> None:
    where = f"{portal},{portal.group}"
    words = ("--mode", "node", "--targetname", definition.target, "--portal", where, "--interface", name)
    with database.node(name, definition, portal):
        _run(definition, deadline, *words, "--login")


def _device(sessions: Sequence[Session], definition: Iscsi, deadline: Deadline) -> str:
    """The multipath device of several sessions; where multipathd wants none, one session is enough."""
    disks = [_scan(session, definition, deadline) for session in sessions]
    if len(disks) > 1 and multipath.await_map(disks, deadline) is None:
        _log_out(sessions[1:], deadline)
    return _top(disks)


def _scan(session: Session, definition: Iscsi, deadline: Deadline) -> str:
    """The disk of a session, which appears a moment after it was looked for."""
    iscsi.scan(session, pdu.lun_word(definition.lun))
    try:
        deadline.wait(lambda: any(_is_ready(disk) for disk in iscsi.disks(session)))
    except TimeoutError:
        raise Invalid(
            f"the kernel finds no disk at LUN {definition.lun} of target {definition.target}: see its log", path="$.lun"
        ) from None
    return iscsi.disks(session)[0]


def _is_ready(disk: str) -> bool:
    """Whether it can be opened: it is listed before that."""
    try:
        os.close(os.open(f"/dev/{disk}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _top(disks: Sequence[str]) -> str:
    """The device that stands for all of the disks: the map over them, or the first."""
    maps = (iscsi.map_over(disk) for disk in disks)
    return f"/dev/{next((each for each in maps if each), disks[0])}"


# ------------------------------------------------------------------------------------------------- going


def _check_free(device: str) -> None:
    """The kernel ends a session whose disk is open, so it is seen to here that nobody has it.

    Raises: errors.Conflict.
    """
    if not holders.until(lambda: block.is_free(device)):
        raise block.busy(device)


def _flush(key: Key, definition: Iscsi, device: str, site: Site) -> None:
    """Raises: errors.TimedOut when the target is away: a flush would wait in the kernel, where nothing can end it."""
    states = {session.state for session in ours(site, key)}
    if states == {iscsi.FAILED} or (states == {iscsi.LOGGED_IN} and not _speaks(key, definition, site)):
        raise _away(definition, f"when the kernel gives it up, {database.RECOVERY_SECONDS} seconds after it went")
    if iscsi.LOGGED_IN not in states and multipath.queues(device):
        raise _away(definition, f"when multipathd gives it up, which 'dmsetup message {device} 0 fail_if_no_path' does")
    exported.flush(site, key, device, REFUSED)


def _speaks(key: Key, definition: Iscsi, site: Site) -> bool:
    """Whether a session of the one portal there is will be answered: the kernel takes ten seconds to see that not."""
    return len(ours(site, key)) > 1 or portals.answers(definition)


def _away(definition: Iscsi, otherwise: str) -> TimedOut:
    return TimedOut(
        f"target {definition.target} does not answer, and may not have all that was written: it is detached when "
        f"the target is back, or {otherwise}",
        path="$.host",
    )


def _end(key: Key, site: Site) -> None:
    """End the sessions, and what a death left of their records."""
    deadline, name = Deadline(exported.DEADLINE), database.mark(site, key)
    if database.left(name):
        deadline.wait(lambda: not _is_running(name))
        database.forget(name)  # before all that may fail: there may be a secret in it
    _remove_map(key, site, deadline)
    _log_out(ours(site, key), deadline)


def _log_out(sessions: Sequence[Session], deadline: Deadline) -> None:
    for session in sessions:
        with database.interface(session.interface):
            _run(None, deadline, "--mode", "session", "--sid", str(session.id), "--logout")
    deadline.wait(lambda: all(iscsi.session(session.id) is None for session in sessions))


def _remove_map(key: Key, site: Site, deadline: Deadline) -> None:
    for disk in [disk for session in ours(site, key) for disk in iscsi.disks(session)]:
        if (found := iscsi.map_over(disk)) is not None:
            multipath.remove(found, deadline)


def _is_running(name: str) -> bool:
    """Whether an `iscsiadm` of ours lives on whose caller was killed: what it does is not done yet."""
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
            if name.encode() in file.read().split(b"\0"):
                return True
    return False


# ------------------------------------------------------------------------------------------ open-iscsi's words


def _run(definition: Iscsi | None, deadline: Deadline, *words: str) -> None:
    """Have iscsiadm do something.

    Raises: errors.Problem in the user's terms.
    """
    environment = {"PATH": os.environ.get("PATH", os.defpath)}
    try:
        done = subprocess.run(
            [PROGRAM, *words], env=environment, timeout=deadline.left(),
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimedOut("iscsid does not answer in time: see its log, and restart it", step="iscsiadm") from None
    if done.returncode:
        raise explain(done.returncode, done.stderr.strip(), definition)


def explain(code: int, words: str, definition: Iscsi | None) -> Problem:
    """What iscsiadm's end means, after a login of our own has shown that all is well."""
    if code in NOT_RUNNING:
        return Unsupported(
            "iscsid does not run here, which logs in for the kernel: start it (systemctl start iscsid), or start the "
            "server with --iscsi-backend daemon",
            detail=words,
        )
    if definition is not None and code == NOT_IN:
        return login.explain(Refused(login.AUTHENTICATION_FAILED), definition, definition.host)
    if definition is not None and code in NO_ANSWER:
        return TimedOut(f"target {definition.target} let us in, and does not answer iscsid: ask again", detail=words)
    return Problem("iscsid could not do it: see its log", step="iscsiadm", detail=words)
