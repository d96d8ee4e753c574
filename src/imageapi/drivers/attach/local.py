"""A block device the host has already. Nothing is made, and nothing undone."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from imageapi.config import Site
from imageapi.drivers import partitions, paths
from imageapi.drivers.base import LocalDriver
from imageapi.errors import Invalid
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Local


class Driver(LocalDriver):
    """The kind `local`. `ro` makes the mounts on it read-only; the device stays as it is."""

    def store(self, definition: Local) -> str:
        return paths.store(definition.path)

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        definition: Local = record.definition
        _check_medium(definition.path)
        if definition.readPartitions:
            partitions.have_read(definition.path)
        return Facts(device_file=definition.path, detail={"rdev": _number(definition.path)})

    def release(self, record: AnyRecord, site: Site) -> None:
        """The device is the host's."""

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        path = record.definition.path
        try:
            number = _number(path)
        except Invalid:
            return None
        same = record.facts.detail.get("rdev", number) == number
        return Facts(device_file=path, detail={"rdev": number}) if same else None


def _number(path: str) -> str:
    """The "major:minor" of the block device at `path`. Raises: errors.Invalid when there is none."""
    if not path.startswith("/"):
        raise Invalid(f"'{path}' is relative, to nothing; give the path of a block device", path="$.path")
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise Invalid(f"there is no '{path}' on this host; lsblk lists the devices it has", path="$.path") from None
    except OSError as error:
        raise paths.refusal(error, path) from None
    if not stat.S_ISBLK(found.st_mode):
        hint = "; for an image file use the kind 'loopback'" if stat.S_ISREG(found.st_mode) else ""
        raise Invalid(f"'{path}' is no block device{hint}", path="$.path")
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def _check_medium(path: str) -> None:
    _number(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM):
            raise
        raise Invalid(f"'{path}' is the node of a device that is not there", path="$.path") from None
    try:
        if os.lseek(fd, 0, os.SEEK_END) == 0:
            raise Invalid(f"'{path}' has no medium: its size is 0", path="$.path")
    finally:
        os.close(fd)
