"""The loop device on a storage daemon's file.

It carries our mark, but is not looked for by it: LOOP_GET_STATUS64 asks the file for its attributes, which fails once
the daemon is dead and hangs while it hangs. sysfs names the file without touching it. The device is noted beside the
file, with the kernel's sequence number (diskseq, which is never given twice; `-` before Linux 5.15): so a host's other
devices need not be gone through, and it is known also when sysfs shows `/`, because a daemon that ended by itself took
its mount along.
"""

from __future__ import annotations

import contextlib
import os
import zlib

from imageapi.config import Site
from imageapi.drivers.storage_daemon import export_path, private_path
from imageapi.errors import Conflict
from imageapi.linux import loop, mountinfo, sysfs
from imageapi.records import Key

NOTE = "loop"
"""The file beside the export: `loop3 41 1048576 2868472`: the device, its sequence number, the size of the image in
bytes, and a checksum of its first `HEAD` bytes, where file systems have what tells one from another."""

HEAD = 4096

CHANGING = "?"
"""The sequence number of a device that is being put on its file, which gives it another one: whoever dies over that has
not noted it, and the daemon may have ended by then as well."""


def attach(site: Site, key: Key, *, read_only: bool, partitions: bool = False) -> str:
    """Put a loop device on the exported file and return its path; have its partition table read, if it is to be.

    One that can be written is not told to go past the page cache: then the kernel sends one write after another.
    Several at once QEMU mixes up (seen with 7.2): while it carries one out it reads the next into the same buffer,
    which the first may not have left yet. It was mended in 2025 ("fuse: Copy write buffer content before polling").

    Raises: OSError.
    """
    file = os.open(export_path(site, key), (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        likeness = _likeness(file)
        device, _ = loop.attach(
            file,
            site.mark(key),
            read_only=read_only,
            direct_io=read_only,
            partitions=partitions,
            before=lambda device: _note(site, key, device, *likeness, sequence=CHANGING),
        )
        _note(site, key, device, *likeness)
    finally:
        os.close(file)
    return device


def move(site: Site, key: Key, device: str) -> None:
    """Put a device that is only read on the file that is exported now, whatever is mounted on it. Done again, it
    finishes what a death has left half done.

    Raises: errors.Conflict when it is another image than before; OSError.
    """
    likeness = _noted_likeness(site, key)
    file = os.open(export_path(site, key), os.O_RDONLY | os.O_CLOEXEC)
    try:
        if likeness != _likeness(file):
            raise Conflict(
                f"the image is not what it was when {device} was put on it: stop what uses it, delete it, and make it "
                "again"
            )
        _note(site, key, device, *likeness, sequence=CHANGING)
        loop.change_file(device, file, site.mark(key), lambda: find(site, key) == device)
        _note(site, key, device, *likeness)
    finally:
        os.close(file)


def is_whole(site: Site, key: Key, device: str) -> bool:
    """Whether the device stands on the file that is exported now, and from its begin."""
    name = os.path.basename(device)
    file = mountinfo.place(export_path(site, key))
    return (_sysfs(name, "loop/backing_file"), _sysfs(name, "loop/offset")) == (file, "0")


def _likeness(file: int) -> tuple[str, str]:
    """What another image has not in common with this one: its size, and a checksum of how it begins."""
    return str(os.fstat(file).st_size), str(zlib.crc32(os.pread(file, HEAD, 0)))


def _noted_likeness(site: Site, key: Key) -> tuple[str, str]:
    """Raises: errors.Conflict where a device was made by somebody who did not note it."""
    with contextlib.suppress(OSError, ValueError), open(private_path(site, key, NOTE), encoding="ascii") as note:
        _, _, size, checksum = note.read().split()
        return size, checksum
    raise Conflict("it is not known any more what its image was: stop what uses it, delete it, and make it again")


def _note(site: Site, key: Key, device: str, size: str, checksum: str, *, sequence: str = "") -> None:
    name = os.path.basename(device)
    path = private_path(site, key, NOTE)
    with open(f"{path}.new", "w", encoding="ascii") as note:
        note.write(f"{name} {sequence or _sequence(name)} {size} {checksum}")
    os.rename(f"{path}.new", path)


def find(site: Site, key: Key) -> str | None:
    """The device that stands on the file of `key`. A caller that was killed may not have noted it: then all are
    looked at."""
    file = mountinfo.place(export_path(site, key))
    noted = _noted(private_path(site, key, NOTE), file)
    unnoted = (name for name in _loops() if _sysfs(name, "loop/backing_file") == file)
    name = noted or next(unnoted, None)
    return None if name is None else f"/dev/{name}"


def _noted(note: str, file: str) -> str | None:
    try:
        with open(note, encoding="ascii") as opened:
            name, sequence, *_ = opened.read().split()
    except (FileNotFoundError, ValueError):
        return None
    backing = _sysfs(name, "loop/backing_file")
    still_there = backing == file or (backing == "/" and (sequence == CHANGING or sequence == _sequence(name)))
    return name if still_there else None


def _loops() -> list[str]:
    return [name for name in os.listdir("/sys/block") if name.startswith("loop")]


def sequence(device: str) -> int | None:
    """The kernel's number for what a loop device is now; None when it is free, and before Linux 5.15."""
    number = _sequence(os.path.basename(device))
    return int(number) if number.isdigit() and loop.backing_path(device) else None


def _sequence(name: str) -> str:
    return _sysfs(name, "diskseq") or "-"


def _sysfs(name: str, attribute: str) -> str:
    """An attribute of a block device; empty when it has none."""
    try:
        return sysfs.read(f"/sys/block/{name}/{attribute}")
    except OSError:
        return ""
