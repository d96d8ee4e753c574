"""An image that a storage daemon opens, as a block device: a file that the daemon shows, and a loop device on it.

What the kinds have in common that take this way; what they ask the daemon for, and what its words mean, is their own.
QmpError, TimeoutError and ConnectionError come out of here as they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from imageapi.config import Site
from imageapi.drivers import block, export_loop, partitions, revisit, storage_daemon
from imageapi.drivers.audit import DELETE, Host, Wrong, gone
from imageapi.drivers.deadline import Deadline
from imageapi.drivers.storage_daemon import Source
from imageapi.errors import Conflict, Exhausted, Problem
from imageapi.linux import loop
from imageapi.records import AnyRecord, Facts, Key

DEADLINE = 20.0
"""Seconds for all of an attach or detach; less than the service gives them, so that the answer says what hung."""

MEND_DEADLINE = 8.0
"""Seconds for one try to mend an image: a delete waits for it."""

PATIENCE = 1.0
"""Seconds for the kernel to let go of what stands on an image; then it is cut off from the daemon."""

REFUSED = "refused"
"""The file beside the export that notes that writes were refused, and how many sectors had been written by then."""


CUT_OFF = Wrong(
    "its storage helper has ended, or it was cut off from a store that did not answer; it is being mended",
    f"see to the store, and start imageapi-server, if it does not run; or {DELETE}",
    "is cut off from its store",
)
"""The verdict on an image whose device is there, and nobody serves."""


class Way(Protocol):
    """A module by which images are attached, and let go again."""

    def release(self, key: Key, definition: Any, site: Site) -> None: ...


class DaemonsWay(Way, Protocol):
    """The one by a storage daemon."""

    def mend(self, key: Key, definition: Any, site: Site) -> tuple[str, str | None]: ...


class ExportedDriver:
    """What the kinds have in common whose images a storage daemon opens, or the kernel's own driver: `kernel` and
    `daemon` are their modules for that."""

    kernel: Way
    daemon: DaemonsWay

    def attach(self, record: AnyRecord, site: Site) -> str:
        """Attach the image in the way that is to be taken here; its block device. Raises: as `acquire`."""
        raise NotImplementedError

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        raise NotImplementedError

    def read_only(self, definition: Any) -> bool:
        raise NotImplementedError

    def audit(self, record: AnyRecord, site: Site, host: Host) -> Wrong | None:
        """What can only be read and has lost its daemon is not lost: it is mended."""
        if self.observe(record, site) is not None:
            return None
        mendable = self.read_only(record.definition) and export_loop.find(site, record.key) is not None
        return CUT_OFF if mendable else gone()

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        device = self.attach(record, site)
        with contextlib.ExitStack() as undo:
            undo.callback(self.release, record, site)
            found = facts(site, record.key, device)
            undo.pop_all()
        return found

    def release(self, record: AnyRecord, site: Site) -> None:
        """Whichever way was taken, the other finds nothing."""
        self.kernel.release(record.key, record.definition, site)
        self.daemon.release(record.key, record.definition, site)
        _release_forgotten(record, site)

    def stands(self, record: AnyRecord, site: Site) -> bool:
        return export_loop.find(site, record.key) is not None

    def mend(self, record: AnyRecord, site: Site) -> tuple[Facts, str | None]:
        device, complaint = self.daemon.mend(record.key, record.definition, site)
        return facts(site, record.key, device), complaint

    def sever(self, record: AnyRecord, site: Site) -> bool:
        return sever(record.key, site, read_only=self.read_only(record.definition))


NO_SCHEDULER = "none"
"""What a loop device has, and has again once it is let go: it is anybody's then."""


def attach(
    site: Site, key: Key, source: Source, deadline: Deadline, *, scheduler: str = NO_SCHEDULER, partitions: bool = False
) -> str:
    """Open the image and return its block device; `partitions`: have the kernel read its partition table. Leaves
    nothing when it fails. A daemon that ends meanwhile is replaced, once.

    Raises: what `storage_daemon.export` raises; OSError from the loop device; errors.Invalid for a scheduler that the
    kernel has not.
    """
    with contextlib.suppress(ConnectionError):
        return _attach(site, key, source, deadline, scheduler=scheduler, partitions=partitions)
    return _attach(site, key, source, deadline, scheduler=scheduler, partitions=partitions)


