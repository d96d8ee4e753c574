"""The file system on an attachment's block device."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from contextlib import ExitStack

from imageapi import spec
from imageapi.config import Site
from imageapi.drivers import holders, mounts
from imageapi.drivers.base import LocalDriver, driver
from imageapi.errors import Conflict, Invalid, Problem, Unsupported
from imageapi.linux import filesystems, kmsg, loop, mount, mountinfo, superblock, users
from imageapi.linux.mountinfo import Mount
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Attach

BLKROGET = 0x125E
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Driver(LocalDriver):
    """The kind `attach`. Device nodes in the image mean nothing (nodev); what is attached read-only is mounted so."""

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        definition: Attach = record.definition
        [on] = inputs
        device = on.facts.device_file
        if device is None:
            raise Invalid(f"{on.key} has no block device", path="$.attach")
        _check_type(definition.fs_type)
        flags, data = mount.split_options(definition.mount_options)
        if definition.fs_type not in superblock.CHECKED_BY_KERNEL:
            _check_content(device, definition.fs_type)
        read_only = driver("attach", on.kind).read_only(on.definition) or _is_read_only(device)
        staging = 0 if flags & mount.MS_NOSUID else mount.MOUNT_ATTR_NOSUID
        flags |= mount.MS_NODEV | mount.MS_NOSUID | mount.MS_RDONLY * read_only
        with ExitStack() as undo:
            path = mounts.make_directory(undo, site.mountpoint(record.token))
            _mount(device, path, definition, flags, data)
            undo.callback(mount.umount, path)
            detail = {**mounts.made(record, site), "device": device, "staging": staging}
            undo.pop_all()
        return Facts(mountpoint=path, detail=detail)

    def release(self, record: AnyRecord, site: Site) -> None:
        device = _device_of(record, site)
        mounts.release(record, site)
        if device is not None:
            _check_let_go(device)

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        return mounts.observe(record, site, lambda found: _facts(site.mountpoint(record.token), found))

    def read_only(self, definition: Attach) -> bool:
        """A reference says nothing of its attachment: then only the options count."""
        flags, _ = mount.split_options(definition.mount_options)
        below = spec.definition(definition.attach)
        kind = definition.attach.kind
        on_read_only = kind is not None and below is not None and driver("attach", kind).read_only(below)
        return on_read_only or bool(flags & mount.MS_RDONLY)


def _facts(path: str, found: Mount) -> Facts:
    return Facts(mountpoint=path, detail={"dev": found.dev, "device": found.source})


# --------------------------------------------------------------------------------------------- before the mount


def _check_type(fs_type: str) -> None:
    needs = filesystems.needs_device(fs_type)
    if needs is None:
        raise Unsupported(
            f"this kernel has no file system '{fs_type}'; 'modprobe {fs_type}' must succeed", path="$.fs_type"
        )
    if not needs:
        raise Invalid(f"'{fs_type}' is no file system of block devices", path="$.fs_type")


def _check_content(device: str, fs_type: str) -> None:
    """Raises: errors.Invalid when the device holds no such file system."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        wrong = superblock.check(fd, fs_type)
    finally:
        os.close(fd)
    if wrong:
        raise Invalid(f"{device} cannot be mounted as {fs_type}: {wrong}", path="$.fs_type")


def _is_read_only(device: str) -> bool:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return bool(int.from_bytes(fcntl.ioctl(fd, BLKROGET, bytes(4)), "little"))
    finally:
        os.close(fd)


# -------------------------------------------------------------------------------------------------- the mount


def _mount(device: str, path: str, definition: Attach, flags: int, data: list[str]) -> None:
    try:
        mount.mount(device, path, definition.fs_type, flags, ",".join(data))
    except OSError:
        _check_content(device, definition.fs_type)
        _mount_again(device, path, definition, flags, data)


def _mount_again(device: str, path: str, definition: Attach, flags: int, data: list[str]) -> None:
    """The same, with an ear to what the kernel says of it: listening costs half as much as a mount."""
    with kmsg.Tail() as log:
        try:
            mount.mount(device, path, definition.fs_type, flags, ",".join(data))
        except OSError as error:
            words = log.about(os.path.basename(device))
            refused = _refusal(error, device, definition, flags, data, words)
            if refused is None:
                raise
            raise refused from None


_DAMAGED = (errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EILSEQ, errno.ERANGE)


def _refusal(
    error: OSError, device: str, definition: Attach, flags: int, data: list[str], words: str
) -> Problem | None:
    """What the kernel's refusal means, or None when it says all there is to say."""
    fs_type, name = definition.fs_type, errno.errorcode.get(error.errno or 0, "")
    match error.errno:
        case errno.EINVAL:
            return _refused_options(device, definition, flags, data, words)
        case errno.EBUSY:
            return Conflict(
                f"{device} is mounted with other options already, or held by another program",
                holders=_mounted_at(device),
                errno=name,
            )
        case errno.EROFS | errno.EACCES:
            return Invalid(
                f"the {fs_type} file system must be repaired before it is mounted, and {device} is read-only: attach "
                "it read-write once, or give the option that leaves its journal alone (ext4: noload, xfs: norecovery)",
                path="$.mount_options",
                errno=name,
                detail=words,
            )
        case number if number in _DAMAGED:
            return Invalid(
                f"the {fs_type} file system on {device} is damaged; look at it with fsck, or make the image again",
                path="$.attach",
                errno=name,
                detail=words,
            )
    return None


def _mounted_at(device: str) -> list[str]:
    return [f"the mount at {each.mountpoint}" for each in mountinfo.read(mention=device) if each.source == device]


def _refused_options(device: str, definition: Attach, flags: int, data: list[str], words: str) -> Problem:
    pairs = (option.partition("=") for option in data)
    asked: dict[str, str | None] = {"ro": None} if flags & mount.MS_RDONLY else {}
    asked |= {key: value if equals else None for key, equals, value in pairs}
    words = mount.explain(definition.fs_type, device, asked) or words
    for at, option in enumerate(definition.mount_options):
        key = option.partition("=")[0]
        if f"'{key}'" in words or f"option {key}" in words:
            path = f"$.mount_options[{at}]"
            return Invalid(f"{definition.fs_type} refuses the option '{option}': {words}", path=path, detail=words)
    sentence = f"the kernel does not mount {device} as {definition.fs_type}: {words or 'it gives no reason'}"
    return Invalid(sentence, detail=words, errno="EINVAL")


# -------------------------------------------------------------------------------------------------- the release


def _device_of(record: AnyRecord, site: Site) -> str | None:
    """The device that the mount is of. One that is gone already must let its device go, too; but another boot's is
    another device."""
    device: str | None = record.facts.detail.get("device")
    if mounts.stands(record, site):
        return device
    if standing := mounts.find(record, site):
        return standing.source
    with open(_BOOT_ID) as file:
        boot_id = file.read().strip()
    return device if record.boot_id in ("", boot_id) else None


def _check_let_go(device: str) -> None:
    """Raises: errors.Conflict while the file system is up without any mount here: a copy in another mount namespace,
    a detached tree or an overlay holds it. Another mount of it here is no leftover of ours."""
    if loop.is_free(device) or _mounted_at(device) or holders.until(lambda: loop.is_free(device)):
        return
    raise holders.busy(f"the file system on {device}", [*mounts.elsewhere(device), *users.using(device)])
