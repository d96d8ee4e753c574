"""Letting go of a block device, and who keeps it."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Mapping
from functools import partial

from imageapi.drivers import holders, partitions
from imageapi.drivers.audit import Host
from imageapi.errors import Conflict, Invalid, TimedOut
from imageapi.linux import blockqueue, loop, mountinfo, users
from imageapi.records import Facts, Helper

ASKING = 1.0
"""Seconds for a device that nobody knows to say whose it is."""


def marked(prefix: str, file: str = "") -> dict[str, str]:
    """The loop devices whose name begins with `prefix`, by name; but for those on what a storage helper exports, a
    file that is a FUSE mount. Whoever asks for the name asks the file, and one that is another host's may hang: so
    those are asked aside, and what does not answer is left out. Where the path ends with `file`, the caller depends on
    it, and it is asked all the same."""
    return _marked(prefix, file, "")[0]


def _marked(prefix: str, file: str, only: str) -> tuple[dict[str, str], list[str]]:
    """The same, of those on a file with the path `only` (any, when ""); and the devices that did not answer."""
    host, exports = Host(), _exports()
    backing = {device: path for device in loop.in_use() if (path := loop.backing_path(device)) == only or not only}
    sure = {device for device, path in backing.items() if (file and path.endswith(file)) or _is_here(path, host)}
    doubtful = [device for device, path in backing.items() if device not in sure and path not in exports]
    names, silent = _asked_aside(doubtful, prefix)
    return loop.marked(prefix, among=sure) | names, silent


def _is_here(path: str, host: Host) -> bool:
    """Whether a file is this host's own. What is not mounted at any path any more shows one that leads nowhere."""
    return host.is_local(path) and os.path.lexists(path) and not os.path.isdir(path)


def _asked_aside(devices: Collection[str], prefix: str) -> tuple[dict[str, str], list[str]]:
    """Those of the devices whose name begins with `prefix`, by name, and those that did not answer."""
    if not devices:
        return {}, []
    from imageapi.linux import killable  # only few have use for it, and all are forked from one that loads nothing more

    answers = killable.ask({device: partial(loop.status, device) for device in devices}, ASKING)
    silent = [device for device, answer in answers.items() if isinstance(answer, TimeoutError)]
    return _names(answers, prefix), silent


def _names(answers: Mapping[str, object], prefix: str) -> dict[str, str]:
    found = {state.name: device for device, state in answers.items() if isinstance(state, loop.Status)}
    return {name: device for name, device in found.items() if name.startswith(prefix)}


def _exports() -> set[str]:
    return {each.mountpoint for each in mountinfo.read(mention="fuse") if each.fstype.startswith("fuse")}


def marked_besides(prefix: str, known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The same without the devices `known`, each asked aside; and the devices that did not answer: anybody's file may
    be on a server that is gone."""
    exports = _exports()
    devices = [each for each in loop.in_use() if each not in known and loop.backing_path(each) not in exports]
    return _asked_aside(devices, prefix)


def find_loop(mark: str, known: str | None, file: str = "", *, only: str = "") -> str | None:
    """The loop device that carries our `mark`: the one `known` from the record, else, when a crash came before that was
    written, any, or one on a file with the path `only`; also one on `file` (see `marked`).

    Raises: errors.TimedOut when it is not found, and may be one of those that did not answer. What is mounted is none
    of them: whatever stood on ours was released before.
    """
    if known is not None:
        state = loop.status(known)
        return known if state is not None and state.name == mark else None
    names, silent = _marked(mark, file, only)
    if mark not in names and (unused := _unmounted(silent)):
        raise _untold(mark, unused)
    return names.get(mark)


def _unmounted(devices: Collection[str]) -> list[str]:
    mounted = {each.dev for each in mountinfo.read()} if devices else set[str]()
    return [device for device in devices if loop.attribute(device, "dev") not in mounted]


def _untold(mark: str, silent: Iterable[str]) -> TimedOut:
    devices = ", ".join(f"{device} on {loop.backing_path(device)}" for device in silent)
    return TimedOut(
        f"it is not known whether {mark} has a loop device still, since these do not say whose they are: {devices}; "
        "their store does not answer: see to it, or detach what nobody needs with 'losetup -d'; it is tried again"
    )


def facts(device: str, helper: Helper | None = None) -> Facts:
    """What an attachment has learnt whose device is `device`. `device_id` is the number in its name, as in /dev/rbd0;
    /dev/sda has none."""
    number = device.lstrip("/abcdefghijklmnopqrstuvwxyz-")
    return Facts(device_file=device, device_id=int(number) if number.isdigit() else None, helper=helper)


def detach_loop(device: str, name: str | None = None, sequence: int | None = None) -> None:
    """Take a loop device off its file, if it still carries `name` (any, when None). Idempotent. `sequence`: see
    loop.detach.

    Raises: errors.Conflict naming who has it mounted or open; OSError.
    """
    if not holders.until(lambda: _detached(device, name, sequence)):
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


def _detached(device: str, name: str | None, sequence: int | None) -> bool:
    try:
        loop.detach(device, name, sequence)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def is_free(device: str) -> bool:
    """Whether nobody has the device, or a partition of it, mounted or open. The maps that kpartx makes of a multipath
    device's partitions hold it, and go with it. One that is gone, or not quite there yet, is free."""
    try:
        parts, above = _partitions(device), _above(device)
    except FileNotFoundError:
        return True
    held = parts if above and above <= parts else {device, *parts}
    return all(map(loop.is_free, held)) and not users.using(device, *parts)


def busy(device: str) -> Conflict:
    """The refusal to let go of `device`: its mounts here and in other mount namespaces, the devices on it, and the
    processes that have it open; its partitions' too. Nothing here asks the device itself."""
    parts = _partitions(device)
    devs = {_dev(each) for each in (device, *parts)}
    mounts = [f"the mount at {each.mountpoint}" for each in mountinfo.read() if each.dev in devs]
    devices = sorted(_above(device).union(*map(_above, parts)) - parts)
    pids = [*(pid for dev in devs for pid in mountinfo.holders(dev)), *users.using(device, *parts)]
    if not (pids or mounts or devices) and (waits := waiting(device)):
        return waits
    return holders.busy(device, pids, [*mounts, *devices])


def waiting(device: str) -> Conflict | None:
    """The refusal because of requests that the device has not answered, if there are any. Who made them may have ended,
    or be a file system that is unmounted already as far as anybody can see."""
    name = os.path.basename(os.path.realpath(f"/sys/dev/block/{_dev(device)}"))
    if not (number := blockqueue.in_flight(name)):
        return None
    what = f"{number} requests that its store has not answered"
    return Conflict(f"{device} has {what}: see to the store; it is free when they are answered", holders=[what])


def _partitions(device: str) -> set[str]:
    return {each.device for each in partitions.read(device).values()}


def _above(device: str) -> set[str]:
    """The block devices that stand on it."""
    return {f"/dev/{name}" for name in os.listdir(f"/sys/dev/block/{_dev(device)}/holders")}


def _dev(device: str) -> str:
    number = os.stat(device).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"
