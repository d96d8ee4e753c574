"""The images that the demo boots and the tests mount, made once and kept in the user's cache.

Each is a recipe: a name, what it is made from, and a function that fills a tree.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tools import cache

Format = Literal["squashfs", "erofs", "ext4"]

SYSTEMD_PACKAGES = ("dbus", "procps", "systemd")
"""Beside what Debian calls essential: logind needs the bus, and `ps` shows the container from within."""

SMALLER_DEBIAN = (
    *("--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"),
    *("--dpkgopt=path-exclude=/usr/share/locale/*", "--aptopt=Acquire::Languages none"),
)
"""What mmdebstrap leaves out from the beginning."""

DISCARDED = (
    *("boot/*", "usr/games", "usr/include", "usr/share/bug", "usr/share/doc", "usr/share/doc-base", "usr/share/info"),
    *("usr/share/lintian", "usr/share/locale", "usr/share/man", "usr/share/zoneinfo", "usr/lib/*-linux-gnu/gconv"),
    *("usr/lib/*-linux-gnu/perl*", "usr/share/perl*", "usr/bin/perl*", "usr/lib/udev/hwdb*"),
    *("usr/share/bash-completion", "var/cache/apt", "var/cache/debconf", "var/lib/apt", "var/lib/dpkg", "var/log"),
)
"""Of no use in a container that is only looked at."""

MASKED = ("console-getty.service", "getty.target", "systemd-networkd-wait-online.service", "*.timer")
"""Units that wait for a terminal or a clock; a unit that fails would make the system's state `degraded`."""

SMALL_DIRECTORIES = ("bin", "data", "dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var/lib")
SMALL_FILES = {
    "etc/hostname": ("small-image\n", 0o644),
    "etc/os-release": ('NAME="Small image"\nID=small\n', 0o644),
    "etc/passwd": ("root:x:0:0:root:/root:/bin/sh\n", 0o644),
    "data/message": ("written when the image was made\n", 0o644),
    "data/script": ('#!/bin/sh\necho script "$@"\n', 0o755),
    "bin/no-interpreter": ("#!/missing/interp\n", 0o755),
    "bin/plain": ("no program: it is not executable\n", 0o644),
}
SMALL_LINKS = {"escape": "../../../../etc/passwd", "abs": "/etc/hostname", "data/dangling": "nowhere", "data/up": ".."}
EM_VAX = 75
"""elf(5): a machine that no kernel of today runs and no emulator registers itself for."""


def systemd_image() -> Path:
    """A small Debian with systemd, as squashfs (zstd, 128 KiB blocks): the release and the archive of this machine.

    Needs root. Takes half a minute the first time.
    Raises: subprocess.CalledProcessError; OSError.
    """
    return cached("systemd", "squashfs", suite(), lambda image: _pack_tree(image, _fill_systemd, "squashfs"))


def small_image(format: Format = "squashfs") -> Path:
    """Busybox and a few files: all a container needs to run a shell, and commands that cannot be run.

    `/bin/no-interpreter`, `/bin/plain` and `/bin/wrong-arch` each fail an exec in a way of their own; `/escape` and
    `/abs` are symlinks that lead out of the image when they are followed by path.
    Raises: subprocess.CalledProcessError; OSError.
    """
    made_of = hashlib.sha256(busybox().read_bytes()).hexdigest()
    return cached(f"small-{format}", format, made_of, lambda image: _pack_tree(image, _fill_small, format))


def cached(name: str, suffix: str, made_of: str, make: Callable[[Path], None]) -> Path:
    """The image of this recipe (`cache.made_once`), of which this file is a part."""
    return cache.made_once(name, suffix, hashlib.sha256(Path(__file__).read_bytes()).hexdigest() + made_of, make)


# ---------------------------------------------------------------------------------------------- packing


def _pack_tree(image: Path, fill: Callable[[Path], None], format: Format) -> None:
    """Make the image of a tree that `fill` makes beside it."""
    tree = image.parent / "tree"
    fill(tree)
    _PACKERS[format](tree, image)


