"""Mounts by their number, and superblocks by their device: the same as mountinfo says, and what it cannot say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imageapi.linux import libc, mount, mountid, mountinfo, ustat

pytestmark = pytest.mark.kernel

TMPFS_MAGIC = 0x0102_1994
"""<linux/magic.h>"""


@contextmanager
def mounted(spot: Path) -> Iterator[int]:
    """A tmpfs, by its number."""
    spot.mkdir(exist_ok=True)
    mount.mount("numbered", str(spot), "tmpfs", 0, None)
    try:
        number = mountid.at(str(spot))
        assert number is not None
        yield number
    finally:
        mount.umount(str(spot))


def test_a_mount_is_known_by_its_number(tmp_path: Path) -> None:
    spot = tmp_path / "a place, with: odd\\ letters\t"
    with mounted(spot) as number:
        known = mountinfo.at(str(spot))
        assert known is not None
        assert mountid.look(number) == (known.dev, str(spot), TMPFS_MAGIC)
    assert mountid.look(number) is None
    assert mountid.at(str(spot)) is None


def test_the_next_mount_of_a_place_is_another(tmp_path: Path) -> None:
    with mounted(tmp_path / "spot") as first:
        pass
    with mounted(tmp_path / "spot") as second:
        assert first != second
        assert mountid.look(first) is None


def test_what_bears_others(tmp_path: Path) -> None:
    with mounted(tmp_path / "spot") as lower:
        assert not mountid.bears_others(lower)
        with mounted(tmp_path / "spot") as upper:
            assert mountid.bears_others(lower)
            assert not mountid.bears_others(upper)
            assert mountid.at(str(tmp_path / "spot")) == upper
        with mounted(tmp_path / "spot" / "inside"):
            assert mountid.bears_others(lower)
        assert not mountid.bears_others(lower)


def test_a_place_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refusal:
        mountid.at(str(tmp_path / "nowhere"))
    assert refusal.value.filename == str(tmp_path / "nowhere")


def test_a_superblock_is_up_as_long_as_anything_holds_it(tmp_path: Path) -> None:
    with mounted(tmp_path / "spot") as number:
        known = mountid.look(number)
        assert known is not None
        tree = mount.open_tree(libc.AT_FDCWD, str(tmp_path / "spot"), mount.OPEN_TREE_CLONE)
    assert mountinfo.namespaces_where(lambda each: each.dev == known.dev) == []
    assert ustat.is_up(known.dev) in (True, None)
    os.close(tree)
    assert ustat.is_up(known.dev) in (False, None)
