"""What file system a file or device holds, and how long it ought to be, read from its superblock.

The kernel answers a truncated image, a wrong type and an empty device all with EINVAL or EIO; this tells them apart.
Formats: each file system's header in the kernel tree, and file(1)'s magic for what is no file system.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import NamedTuple

SECTOR = 512


class _Probe(NamedTuple):
    """Where a superblock lies, how much of it is read, and the bytes it says the file system needs (None: not it)."""

    offset: int
    length: int
    size: Callable[[bytes], int | None]


def _squashfs(block: bytes) -> int | None:
    return int.from_bytes(block[40:48], "little") if block[:4] == b"hsqs" else None


def _erofs(block: bytes) -> int | None:
    if block[:4] != b"\xe2\xe1\xf5\xe0":
        return None
    (blocks,) = struct.unpack_from("<I", block, 36)
    if block[80] & 0x80:  # EROFS_FEATURE_INCOMPAT_48BIT
        blocks |= int.from_bytes(block[14:16], "little") << 32
    return int(blocks << block[12])


def _ext4(block: bytes) -> int | None:
    if block[56:58] != b"\x53\xef":
        return None
    (blocks,) = struct.unpack_from("<I", block, 4)
    (log_size,) = struct.unpack_from("<I", block, 24)
    if block[96] & 0x80:  # EXT4_FEATURE_INCOMPAT_64BIT
        blocks |= int.from_bytes(block[0x150:0x154], "little") << 32
    return int(blocks << (10 + min(log_size, 6)))


def _xfs(block: bytes) -> int | None:
    if block[:4] != b"XFSB":
        return None
    block_size, blocks = struct.unpack_from(">IQ", block, 4)
    return int(block_size * blocks)


def _btrfs(block: bytes) -> int | None:
    return int.from_bytes(block[0xD1:0xD9], "little") if block[64:72] == b"_BHRfS_M" else None


def _iso9660(block: bytes) -> int | None:
    if block[1:6] != b"CD001":
        return None
    return int.from_bytes(block[80:84], "little") * int.from_bytes(block[128:130], "little")


def _vfat(block: bytes) -> int | None:
    if block[510:512] != b"\x55\xaa" or b"FAT" not in (block[54:57], block[82:85]):
        return None
    small, large = int.from_bytes(block[19:21], "little"), int.from_bytes(block[32:36], "little")
    return (small or large) * int.from_bytes(block[11:13], "little")


_PROBES: dict[str, _Probe] = {
    "squashfs": _Probe(0, 96, _squashfs),
    "xfs": _Probe(0, 96, _xfs),
    "erofs": _Probe(1024, 128, _erofs),
    "ext4": _Probe(1024, 1024, _ext4),
    "btrfs": _Probe(0x10000, 0x1000, _btrfs),
    "iso9660": _Probe(0x8000, 2048, _iso9660),
    "vfat": _Probe(0, 512, _vfat),
}

_SAME = {"ext2": "ext4", "ext3": "ext4", "msdos": "vfat"}
"""Types whose images another type's driver reads as well."""

_OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"QFI\xfb", "a qcow2 image: convert it with 'qemu-img convert -O raw'"),
    (0, b"KDMV", "a VMDK image: convert it with 'qemu-img convert -O raw'"),
    (32, b"SIF_MAGIC\0", "a Singularity (SIF) image: extract its squashfs with 'apptainer sif dump'"),
    (0, b"\x1f\x8b", "gzip data: unpack it first"),
    (0, b"\xfd7zXZ\0", "xz data: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data: unpack it first"),
    (0, b"LUKS\xba\xbe", "a LUKS volume: open it with cryptsetup and attach the result"),
    (257, b"ustar", "a tar archive"),
    (512, b"LABELONE", "an LVM physical volume: attach the logical volume"),
    (512, b"EFI PART", "a partition table: give the number of a partition as 'partition'"),
    (4086, b"SWAPSPACE2", "swap space"),
    (510, b"\x55\xaa", "a partition table: give the number of a partition as 'partition'"),
    (0, b"<!DOCTYPE", "a web page, not what it links to"),
    (0, b"<!doctype", "a web page, not what it links to"),
    (0, b"<html", "a web page, not what it links to"),
    (0, b"<?xml", "an XML text, perhaps a server's error"),
)
"""Offset, magic, and what a user ought to know about an image that has it."""


def identify(fd: int) -> tuple[str, int] | None:
    """The file system on `fd` and the bytes it needs, or None for none that is known. ext2 and ext3 are "ext4"."""
    for name, probe in _PROBES.items():
        size = _size(fd, probe)
        if size is not None:
            return name, size
    return None


def _size(fd: int, probe: _Probe) -> int | None:
    block = os.pread(fd, probe.length, probe.offset)
    return probe.size(block) if len(block) == probe.length else None


def table_block(fd: int) -> int:
    """The sector, in bytes, that a partition table on `fd` counts in: nearly always 512, but a GPT says so by where its
    header is (UEFI, "GPT Header": the second sector)."""
    small, large = os.pread(fd, 8, 512), os.pread(fd, 8, 4096)
    return 4096 if large == b"EFI PART" and small != large else SECTOR


def block_size(fd: int) -> int:
    """The largest logical block, in bytes, that a loop device of the file `fd` may have. 4096 is faster with direct
    I/O; but a file system with smaller blocks cannot be mounted on it, nor a table of 512-byte sectors be read."""
    found = identify(fd)
    whole = os.lseek(fd, 0, os.SEEK_END) % 4096 == 0
    large = found is not None and found[0] in ("squashfs", "erofs") and _block(fd, found[0]) >= 4096
    return 4096 if whole and large else SECTOR


def _block(fd: int, name: str) -> int:
    """The block size of an EROFS; squashfs, which is read in bytes, takes any."""
    return 1 << os.pread(fd, 1, 1024 + 12)[0] if name == "erofs" else 4096


CHECKED_BY_KERNEL = frozenset({"squashfs"})
"""Types whose own driver refuses every superblock that is not its own, or that needs more than there is: `check` need
only explain. The others mount a truncated image, some of them."""


def check(fd: int, wanted: str) -> str | None:
    """What is wrong with `fd` (a file or device) as a file system of type `wanted`: a sentence; None when nothing
    is, or nothing can be said about that type.

    Raises: OSError.
    """
    probe = _PROBES.get(_SAME.get(wanted, wanted))
    size = None if probe is None else _size(fd, probe)
    if size is not None:
        return _truncated(fd, wanted, size)
    found = identify(fd)
    if found is not None:
        return f"it holds a file system of type {found[0]}, not {wanted}"
    known = _other(fd) or "its superblock is missing or damaged"
    return None if probe is None else f"it holds no {wanted} file system: {known}"


def describe(fd: int) -> str:
    """What a file or device holds, in words, that is no file system that was wanted. Raises: OSError."""
    found = identify(fd)
    if found is not None:
        return f"it holds a file system of type {found[0]}"
    return _other(fd) or "it begins with nothing that is known"


def _truncated(fd: int, name: str, size: int) -> str | None:
    there = os.lseek(fd, 0, os.SEEK_END) // SECTOR * SECTOR
    if there >= size:
        return None
    return f"its {name} file system is truncated: it needs {size} bytes and has {there}, {size - there} too few"


def _other(fd: int) -> str:
    """What it is, when that is known and no file system; else ""."""
    head = os.pread(fd, 4096, 0)
    for offset, magic, words in _OTHERS:
        if head[offset : offset + len(magic)] == magic:
            return f"it is {words}"
    return "" if head.strip(b"\0") else "it begins with nothing but zeros"
