"""What an image holds, told by its superblock."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from imageapi.linux import superblock
from lab import images
from tools.images import Format

pytestmark = pytest.mark.kernel


T = TypeVar("T")


def on(path: Path, function: Callable[[int], T]) -> T:
    fd = os.open(path, os.O_RDONLY)
    try:
        return function(fd)
    finally:
        os.close(fd)


def look(path: Path) -> tuple[str, int] | None:
    return on(path, superblock.identify)


def check(path: Path, wanted: str) -> str | None:
    return on(path, lambda fd: superblock.check(fd, wanted))


@pytest.mark.parametrize("format", ["squashfs", "erofs", "ext4"])
def test_a_whole_image_is_known_and_good(format: Format) -> None:
    image = images.small_image(format)
    found = look(image)
    assert found is not None
    assert found[0] == format
    assert 0 < found[1] <= image.stat().st_size
    assert check(image, format) is None


@pytest.mark.parametrize("format", ["squashfs", "erofs", "ext4"])
def test_a_truncated_image_says_how_many_bytes_are_missing(run_dir: Path, format: Format) -> None:
    image = run_dir / "cut"
    shutil.copyfile(images.small_image(format), image)
    found = look(image)
    assert found is not None
    needed = found[1]
    whole = (needed + 511) // 512 * 512
    os.truncate(image, whole)
    assert check(image, format) is None
    os.truncate(image, whole - 1024)
    assert check(image, format) == (
        f"its {format} file system is truncated: it needs {needed} bytes and has {whole - 1024}, "
        f"{needed - whole + 1024} too few"
    )


def test_the_older_ext_types_are_one_with_ext4(run_dir: Path) -> None:
    for fs_type in ("ext2", "ext3"):
        image = run_dir / fs_type
        subprocess.run(["mke2fs", "-q", "-t", fs_type, image, "4M"], check=True, capture_output=True)
        assert look(image) == ("ext4", 4 << 20)
        assert check(image, fs_type) is None
        assert check(image, "ext4") is None


def test_another_type_is_named() -> None:
    image = images.small_image("erofs")
    assert check(image, "squashfs") == "it holds a file system of type erofs, not squashfs"
    assert check(image, "f2fs") == "it holds a file system of type erofs, not f2fs"


@pytest.mark.parametrize(
    ("offset", "magic", "words"),
    [
        (0, b"QFI\xfb", "qcow2"),
        (0, b"\x1f\x8b", "gzip"),
        (510, b"\x55\xaa", "partition table"),
        (512, b"EFI PART", "partition table"),
        (257, b"ustar", "tar archive"),
        (32, b"SIF_MAGIC\0", "Singularity"),
        (100, b"something", "missing or damaged"),
        (0, b"", "nothing but zeros"),
    ],
)
def test_what_is_no_file_system_is_named(run_dir: Path, offset: int, magic: bytes, words: str) -> None:
    image = run_dir / "image"
    image.write_bytes(bytes(offset) + magic + bytes(1 << 20))
    sentence = check(image, "squashfs")
    assert sentence is not None
    assert sentence.startswith("it holds no squashfs file system: it")
    assert words in sentence


def test_a_type_that_is_not_known_is_left_to_the_kernel(run_dir: Path) -> None:
    (run_dir / "image").write_bytes(bytes(1 << 20))
    assert check(run_dir / "image", "f2fs") is None


@pytest.mark.parametrize(
    ("name", "offset", "block", "size"),
    [
        ("xfs", 0, b"XFSB" + struct.pack(">IQ", 4096, 300), 4096 * 300),
        ("btrfs", 0x10000, bytes(64) + b"_BHRfS_M" + bytes(0xD1 - 72) + struct.pack("<Q", 9 << 20), 9 << 20),
        ("iso9660", 0x8000, b"\x01CD001" + bytes(74) + struct.pack("<I44xH", 77, 2048), 77 * 2048),
        ("vfat", 0, bytes(11) + struct.pack("<H6xH33x3s453xH", 512, 2880, b"FAT", 0xAA55), 2880 * 512),
    ],
)
def test_superblocks_by_their_layout(run_dir: Path, name: str, offset: int, block: bytes, size: int) -> None:
    """For types whose tools are not everywhere: the fields' places are those of the format's own description."""
    image = run_dir / "image"
    image.write_bytes(bytes(offset) + block)
    os.truncate(image, 10 << 20)
    assert look(image) == (name, size)
    assert check(image, name) is None


def test_a_real_xfs(run_dir: Path) -> None:
    image = run_dir / "image"
    image.touch()
    os.truncate(image, 300 << 20)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    assert look(image) == ("xfs", 300 << 20)
    assert check(image, "xfs") is None


def test_a_file_shorter_than_a_superblock_is_none(run_dir: Path) -> None:
    (run_dir / "image").write_bytes(b"hsqs")
    assert look(run_dir / "image") is None


def test_an_erofs_of_small_blocks_has_a_small_device_block(run_dir: Path) -> None:
    image = run_dir / "image"
    shutil.copyfile(images.small_image("erofs"), image)
    assert on(image, superblock.block_size) == 4096
    with image.open("r+b") as file:
        file.seek(1024 + 12)  # blkszbits
        file.write(bytes([10]))
    assert on(image, superblock.block_size) == 512
