"""/proc/<pid>/mountinfo, read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imageapi.linux import mount, mountinfo
from lab.elsewhere import mount_namespace

pytestmark = pytest.mark.kernel


def test_a_mount_is_described(run_dir: Path, tmpfs: Path) -> None:
    mount.mount(str(tmpfs / "one"), str(tmpfs / "two"), None, mount.MS_BIND, None)
    mount.mount(None, str(tmpfs / "two"), None, mount.MS_SHARED, None)
    try:
        found, below = mountinfo.at(str(tmpfs / "two")), mountinfo.at(str(tmpfs))
        assert found is not None
        assert below is not None
        assert (found.root, found.fstype, found.source) == ("/one", "tmpfs", "tmpfs")
        assert (found.parent, found.dev) == (below.id, below.dev)
        device = os.stat(tmpfs).st_dev
        assert found.dev == f"{os.major(device)}:{os.minor(device)}"
        assert [tag.split(":")[0] for tag in found.tags] == ["shared"]
        assert not found.read_only
    finally:
        mount.umount(str(tmpfs / "two"))


@pytest.mark.parametrize(
    "name", ["a b", "tab\tand\nline", "back\\slash", "#hash - dash", "caf\udce9", "re\rturn \v\f\x1c"]
)
def test_names_are_decoded(tmpfs: Path, name: str) -> None:
    place = tmpfs / name
    place.mkdir()
    mount.mount(name, str(place), "tmpfs", 0, None)
    try:
        found = mountinfo.at(str(place))
        assert found is not None
        assert (found.mountpoint, found.source) == (os.path.realpath(place), name)
    finally:
        mount.umount(str(place))


def test_the_topmost_is_told_from_those_under_it(spot: Path, run_dir: Path) -> None:
    """Also where it has the lowest number and is listed first: it was made before, and moved there."""
    (run_dir / "moved").mkdir()
    mount.mount("moved", str(run_dir / "moved"), "tmpfs", 0, None)
    mount.mount("lower", str(spot), "tmpfs", 0, None)
    mount.mount("upper", str(spot), "tmpfs", 0, None)
    mount.mount(str(run_dir / "moved"), str(spot), None, mount.MS_MOVE, None)
    try:
        assert [each.source for each in mountinfo.stack(str(spot))] == ["lower", "upper", "moved"]
        top = mountinfo.at(str(spot))
        assert top is not None
        assert top.source == "moved"
    finally:
        for _ in range(3):
            mount.umount(str(spot))
    assert mountinfo.at(str(spot)) is None


def test_a_symlink_to_the_parent_is_followed_and_one_at_the_place_is_not(tmpfs: Path, run_dir: Path) -> None:
    (run_dir / "way").symlink_to(run_dir)
    assert mountinfo.at(f"{run_dir}/way/tmpfs") == mountinfo.at(str(tmpfs))
    (run_dir / "there").symlink_to(tmpfs)
    assert mountinfo.at(f"{run_dir}/there") is None
    assert mountinfo.at(f"{tmpfs}/") == mountinfo.at(str(tmpfs))


def test_below_names_the_deepest_first(tmpfs: Path) -> None:
    places = [tmpfs / "one", tmpfs / "one/deep", tmpfs / "two"]
    for place in places:
        place.mkdir(exist_ok=True)
        mount.mount("inner", str(place), "tmpfs", 0, None)
    found = mountinfo.below(str(tmpfs))
    assert {each.mountpoint for each in found} == {os.path.realpath(place) for place in places}
    assert found[0].mountpoint == os.path.realpath(places[1])
    for each in found:
        mount.umount(each.mountpoint)
    assert mountinfo.below(str(tmpfs)) == []


def test_a_copy_that_the_kernel_has_put_beside_goes_with_its_like(tmpfs: Path, run_dir: Path) -> None:
    """And one that somebody has bound there does not."""
    (tmpfs / "spot").mkdir()
    peer, apart = run_dir / "peer", tmpfs / "apart"
    for directory in (peer, apart):
        directory.mkdir()
    mount.mount(None, str(tmpfs), None, mount.MS_SHARED, None)
    mount.mount(str(tmpfs), str(peer), None, mount.MS_BIND, None)
    mount.mount("inner", str(tmpfs / "spot"), "tmpfs", 0, None)
    try:
        assert _beside(tmpfs / "spot") == set()
        mount.mount(str(tmpfs / "spot"), str(apart), None, mount.MS_BIND, None)
        assert _beside(tmpfs / "spot") == {str(apart), str(peer / "apart")}
        mount.umount(str(tmpfs / "spot"))
        assert {each.mountpoint for each in mountinfo.read() if each.source == "inner"} == {
            str(apart),
            str(peer / "apart"),
        }
    finally:
        mount.umount(str(apart))
        mount.umount(str(peer))


def _beside(path: Path) -> set[str]:
    return {each.mountpoint for each in mountinfo.beside(str(path)) if each.source == "inner"}


def test_holders_name_one_process_of_each_other_namespace(spot: Path) -> None:
    mount.mount("held", str(spot), "tmpfs", 0, None)
    found = mountinfo.at(str(spot))
    assert found is not None
    try:
        assert mountinfo.holders(found.dev) == []
        with mount_namespace() as first, mount_namespace() as second:
            assert sorted(mountinfo.holders(found.dev)) == sorted([first, second])
    finally:
        mount.umount(str(spot))