def _attach(site: Site, key: Key, source: Source, deadline: Deadline, *, scheduler: str, partitions: bool) -> str:
    with contextlib.ExitStack() as undo:
        storage_daemon.export(site, key, source, deadline)
        undo.callback(abandon, key, site)
        with _while_it_lives(site, key), storage_daemon.cut_off_when_late(site, key, deadline.left()):
            device = export_loop.attach(site, key, read_only=source.read_only, partitions=partitions)
        block.set_scheduler(device, scheduler)
        if storage_daemon.helper(site, key) is None:
            raise ConnectionResetError("the daemon ended when all was made")
        undo.pop_all()
    return device


@contextlib.contextmanager
def _while_it_lives(site: Site, key: Key) -> Iterator[None]:
    """What fails within because the daemon has ended raises ConnectionError."""
    try:
        yield
    except OSError as error:
        if storage_daemon.helper(site, key) is not None:
            raise
        raise ConnectionResetError(f"the daemon ended: {error}") from error


def facts(site: Site, key: Key, device: str) -> Facts:
    """What an attachment has learnt, whether its device is on a daemon's file or the kernel's own. `detail` has, of a
    device on a daemon's file, its `sequence`: the kernel's number for what it is now, None before Linux 5.15.

    Raises: OSError; errors.Exhausted, when the daemon has ended.
    """
    helper = storage_daemon.helper(site, key)
    if helper is None and storage_daemon.known(site, key):
        raise ended()
    found = block.facts(device, helper)
    if helper is not None:
        found.detail = {"sequence": export_loop.sequence(device)}
    return found


def observed(site: Site, key: Key, device: str | None) -> Facts | None:
    """The same of a device that was found; None where there is none, or its daemon has ended. Raises: OSError."""
    with contextlib.suppress(Exhausted):
        return None if device is None else facts(site, key, device)
    return None


def ended(words: str = "") -> Exhausted:
    """The answer where a daemon has ended over what it was asked for, and so has the next, or none could be tried."""
    return Exhausted(
        f"{storage_daemon.PROGRAM}, which opens the image, was ended, as the kernel does when no memory is left: see "
        "dmesg, and ask again",
        step="attach or detach the image",
        detail=words,
    )


def detach(site: Site, key: Key, deadline: Deadline, *, read_only: bool, hint: str, caches: bool = True) -> None:
    """Flush, and take away the loop device, the file and, with its last image, the daemon. Idempotent. `hint` is where
    to look when the store refuses what was written; `caches`: see storage_daemon.check_answers.

    Raises: errors.Conflict while the device is in use; errors.Problem when writes were lost; TimeoutError.
    """
    if not storage_daemon.known(site, key):
        return
    device = export_loop.find(site, key)
    with storage_daemon.cut_off_when_late(site, key, PATIENCE, expendable=read_only):
        free = device is None or loop.is_free(device)
    if device is not None and not free:
        raise block.busy(device)  # who has it takes a while to find out, and is not to be cut off
    with storage_daemon.cut_off_when_late(site, key, PATIENCE, expendable=read_only):
        if not read_only:
            storage_daemon.check_answers(site, key, deadline, caches=caches)
        if device is not None:
            if not read_only and storage_daemon.standing(site, key):
                flush(site, key, device, hint)
            _let_go(device)
    storage_daemon.withdraw(site, key, deadline, expendable=read_only)


