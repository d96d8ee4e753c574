"""The images that are compared: each is a tree packed in one way."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tools import images
from tools.bench.measure import Unable

NEWER = "trixie"
"""The first Debian release whose mkfs.erofs has zstd (erofs-utils 1.8). Where this machine's has not, that one is put
into the cache and used for all EROFS images."""


class Packing(NamedTuple):
    """One way to make an image. `options` are those of mksquashfs or mkfs.erofs."""

    fs_type: str
    compression: str
    unit: str
    options: Sequence[str]

    @property
    def name(self) -> str:
        return f"{self.fs_type} {self.compression} {self.unit}".strip()


def _squashfs(compression: str, *options: str, unit: str = "128K") -> Packing:
    return Packing("squashfs", compression, unit, ("-b", unit, *options))


def _erofs(compression: str, unit: str, *options: str) -> Packing:
    """`unit` is the cluster: so many bytes are compressed at once; without one it is a block."""
    cluster = (f"-C{int(unit[:-1]) * 1024}",) if unit not in ("", "4K") else ()
    return Packing("erofs", compression, unit, (*options, *cluster))


PACKINGS: tuple[Packing, ...] = (
    _squashfs("none", "-noI", "-noD", "-noF", "-noX"),
    _squashfs("lz4", "-comp", "lz4"),
    _squashfs("lz4hc", "-comp", "lz4", "-Xhc"),
    _squashfs("zstd", "-comp", "zstd"),
    _erofs("none", ""),
    _erofs("lz4", "4K", "-zlz4"),
    _erofs("lz4hc", "4K", "-zlz4hc"),
    _erofs("zstd", "4K", "-zzstd"),
    _erofs("lz4", "64K", "-zlz4"),
    _erofs("lz4hc", "64K", "-zlz4hc"),
    _erofs("zstd", "64K", "-zzstd"),
)
"""mksquashfs and mkfs.erofs choose the levels themselves: zstd 15 and 3, lz4hc 12 and 9."""


def build(packing: Packing, tree: Path, image: Path) -> float:
    """Make the image; the seconds it took.

    Raises: Unable, in the tool's words; subprocess.CalledProcessError.
    """
    begun = time.monotonic()
    done = subprocess.run([str(word) for word in _command(packing, tree, image)], capture_output=True, text=True)
    if done.returncode:
        raise Unable((done.stderr or done.stdout).strip().splitlines()[-1])
    return time.monotonic() - begun


def _command(packing: Packing, tree: Path, image: Path) -> list[str | Path]:
    if packing.fs_type == "squashfs":
        return ["mksquashfs", tree, image, *packing.options, "-all-root", "-no-progress", "-quiet"]
    return [*mkfs_erofs(), *packing.options, "--all-root", "--quiet", image, tree]


@cache
def mkfs_erofs() -> list[str]:
    """The command of a mkfs.erofs that has zstd."""
    if _has_zstd(["mkfs.erofs"]):
        return ["mkfs.erofs"]
    root = images.cached("erofs-utils", "d", NEWER, _extract_newer)
    return [f"{root}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", f"{root}/usr/lib/x86_64-linux-gnu",
            f"{root}/usr/bin/mkfs.erofs"]  # fmt: skip


def _has_zstd(command: list[str]) -> bool:
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True)
    return "zstd" in helped.stdout + helped.stderr


def _extract_newer(root: Path) -> None:
    """The package and the libraries it needs, unpacked."""
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        sources = [of_release(NEWER, path, Path(scratch)) for path in images.apt_sources(images.suite())]
        images.run(
            *("mmdebstrap", "--quiet", "--mode=root", "--variant=extract", "--include=erofs-utils"),
            *(*images.SMALLER_DEBIAN, NEWER, str(root), *map(str, sources)),
        )


def of_release(release: str, path: Path, directory: Path) -> Path:
    """A list of package sources, for another release of Debian, which has no other parts than the first it names."""
    lists = re.sub(r"(?m)^Suites:.*$", f"Suites: {release}", path.read_text().split("\n\n")[0])
    (directory / path.name).write_text(re.sub(rf"\b{images.suite()}\S*", release, lists) + "\n")
    return directory / path.name


def tree_of(image: Path, directory: Path) -> Path:
    """The tree in a squashfs image, unpacked into `directory`."""
    images.run("unsquashfs", "-quiet", "-no-progress", "-dest", str(directory / "tree"), str(image))
    return directory / "tree"


def size_of(tree: Path) -> tuple[int, int]:
    """The number of files in a tree, and their bytes."""
    found = [entry.lstat() for entry in tree.rglob("*") if entry.is_file() and not entry.is_symlink()]
    return len(found), sum(each.st_size for each in found)
