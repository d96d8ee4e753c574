"""Letting go of a block device, and who keeps it."""

from __future__ import annotations

import errno
import os

from imageapi.drivers import holders
from imageapi.errors import Conflict, Invalid
from imageapi.linux import blockqueue, loop, mountinfo, users
from imageapi.records import Facts


def marked(prefix: str) -> dict[str, str]:
    """The loop devices whose name begins with `prefix`, by name; but for those on what a storage helper exports, a
    file that is a FUSE mount: whoever asks for the name asks that file, and it may hang."""
    exports = {each.mountpoint for each in mountinfo.read(mention="fuse") if each.fstype.startswith("fuse")}
    return loop.marked(prefix, skip=exports)


def find_loop(mark: str, known: str | None) -> str | None:
    """The loop device that carries our `mark`: the one `known` from the record, else, when a crash came before that was
    written, any."""
    if known is not None:
        state = loop.status(known)
        return known if state is not None and state.name == mark else None
    return marked(mark).get(mark)


def facts(device: str) -> Facts:
    """What an attachment has learnt whose device is `device`. `device_id` is the number in its name, as in /dev/rbd0;
    /dev/sda has none."""
    number = device.lstrip("/abcdefghijklmnopqrstuvwxyz-")
    return Facts(device_file=device, device_id=int(number) if number.isdigit() else None)


def detach_loop(device: str, name: str | None = None) -> None:
    """Take a loop device off its file, if it still carries `name` (any, when None). Idempotent.

    Raises: errors.Conflict naming who has it mounted or open; OSError.
    """
    if not holders.until(lambda: _detached(device, name)):
        raise busy(device)


def set_scheduler(device: str, scheduler: str) -> None:
    """Give a device an I/O scheduler, unless it has it: that takes the kernel some 20 ms, for which the queue stands.

    Raises: errors.Invalid naming those that the kernel has.
    """
    name = os.path.basename(device)
    known = blockqueue.schedulers(name)
    if known[:1] == [scheduler]:
        return
    try:
        blockqueue.set_scheduler(name, scheduler)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Invalid(
            f"this kernel has no I/O scheduler '{scheduler}': it has {', '.join(known)}", path="$.scheduler"
        ) from None


def _detached(device: str, name: str | None) -> bool:
    try:
        loop.detach(device, name)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def busy(device: str) -> Conflict:
    """The refusal to let go of `device`: its mounts here and in other mount namespaces, the devices on it, and the
    processes that have it open. Nothing here asks the device itself."""
    number = os.stat(device).st_rdev
    dev = f"{os.major(number)}:{os.minor(number)}"
    mounts = [f"the mount at {each.mountpoint}" for each in mountinfo.read() if each.dev == dev]
    devices = [f"/dev/{name}" for name in os.listdir(f"/sys/dev/block/{dev}/holders")]
    return holders.busy(device, [*mountinfo.holders(dev), *users.using(device)], [*mounts, *devices])
