"""An image file as a block device: a loop device, found again by our mark in its name."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack

from imageapi.config import Site
from imageapi.drivers import block
from imageapi.drivers.base import LocalDriver
from imageapi.drivers.paths import open_path, reopen
from imageapi.errors import Invalid, Unsupported
from imageapi.linux import loop, superblock
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Loopback


class Driver(LocalDriver):
    """The kind `loopback`."""

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        """`detail` of the facts: see `_facts`; `cut` the bytes at the file's end that fill no sector, and which the
        device therefore lacks."""
        definition: Loopback = record.definition
        mark = site.mark(record.key)
        with ExitStack() as undo, ExitStack() as opened:
            path = open_path(definition, inputs)
            opened.callback(os.close, path)
            found = os.fstat(path)
            _check_file(definition.path, found)
            file, read_only = _open(path, read_only=definition.ro)
            opened.callback(os.close, file)
            device, state = attach(file, mark, definition, read_only=read_only)
            undo.callback(loop.detach, device, mark)
            facts = _facts(device, state)
            facts.detail["cut"] = found.st_size % superblock.SECTOR
            undo.pop_all()
        return facts

    def release(self, record: AnyRecord, site: Site) -> None:
        device = record.facts.device_file or _find(record, site)
        if device is not None:
            block.detach_loop(device, site.mark(record.key))

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        device = _find(record, site)
        state = None if device is None else loop.status(device)
        return None if device is None or state is None else _facts(device, state)


def _find(record: AnyRecord, site: Site) -> str | None:
    return block.find_loop(site.mark(record.key), record.facts.device_file)


def _facts(device: str, state: loop.Status) -> Facts:
    """`read_only` is the device's, which may be so where the definition is not; `backing` the file's st_dev and
    st_ino."""
    return Facts(device_file=device, detail={"read_only": state.read_only, "backing": list(state.backing)})


def _check_file(path: str, found: os.stat_result) -> None:
    """Raises: errors.Invalid for what is no image file."""
    if stat.S_ISDIR(found.st_mode):
        raise Invalid(f"'{path}' is a directory; give an image file, or use the mount kind 'bind'", path="$.path")
    if stat.S_ISBLK(found.st_mode):
        raise Invalid(f"'{path}' is a block device already; use the kind 'local'", path="$.path")
    if not stat.S_ISREG(found.st_mode):
        raise Invalid(f"'{path}' is no regular file; give an image file", path="$.path")
    if found.st_size < superblock.SECTOR:
        what = "is empty" if found.st_size == 0 else f"has {found.st_size} bytes, less than one sector"
        raise Invalid(f"'{path}' {what}; give an image file", path="$.path")


_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ETXTBSY)


def _open(path: int, *, read_only: bool) -> tuple[int, bool]:
    """The file read-write, or read-only where that is asked for or file or file system allow no more."""
    if not read_only:
        try:
            return reopen(path, os.O_RDWR), False
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
    return reopen(path, os.O_RDONLY), True


def attach(file: int, mark: str, definition: Loopback, *, read_only: bool) -> tuple[str, loop.Status]:
    """The open `file` on a free loop device that carries our mark. Raises: errors.Unsupported; OSError."""
    partitions = definition.readPartitions
    block_size = superblock.table_block(file) if partitions else superblock.block_size(file)
    try:
        return loop.attach(file, mark, read_only=read_only, block_size=block_size, partitions=partitions)
    except OSError as error:
        if error.filename == "/dev/loop-control" and error.errno in (errno.ENOENT, errno.ENODEV):
            raise Unsupported("this kernel has no loop devices: 'modprobe loop' must succeed") from None
        raise