def mend(
    site: Site, key: Key, source: Callable[[], Source], deadline: Deadline, *, read_only: bool
) -> tuple[str, str | None]:
    """Have the image's block device work again when its daemon has ended, or the kernel was cut off from it; the
    device, and what is wrong with a file system on it all the same. `source` is asked only if there is something to
    mend.

    A device that can be written is left as it is: what was on its way to the daemon is lost, and a file system that
    went on as if nothing had been would be in ruins.

    Raises: what `storage_daemon.restore` raises; errors.Conflict when it never can be mended.
    """
    device = export_loop.find(site, key)
    if device is None:
        raise Conflict("it is gone from the kernel: delete it, and make it again")
    if not read_only:
        raise Conflict(
            f"the storage daemon under {device} has ended, and with it what was written and had not reached the store "
            "yet: stop what uses it, delete it, and make it again"
        )
    if not (storage_daemon.standing(site, key) and export_loop.is_whole(site, key, device)):
        storage_daemon.restore(site, key, source(), deadline)
        with storage_daemon.cut_off_when_late(site, key, deadline.left()):
            export_loop.move(site, key, device)
    with storage_daemon.cut_off_when_late(site, key, DEADLINE):
        _have_partitions_read(device)
        return device, revisit.complaint(device)


def _have_partitions_read(device: str) -> None:
    """The kernel forgets the partitions of which none is in use while a device begins behind the end of its file (see
    loop.change_file). They stay where one is in use; and where the whole device is, there are none."""
    if loop.attribute(device, "loop/partscan") == "1":
        with contextlib.suppress(Conflict):
            partitions.have_read(device)


def abandon(key: Key, site: Site) -> None:
    """Take away what is left of an image that nobody has a record of. What was written to it and not flushed is lost.

    Raises: errors.Conflict while the device is in use; TimeoutError when the daemon hangs; OSError.
    """
    with storage_daemon.cut_off_when_late(site, key, PATIENCE):
        if (device := export_loop.find(site, key)) is not None:
            _let_go(device)
    storage_daemon.withdraw(site, key, Deadline(DEADLINE), expendable=True)


def sever(key: Key, site: Site, *, read_only: bool) -> bool:
    """If the image is silent, have all that waits for it fail, so that its users can be ended; whether it was done.
    What can be written is never cut off."""
    if not read_only or not storage_daemon.is_silent(site, key):
        return False
    storage_daemon.sever(site, key)
    return True


def observe(key: Key, site: Site) -> str | None:
    """The block device, if all that it stands on is there."""
    device = export_loop.find(site, key) if storage_daemon.standing(site, key) else None
    return device if device is not None and export_loop.is_whole(site, key, device) else None


def _release_forgotten(record: AnyRecord, site: Site) -> None:
    """Take away the loop device of an image of which somebody has removed all that was noted here: the record alone
    knows it, by a number that no other device is ever given.

    Raises: errors.Conflict while the device is in use.
    """
    device, sequence = record.facts.device_file, record.facts.detail.get("sequence")
    if device is None or sequence is None or export_loop.sequence(device) != sequence:
        return
    if not loop.is_free(device):
        raise block.busy(device)
    block.set_scheduler(device, NO_SCHEDULER)
    block.detach_loop(device, site.mark(record.key), sequence)


def _let_go(device: str) -> None:
    if loop.is_free(device):
        block.set_scheduler(device, NO_SCHEDULER)
    block.detach_loop(device)


def flush(site: Site, key: Key, device: str, hint: str) -> None:
    """See that all writes are in the store. An outage makes this wait; an error is the store's last word, and no
    later attempt would fare better. So it is told once, noted in the file `refused`, and then the image is let go. What
    is written and lost after that is told again.

    Raises: errors.Problem.
    """
    refused = storage_daemon.private_path(site, key, REFUSED)
    try:
        _sync(device)
    except OSError as error:
        written = _written(device)
        if _read(refused) == written:
            return
        os.makedirs(os.path.dirname(refused), mode=0o700, exist_ok=True)
        with open(refused, "w", encoding="utf-8") as note:
            note.write(written)
        raise Problem(
            f"the store refused the last writes to {device}, which are lost: {hint}; the device is let go at the next "
            "attempt",
            step="flush",
            detail=str(error),
        ) from None
    with contextlib.suppress(FileNotFoundError):
        os.unlink(refused)


def _written(device: str) -> str:
    """How many sectors were written to the device so far (Documentation/block/stat.rst)."""
    return " ".join(loop.attribute(device, "stat").split()[6:7])


def _read(path: str) -> str | None:
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        return file.read()
    return None


def _sync(device: str) -> None:
    """Raises: OSError, also when the kernel has given up the device (ENXIO)."""
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
