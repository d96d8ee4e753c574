"""What a worker process does: one job after another, each a function of this module that may block.

A job is a name and its arguments; its reply is a result, a problem to be told, or the trace of a bug. Both are pickled:
the two ends are one program, over a socket that nobody else can reach. Jobs that come together are done in turn, each
with its reply; what an earlier one learnt of a record, a later one sees, since in one message a record is one object.
Before its reply a job may say how far it is, as often as it likes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from imageapi import errors
from imageapi.config import Site
from imageapi.drivers import progress
from imageapi.drivers.base import HelpedDriver, driver
from imageapi.drivers.progress import LeftOff, Progress
from imageapi.linux import packet, syncfs
from imageapi.records import AnyRecord, Facts

if TYPE_CHECKING:
    from imageapi.drivers.mounts import MountDriver

TOLD_EVERY = 0.25
"""Seconds between two words of how far one step of a job is."""


class Reply(NamedTuple):
    """How a job ended: exactly one of the first three says it. `result` may be any plain value. One that was not
    `begun` has had no effect; without a problem that was because nobody waits for it."""

    result: Any = None
    problem: dict[str, Any] | None = None
    bug: str | None = None
    begun: bool = True


def serve(channel: socket.socket, site: Site) -> None:
    """Do the jobs that come over `channel` until the other end is gone, also in the middle of a message."""
    os.umask(0o022)
    with contextlib.suppress(ConnectionError):
        _serve(channel, site)


def _serve(channel: socket.socket, site: Site) -> None:
    buffer = packet.buffer()
    while message := packet.receive(channel, buffer):
        for name, arguments in pickle.loads(message):
            if _given_up(channel):
                _decline(channel)
                return
            with progress.heard_by(_Voice(channel)):
                reply = _perform(name, arguments, site)
            packet.send(channel, pickle.dumps(reply))
            if reply.problem or reply.bug:
                break


def _given_up(channel: socket.socket) -> bool:
    """Whether the other end has hung up, and no job is to be begun any more."""
    try:
        return not channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


def _decline(channel: socket.socket) -> None:
    """Say that the job that is due is not begun, if somebody still hears it."""
    with contextlib.suppress(OSError):
        channel.send(pickle.dumps(Reply(begun=False)))


class _Voice:
    """Says over `channel` how far a job is, and ends a job for which nobody is left to hear it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._told = ("", 0.0)

    def __call__(self, news: Progress) -> None:
        """Raises: LeftOff, when the other end has hung up."""
        now = time.monotonic()
        step, at = self._told
        if news.step == step and now - at < TOLD_EVERY:
            return
        self._told = (news.step, now)
        if _given_up(self._channel):
            raise LeftOff("it was left off, since nobody waits for it any more")
        with contextlib.suppress(OSError):  # there will be more to hear
            self._channel.send(pickle.dumps(news), socket.MSG_DONTWAIT)


def _perform(name: str, arguments: Sequence[Any], site: Site) -> Reply:
    try:
        return Reply(result=JOBS[name](site, *arguments))
    except errors.Problem as problem:
        return Reply(problem=problem.to_dict())
    except OSError as error:
        return Reply(problem=_explain(error, name, arguments).to_dict())
    except MemoryError:
        return Reply(problem=errors.no_memory(name).to_dict())
    except Exception:
        return Reply(bug=traceback.format_exc())


def failure(error: OSError, step: str) -> bytes:
    """The reply that says `error` happened before the job could begin."""
    return pickle.dumps(Reply(problem=errors.from_oserror(error, step).to_dict(), begun=False))


def _explain(error: OSError, name: str, arguments: Sequence[Any]) -> errors.Problem:
    about: Any = next(iter(arguments), "the host")
    what = f"{about.kind} {about.key}" if hasattr(about, "key") else str(about)
    return errors.from_oserror(error, f"{name} of {what}")


# ----------------------------------------------------------------------------------------------------- the jobs


def acquire(site: Site, record: AnyRecord, inputs: Sequence[AnyRecord]) -> Facts:
    record.facts = driver(record.key.collection, record.kind).acquire(record, inputs, site)
    return record.facts


def release(site: Site, record: AnyRecord) -> None:
    driver(record.key.collection, record.kind).release(record, site)


def delete(site: Site, record: AnyRecord) -> None:
    """The release of what is asked for by itself. A mount that somebody has bound elsewhere is then left whole."""
    own = driver(record.key.collection, record.kind)
    if record.key.collection == "mount":
        cast("MountDriver", own).check_not_elsewhere(record, site)
    own.release(record, site)


def observe(site: Site, record: AnyRecord) -> Facts | None:
    """What of the object stands in the kernel. One that has lost its helper does, and may be mended."""
    own = driver(record.key.collection, record.kind)
    if record.facts.helper is not None and cast(HelpedDriver, own).stands(record, site):
        return record.facts
    return own.observe(record, site)


def mend(site: Site, record: AnyRecord) -> tuple[Facts, str | None]:
    return cast(HelpedDriver, driver(record.key.collection, record.kind)).mend(record, site)


def sever(site: Site, record: AnyRecord) -> bool:
    return cast(HelpedDriver, driver(record.key.collection, record.kind)).sever(record, site)


def sync(site: Site, mountpoint: str) -> None:
    """Write what the file system at `mountpoint` holds to its store (syncfs(2))."""
    syncfs.syncfs(mountpoint)


def sweep(site: Site) -> list[str]:
    """See sweep.sweep. It is done once, at the start, and takes modules that hardly anything else does."""
    from imageapi.engine import sweep

    return sweep.sweep(site)


def check(site: Site, boot_id: str) -> Any:
    """See check.check."""
    from imageapi.engine import check

    return check.check(site, boot_id)


def audit(site: Site, *arguments: Any) -> Any:
    """See audit.look."""
    from imageapi.engine import audit

    return audit.look(site, *arguments)


JOBS: dict[str, Callable[..., Any]] = {
    "acquire": acquire,
    "release": release,
    "delete": delete,
    "observe": observe,
    "mend": mend,
    "sever": sever,
    "sync": sync,
    "sweep": sweep,
    "audit": audit,
    "check": check,
}
