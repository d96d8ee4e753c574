"""What the kernel does with mounts, and how it explains a refusal."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from imageapi.linux import filesystems, kmsg, libc, loop, mount, mountinfo
from lab import images
from lab.elsewhere import mount_namespace
from linux.conftest import Attach

pytestmark = pytest.mark.kernel
CLONE = mount.OPEN_TREE_CLONE | mount.OPEN_TREE_CLOEXEC


def test_an_error_names_both_paths(run_dir: Path) -> None:
    with pytest.raises(FileNotFoundError) as refusal:
        mount.mount("/dev/missing", f"{run_dir}/missing", "ext4", 0, None)
    assert (refusal.value.filename, refusal.value.filename2) == (f"{run_dir}/missing", "/dev/missing")


def test_a_nul_byte_is_refused_rather_than_cut_at(run_dir: Path) -> None:
    with pytest.raises(OSError, match="NUL"):
        mount.umount(f"{run_dir}\0/elsewhere")


def test_options_of_a_page_are_refused_rather_than_cut_off(run_dir: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    for size, wanted in ((page - 1, errno.ENOENT), (page, errno.E2BIG)):
        with pytest.raises(OSError) as refusal:
            mount.mount("none", f"{run_dir}/missing", "tmpfs", 0, "x" * size)
        assert (refusal.value.errno, refusal.value.filename) == (wanted, f"{run_dir}/missing")


def test_umount_takes_the_topmost(spot: Path) -> None:
    mount.mount("ours", str(spot), "tmpfs", 0, None)
    mount.mount("a-strangers", str(spot), "tmpfs", 0, None)
    mount.umount(str(spot))
    found = mountinfo.at(str(spot))
    assert found is not None
    assert found.source == "ours"
    mount.umount(str(spot))


def test_rmdir_of_the_mountpoint_detaches_the_copies_in_all_namespaces(spot: Path) -> None:
    mount.mount("copied", str(spot), "tmpfs", 0, None)
    with mount_namespace() as pid, mount_namespace() as other:
        mount.umount(str(spot))
        assert {pid, other} == set(mountinfo.namespaces_where(lambda each: each.source == "copied"))
        spot.rmdir()
        assert mountinfo.namespaces_where(lambda each: each.source == "copied") == []


def test_rmdir_does_not_while_it_is_mounted_here(spot: Path) -> None:
    mount.mount("here", str(spot), "tmpfs", 0, None)
    try:
        with pytest.raises(OSError, match="busy"):
            spot.rmdir()
    finally:
        mount.umount(str(spot))


def test_an_unbindable_mount_is_copied_into_a_new_namespace_all_the_same(spot: Path) -> None:
    mount.mount("unbindable", str(spot), "tmpfs", 0, None)
    mount.mount(None, str(spot), None, mount.MS_UNBINDABLE, None)
    with mount_namespace("unchanged") as pid:
        mount.umount(str(spot))
        assert mountinfo.namespaces_where(lambda each: each.source == "unbindable") == [pid]


def test_umount_of_a_shared_one_reaches_slaves(tmpfs: Path, undo: ExitStack) -> None:
    mount.mount(None, str(tmpfs), None, mount.MS_SHARED, None)
    mount.mount("shared", str(tmpfs / "one"), "tmpfs", 0, None)
    with mount_namespace("slave") as pid:
        assert mountinfo.namespaces_where(lambda each: each.source == "shared") == [pid]
        mount.umount(str(tmpfs / "one"))
        assert mountinfo.namespaces_where(lambda each: each.source == "shared") == []


def test_a_detached_tree_keeps_the_file_system_up(attach: Attach, spot: Path) -> None:
    device = attach()
    mount.mount(device, str(spot), "squashfs", mount.MS_RDONLY, None)
    tree = mount.open_tree(libc.AT_FDCWD, str(spot), CLONE)
    mount.umount(str(spot))
    assert not loop.is_free(device)
    assert mountinfo.namespaces_where(lambda each: each.source == device) == []
    os.close(tree)
    assert loop.is_free(device)


PIVOT = """
import os, sys
from imageapi.linux import libc, mount, namespaces
namespaces.unshare(namespaces.CLONE_NEWNS)
tree = mount.open_tree(libc.AT_FDCWD, sys.argv[1], mount.OPEN_TREE_CLONE | mount.OPEN_TREE_CLOEXEC)
if sys.argv[2] == "private":
    mount.mount_setattr(tree, "", propagation=mount.MS_PRIVATE)
