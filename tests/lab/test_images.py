"""The images that the other tests stand on are what they promise."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from lab.images import small_image, systemd_image
from tools import images
from tools.images import Format

EVERY_FORMAT = pytest.mark.parametrize("mounted", get_args(Format), indirect=True)


@pytest.fixture
def mounted(run_dir: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The small image of the format that is the test's parameter, mounted read-only."""
    fs_type: Format = request.param
    subprocess.run(["mount", "-t", fs_type, "-o", "loop,ro", small_image(fs_type), run_dir], check=True)
    yield run_dir
    subprocess.run(["umount", run_dir], check=True)


def exec_error(path: Path) -> int | None:
    """The errno of executing the file."""
    try:
        subprocess.run([path], check=True)
    except OSError as error:
        return error.errno
    return None


@pytest.mark.kernel
@EVERY_FORMAT
def test_the_small_image_runs_a_shell(mounted: Path) -> None:
    shell = ["chroot", str(mounted), "/bin/sh", "-c", "cat /data/message; sleep 0"]
    said = subprocess.run(shell, check=True, capture_output=True, text=True)
    assert said.stdout == "written when the image was made\n"


@pytest.mark.kernel
@EVERY_FORMAT
def test_each_odd_command_fails_in_its_own_way(mounted: Path) -> None:
    names = ("no-interpreter", "plain", "wrong-arch", "missing")
    failures = {name: exec_error(mounted / "bin" / name) for name in names}
    assert failures == {
        "no-interpreter": errno.ENOENT,
        "plain": errno.EACCES,
        "wrong-arch": errno.ENOEXEC,
        "missing": errno.ENOENT,
    }


@pytest.mark.kernel
@EVERY_FORMAT
def test_links_lead_out_when_they_are_followed_by_path(mounted: Path) -> None:
    assert os.path.realpath(mounted / "abs") == "/etc/hostname"
    assert not os.path.realpath(mounted / "escape").startswith(str(mounted))


@pytest.mark.kernel
def test_the_systemd_image_has_what_a_boot_needs(run_dir: Path) -> None:
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", systemd_image(), run_dir], check=True)
    try:
        named = ("usr/lib/systemd/systemd", "bin/bash", "bin/ls", "bin/ps", "bin/systemctl", "usr/bin/dbus-daemon")
        missing = [name for name in named if not os.access(run_dir / name, os.X_OK)]
        top = {path.name for path in run_dir.iterdir()}
        masked = os.readlink(run_dir / "etc/systemd/system/console-getty.service")
    finally:
        subprocess.run(["umount", run_dir], check=True)
    assert missing == []
    assert top >= {"bin", "boot", "dev", "etc", "home", "lib", "mnt", "proc", "root", "run", "sbin", "sys", "usr"}
    assert masked == "/dev/null"


@pytest.mark.kernel
def test_two_who_want_an_image_at_once_make_one(tmp_path: Path) -> None:
    """Whole from the moment it can be seen, and nothing left beside it but the lock and when it was used."""
    maker = [sys.executable, "-c", "from tools import images; print(images.small_image())"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(images.__file__).parents[1])}
    makers = [subprocess.Popen(maker, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (maker.communicate()[0] for maker in makers)
    assert first == second
    found = (path for path in (tmp_path / "imageapi").iterdir() if path.suffix not in (".lock", ".used"))
    assert [str(path) for path in found] == [first.strip()]


@pytest.mark.kernel
def test_a_failed_make_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the packer is not to be found; busybox is."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/busybox").symlink_to(str(shutil.which("busybox")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(FileNotFoundError, match="mksquashfs"):
        images.small_image()
    assert [path.suffix for path in (tmp_path / "imageapi").iterdir()] == [".lock"]
