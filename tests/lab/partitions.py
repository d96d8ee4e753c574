"""Partitions on a kernel that reads no tables (<linux/blkpg.h>)."""

from __future__ import annotations

import ctypes
import fcntl
import struct
import uuid
import zlib

BLKPG = 0x1269
BLKPG_ADD_PARTITION = 1


def add_partition(device: str, start: int, length: int, number: int = 1) -> str:
    """Partition `number` of `device`, at these bytes, as BLKPG adds one without a table. It goes with the device."""
    partition = ctypes.create_string_buffer(struct.pack("=qqi128x4x", start, length, number))
    request = struct.pack("@iiiP", BLKPG_ADD_PARTITION, 0, len(partition), ctypes.addressof(partition))
    with open(device, "rb") as whole:
        fcntl.ioctl(whole, BLKPG, request)
    return f"{device}p{number}"


# ---------------------------------------------------------------------------------------------------- tables

ENTRIES, ENTRY = 128, 128
LINUX_DATA = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
MEGABYTE = 1 << 20


def gpt(*contents: bytes, sector: int = 512) -> bytes:
    """A disk with a GPT (UEFI 5.3) whose partitions have these contents, each at a megabyte of its own."""
    starts, disk = _laid_out(contents)
    size = len(disk) + MEGABYTE
    last = size // sector - 1
    table = b"".join(_entry(start, len(content), sector) for start, content in zip(starts, contents, strict=True))
    table = table.ljust(ENTRIES * ENTRY, b"\0")
    backup = last - len(table) // sector
    disk[0:512] = _mbr([(0xEE, 1, last)])
    disk[sector : sector + 92] = _header(1, last, 2, table, size // sector)
    disk[2 * sector : 2 * sector + len(table)] = table
    disk += bytes(MEGABYTE)
    disk[backup * sector : last * sector] = table
    disk[last * sector : last * sector + 92] = _header(last, 1, backup, table, size // sector)
    return bytes(disk)


def msdos(*contents: bytes) -> bytes:
    """A disk with a table as MS-DOS had it, of at most four partitions."""
    starts, disk = _laid_out(contents)
    entries = [(0x83, start // 512, len(content) // 512) for start, content in zip(starts, contents, strict=True)]
    disk[0:512] = _mbr(entries)
    return bytes(disk)


def _laid_out(contents: tuple[bytes, ...]) -> tuple[list[int], bytearray]:
    starts, disk = [], bytearray(MEGABYTE)
    for content in contents:
        starts.append(len(disk))
        disk += content.ljust(-(-len(content) // MEGABYTE) * MEGABYTE, b"\0")
    return starts, disk


def _mbr(entries: list[tuple[int, int, int]]) -> bytes:
    """Type, first sector and number of sectors of each."""
    packed = b"".join(struct.pack("<B3sB3sII", 0, b"", kind, b"", first, count) for kind, first, count in entries)
    return bytes(446) + packed.ljust(64, b"\0") + b"\x55\xaa"


def _entry(start: int, length: int, sector: int) -> bytes:
    last = start // sector + -(-length // sector) - 1
    return struct.pack("<16s16sQQQ72x", LINUX_DATA.bytes_le, uuid.uuid4().bytes_le, start // sector, last, 0)


def _header(here: int, other: int, table_at: int, table: bytes, sectors: int) -> bytes:
    disk = uuid.UUID(int=1).bytes_le
    first, last = 40, sectors - 40
    crc = zlib.crc32(table)
    numbers = (here, other, first, last, disk, table_at, ENTRIES, ENTRY, crc)
    unsigned = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *numbers)
    return unsigned[:16] + struct.pack("<I", zlib.crc32(unsigned)) + unsigned[20:]