def _pack_squashfs(tree: Path, image: Path) -> None:
    run("mksquashfs", str(tree), str(image), "-comp", "zstd", "-b", "128K", "-all-root", "-no-progress", "-quiet")


def _pack_erofs(tree: Path, image: Path) -> None:
    run("mkfs.erofs", "-zlz4", "--all-root", str(image), str(tree))


def _pack_ext4(tree: Path, image: Path) -> None:
    size = sum(path.lstat().st_size for path in tree.rglob("*") if not path.is_symlink()) // 1024 + 8192
    run("mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", str(tree), str(image), f"{size}k")


_PACKERS: dict[Format, Callable[[Path, Path], None]] = {
    "squashfs": _pack_squashfs,
    "erofs": _pack_erofs,
    "ext4": _pack_ext4,
}


def run(*command: str, input: str = "") -> None:
    """Raises: subprocess.CalledProcessError, with what the command wrote as its note."""
    done = subprocess.run(command, input=input, capture_output=True, text=True)
    try:
        done.check_returncode()
    except subprocess.CalledProcessError as error:
        error.add_note(done.stderr[-2000:])
        raise


# ---------------------------------------------------------------------------------------------- Debian with systemd


def _fill_systemd(tree: Path) -> None:
    run(
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=essential", f"--include={','.join(SYSTEMD_PACKAGES)}"),
        *SMALLER_DEBIAN,
        *(suite(), str(tree), *map(str, apt_sources(suite()))),
    )
    for pattern in DISCARDED:
        for path in tree.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (tree / "var/log").mkdir()
    _mask_units(tree)
    (tree / "etc/hostname").write_text("image\n")


def _mask_units(tree: Path) -> None:
    shipped = tree / "usr/lib/systemd/system"
    names = {path.name for pattern in MASKED for path in shipped.glob(pattern)}
    for name in names:
        (tree / "etc/systemd/system" / name).unlink(missing_ok=True)
        (tree / "etc/systemd/system" / name).symlink_to("/dev/null")


def suite() -> str:
    """The Debian release of this machine, by name.

    Raises: KeyError on a machine that has none.
    """
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def apt_sources(suite: str) -> list[Path]:
    """The machine's own lists of package sources, those that have the release itself: others need keys of their own."""
    listed = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.[ls]*"))]
    named = re.compile(rf"^(Suites:|deb)\s.*(?<!\S){re.escape(suite)}(?!\S)", re.MULTILINE)
    return [path for path in listed if path.is_file() and named.search(path.read_text())]


# ---------------------------------------------------------------------------------------------- busybox


def _fill_small(tree: Path) -> None:
    for directory in SMALL_DIRECTORIES:
        (tree / directory).mkdir(parents=True)
    for name, (text, mode) in SMALL_FILES.items():
        (tree / name).write_text(text)
        (tree / name).chmod(mode)
    for name, target in SMALL_LINKS.items():
        (tree / name).symlink_to(target)
    _install_busybox(tree / "bin")


def _install_busybox(directory: Path) -> None:
    """One file, and a link for each command it knows; beside it the same file for a machine that is not this one."""
    shutil.copy(busybox(), directory / "busybox")
    listed = subprocess.run([busybox(), "--list"], check=True, capture_output=True, text=True).stdout.split()
    for command in set(listed) - {"busybox"}:
        (directory / command).symlink_to("busybox")
    foreign = bytearray((directory / "busybox").read_bytes()[:4096])
    struct.pack_into("<H", foreign, 18, EM_VAX)  # e_machine, elf(5)
    (directory / "wrong-arch").write_bytes(foreign)
    (directory / "wrong-arch").chmod(0o755)


def busybox() -> Path:
    """The static one, of the package busybox-static.

    Raises: FileNotFoundError.
    """
    found = shutil.which("busybox")
    if found is None:
        raise FileNotFoundError("busybox is not installed: apt-get install busybox-static")
    return Path(found)
