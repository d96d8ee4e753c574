"""The file system on an attachment's block device."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from imageapi import spec
from imageapi.config import Site
from imageapi.drivers import block, holders, mounts, partitions
from imageapi.drivers.base import driver
from imageapi.drivers.mounts import MountDriver
from imageapi.errors import Conflict, Invalid, Problem, Unsupported
from imageapi.linux import filesystems, kmsg, loop, mount, mountinfo, superblock, users
from imageapi.linux.mountinfo import Mount
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Attach

if TYPE_CHECKING:
    from imageapi.drivers.mount_options import Given

BLKROGET = 0x125E
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Driver(MountDriver):
    """The kind `attach`. Device nodes in the image mean nothing (nodev); what is attached read-only is mounted so."""

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        wanted = _wanted(record.definition, inputs[0])
        with ExitStack() as undo:
            path = mounts.make_directory(undo, site.mountpoint(record.token))
            _mount(wanted, path)
            undo.callback(mount.umount, path)
            detail = {**mounts.made(record, site), "device": wanted.device, "staging": wanted.staging}
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
        """A reference says nothing of its attachment: then only type and options count."""
        flags, _ = mount.split_options(definition.mount_options)
        below = spec.definition(definition.attach)
        kind = definition.attach.kind
        on_read_only = kind is not None and below is not None and driver("attach", kind).read_only(below)
        never = definition.fs_type in filesystems.NEVER_WRITTEN
        return never or on_read_only or bool(flags & mount.MS_RDONLY)


def _facts(path: str, found: Mount) -> Facts:
    return Facts(mountpoint=path, detail={"dev": found.dev, "device": found.source})


# --------------------------------------------------------------------------------------------- before the mount


class _Wanted(NamedTuple):
    """A mount that is asked for: MS_ flags, those of its MOUNT_ATTR_* that are for staging alone, and the file system's
    own options."""

    device: str
    fs_type: str
    flags: int
    staging: int
    options: list[Given]

    @property
    def data(self) -> str:
        return ",".join(map(str, self.options))


def _wanted(definition: Attach, on: AnyRecord) -> _Wanted:
    """Raises: errors.Problem for what can be seen to fail."""
    if on.facts.device_file is None:
        raise Invalid(f"{on.key} has no block device", path="$.attach")
    _check_type(definition.fs_type)
    flags, options = _read_options(definition)
    device = on.facts.device_file
    if definition.partition is not None:
        device = partitions.find(device, definition.partition)
    if definition.fs_type not in superblock.CHECKED_BY_KERNEL:
        _check_content(device, definition.fs_type)
    never = definition.fs_type in filesystems.NEVER_WRITTEN
    read_only = never or driver("attach", on.kind).read_only(on.definition) or _is_read_only(device)
    staging = 0 if flags & mount.MS_NOSUID else mount.MOUNT_ATTR_NOSUID
    flags |= mount.MS_NODEV | mount.MS_NOSUID | mount.MS_RDONLY * read_only
    return _Wanted(device, definition.fs_type, flags, staging, options)


def _check_type(fs_type: str) -> None:
    needs = filesystems.needs_device(fs_type)
    if needs is None:
        known = ", ".join(sorted(name for name, on_device in filesystems.known().items() if on_device))
        raise Unsupported(f"{filesystems.lack(fs_type)}; at present it has {known}", path="$.fs_type")
    if not needs:
        raise Invalid(f"'{fs_type}' is no file system of block devices", path="$.fs_type")


def _read_options(definition: Attach) -> tuple[int, list[Given]]:
    """The MS_ flags and the file system's own options. Raises: errors.Invalid for one that it does not have."""
    if not definition.mount_options:
        return 0, []
    from imageapi.drivers import filesystem_options, mount_options

    table = filesystem_options.table(definition.fs_type)
    return mount_options.read(definition.mount_options, table, definition.fs_type, "$.mount_options")


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


def _mount(wanted: _Wanted, path: str) -> None:
    try:
        mount.mount(wanted.device, path, wanted.fs_type, wanted.flags, wanted.data)
    except OSError:
        _check_content(wanted.device, wanted.fs_type)
        _mount_again(wanted, path)


def _mount_again(wanted: _Wanted, path: str) -> None:
    """The same, with an ear to what the kernel says of it: listening costs half as much as a mount."""
    with kmsg.Tail() as log:
        try:
            mount.mount(wanted.device, path, wanted.fs_type, wanted.flags, wanted.data)
        except OSError as error:
            refused = _refusal(error, wanted, log.about(os.path.basename(wanted.device)))
            if refused is None:
                raise
            raise refused from None


_DAMAGED = (errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EILSEQ, errno.ERANGE)


def _refusal(error: OSError, wanted: _Wanted, words: str) -> Problem | None:
    """What the kernel's refusal means, or None when it says all there is to say."""
    fs_type, device = wanted.fs_type, wanted.device
    fields = {"errno": errno.errorcode.get(error.errno or 0, ""), "detail": words}
    match error.errno:
        case errno.EINVAL | errno.EEXIST if "duplicate UUID" in words or error.errno == errno.EEXIST:
            remedy = "with the option nouuid they stand side by side" if fs_type == "xfs" else "delete that mount first"
            sentence = f"a copy of the {fs_type} file system on {device}, with the same UUID, is mounted already"
            return Conflict(f"{sentence}; {remedy}", **fields)
        case errno.EINVAL:
            return _refused_options(wanted, words)
        case errno.EBUSY:
            sentence = f"{device} is mounted with other options already, or held by another program"
            return Conflict(sentence, holders=_mounted_at(device), **fields)
        case errno.E2BIG:
            from imageapi.drivers import mount_options

            return mount_options.too_long("$.mount_options")
        case errno.EROFS | errno.EACCES:
            return Invalid(
                f"the {fs_type} file system must be repaired before it is mounted, and {device} is read-only: attach "
                "it read-write once, or give the option that leaves its journal alone (ext4: noload, xfs: norecovery, "
                "btrfs: rescue=nologreplay)",
                path="$.mount_options",
                **fields,
            )
        case number if number in _DAMAGED:
            sentence = f"the {fs_type} file system on {device} is damaged; check it with fsck, or make the image again"
            return Invalid(sentence, path="$.attach", **fields)
    return None


def _mounted_at(device: str) -> list[str]:
    return [f"the mount at {each.mountpoint}" for each in mountinfo.read(mention=device) if each.source == device]


def _refused_options(wanted: _Wanted, words: str) -> Problem:
    asked: dict[str, str | None] = {"ro": None} if wanted.flags & mount.MS_RDONLY else {}
    asked |= {each.name: each.value for each in wanted.options}
    words = mount.explain(wanted.fs_type, wanted.device, asked) or words
    fields = {"errno": "EINVAL", "detail": words}
    for each in wanted.options:
        if f"'{each.name}'" in words or f"option {each.name}" in words:
            sentence = f"{wanted.fs_type} refuses the option '{each}': {words}"
            return Invalid(sentence, path=each.path, **fields)
    sentence = f"the kernel does not mount {wanted.device} as {wanted.fs_type}: {words or 'it gives no reason'}"
    return Invalid(sentence, **fields)


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
    what, users_of = f"the file system on {device}", [*mounts.elsewhere(device), *users.using(device)]
    if users_of:
        raise holders.busy(what, users_of)
    raise block.waiting(device) or Conflict(
        f"{what} is in use, and the kernel does not say by whom: a process may have a copy of the mount, or what was "
        "written still waits for its store; see to both"
    )