mount.mount(None, "/", None, mount.MS_REC | mount.MS_PRIVATE, None)
mount.move_mount(tree, "", libc.AT_FDCWD, sys.argv[1], mount.MOVE_MOUNT_F_EMPTY_PATH)
os.fchdir(tree)
try:
    mount.pivot_root(".", ".")
except OSError as error:
    sys.exit(error.errno)
mount.umount(".", mount.MNT_DETACH)
print(sorted(os.listdir("/")))
"""


def pivot(root: Path, propagation: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(mount.__file__).parents[2])}
    command = [sys.executable, "-c", PIVOT, str(root), propagation]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_a_tree_must_be_private_before_it_becomes_the_root(tmpfs: Path) -> None:
    mount.mount(None, str(tmpfs), None, mount.MS_SHARED, None)
    assert pivot(tmpfs, "shared").returncode == errno.EINVAL
    done = pivot(tmpfs, "private")
    assert (done.returncode, done.stdout) == (0, "['one', 'two']\n"), done.stderr


def test_attributes_of_a_tree_can_be_set_before_it_is_seen(tmpfs: Path) -> None:
    tree = mount.open_tree(libc.AT_FDCWD, str(tmpfs / "one"), CLONE)
    try:
        mount.mount_setattr(tree, "", set=mount.MOUNT_ATTR_RDONLY, propagation=mount.MS_PRIVATE)
        with pytest.raises(OSError, match="Read-only"):
            os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=tree)
        (tmpfs / "one/file").touch()
        mount.move_mount(tree, "", libc.AT_FDCWD, str(tmpfs / "two"), mount.MOVE_MOUNT_F_EMPTY_PATH)
        assert (tmpfs / "two/file").exists()
    finally:
        os.close(tree)
    mount.umount(str(tmpfs / "two"))


def test_a_file_system_can_be_made_in_steps(spot: Path) -> None:
    context = mount.fsopen("tmpfs")
    mount.configure(context, "stepwise", [("size", "64k"), ("noswap", None)])
    tree = mount.fsmount(context, mount.MOUNT_ATTR_NODEV)
    os.close(context)
    mount.move_mount(tree, "", libc.AT_FDCWD, str(spot), mount.MOVE_MOUNT_F_EMPTY_PATH)
    os.close(tree)
    found = mountinfo.at(str(spot))
    assert found is not None
    assert found.source == "stepwise"
    assert "size=64k" in found.super_options
    assert "nodev" in found.options
    mount.umount(str(spot))


# ---------------------------------------------------------------------------------------------- explanations


def test_an_unknown_option_is_explained(attach: Attach) -> None:
    assert mount.explain("ext4", attach(images.small_image("ext4")), {"frobnicate": "7"}) == (
        "ext4: Unknown parameter 'frobnicate'"
    )


def test_a_wrong_value_is_explained() -> None:
    assert "size" in mount.explain("tmpfs", None, {"size": "large"})


def test_a_type_the_kernel_lacks_is_explained() -> None:
    assert mount.explain("zfs", None, {}) == "the kernel has no file system zfs"
    assert filesystems.needs_device("zfs") is None


def test_what_would_work_is_not_explained_and_nothing_stays(attach: Attach) -> None:
    device = attach()
    assert mount.explain("squashfs", device, {"ro": None}) == ""
    assert loop.is_free(device)


def test_the_kernel_log_says_what_overlayfs_does_not(tmpfs: Path, spot: Path) -> None:
    options = f"lowerdir={tmpfs}:{tmpfs}/one"
    with kmsg.Tail() as log:
        with pytest.raises(OSError, match="symbolic links"):
            mount.mount("overlay", str(spot), "overlay", 0, options)
        assert "overlayfs: overlapping lowerdir path" in log.about("overlayfs")
    with kmsg.Tail() as log:
        assert log.about("overlayfs") == ""


def test_a_volatile_upper_cannot_be_used_twice(tmpfs: Path, spot: Path) -> None:
    (tmpfs / "lower").mkdir()
    options = f"lowerdir={tmpfs}/lower,upperdir={tmpfs}/one,workdir={tmpfs}/two,volatile"
    mount.mount("overlay", str(spot), "overlay", 0, options)
    mount.umount(str(spot))
    with pytest.raises(OSError, match="Invalid argument"):
        mount.mount("overlay", str(spot), "overlay", 0, options)


def test_which_file_systems_need_a_device() -> None:
    assert filesystems.needs_device("ext4") is True
    assert filesystems.needs_device("tmpfs") is False
