"""The kinds `attach`, `overlay` and `bind`: what each makes, what it refuses, and what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from drivers.bench import Bench, traces
from imageapi.config import Site
from imageapi.errors import Conflict, Invalid, Problem, Unsupported
from imageapi.linux import libc, mount, mountinfo
from imageapi.linux.mountinfo import Mount
from imageapi.records import AnyRecord
from imageapi.spec import Attach, Attachment, Loopback
from lab import images
from lab.elsewhere import mount_namespace
from tools.images import Format

pytestmark = pytest.mark.kernel


def place(record: AnyRecord) -> Path:
    assert record.facts.mountpoint is not None
    return Path(record.facts.mountpoint)


def standing(record: AnyRecord) -> Mount:
    found = mountinfo.at(str(place(record)))
    assert found is not None
    return found


# ---------------------------------------------------------------------------------------------------- attach


@pytest.mark.parametrize("format", ["squashfs", "erofs", "ext4"])
def test_a_read_only_attachment_is_mounted_read_only_and_without_devices(bench: Bench, format: Format) -> None:
    record = bench.mounted(format)
    assert (place(record) / "data/message").read_text() == "written when the image was made\n"
    assert {"ro", "nodev"} <= set(standing(record).options.split(","))


def test_options_reach_the_kernel(bench: Bench) -> None:
    on = bench.acquire(bench.loopback("ext4", ro=False))
    record = bench.acquire(bench.attach(on, "ext4", ["noatime,nosuid", "errors=continue", "data=journal", "noexec"]))
    found = standing(record)
    assert {"rw", "noatime", "nosuid", "noexec", "nodev"} <= set(found.options.split(","))
    assert "data=journal" in found.super_options
    assert found.source == on.facts.device_file


def test_an_option_the_kernel_refuses_is_named(bench: Bench) -> None:
    on = bench.acquire(bench.loopback("ext4"))
    with pytest.raises(Invalid, match=r"refuses the option 'frobnicate=7': .*Unknown parameter") as refusal:
        bench.acquire(bench.attach(on, "ext4", ["ro", "frobnicate=7"]))
    assert refusal.value.fields["path"] == "$.mount_options[1]"


def test_a_value_the_kernel_refuses_is_named(bench: Bench) -> None:
    on = bench.acquire(bench.loopback("ext4"))
    with pytest.raises(Invalid, match="errors=perhaps") as refusal:
        bench.acquire(bench.attach(on, "ext4", ["errors=perhaps"]))
    assert refusal.value.fields["path"] == "$.mount_options[0]"


def test_a_type_the_kernel_lacks_is_unsupported(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    with pytest.raises(Unsupported, match="no file system 'zfs'"):
        bench.acquire(bench.attach(on, "zfs"))


def test_a_type_without_a_device_is_refused(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    with pytest.raises(Invalid, match="no file system of block devices"):
        bench.acquire(bench.attach(on, "tmpfs"))


def test_another_type_than_the_image_has_names_both(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    with pytest.raises(Invalid, match="type squashfs, not ext4") as refusal:
        bench.acquire(bench.attach(on, "ext4"))
    assert refusal.value.fields["path"] == "$.fs_type"


def test_a_truncated_image_says_how_much_is_missing(bench: Bench, run_dir: Path) -> None:
    image = run_dir / "cut.img"
    shutil.copyfile(images.small_image("squashfs"), image)
    os.truncate(image, image.stat().st_size - 8192)
    on = bench.acquire(bench.loopback(path=str(image)))
    with pytest.raises(Invalid, match=r"truncated: it needs [0-9]+ bytes and has [0-9]+, [0-9]+ too few"):
        bench.acquire(bench.attach(on))


def test_a_damaged_image_is_refused_in_the_kernels_words(bench: Bench, run_dir: Path) -> None:
    image = run_dir / "damaged.img"
    shutil.copyfile(images.small_image("squashfs"), image)
    with image.open("r+b") as file:
        file.seek(48)  # the table positions that follow bytes_used in the superblock
        file.write(b"\xa5" * 48)
    on = bench.acquire(bench.loopback(path=str(image)))
    before = traces(bench.site)
    with pytest.raises(Problem) as refusal:
        bench.acquire(bench.attach(on))
    assert refusal.value.code == 422
    assert traces(bench.site) == before


def test_a_journal_that_must_be_replayed_on_a_read_only_device_has_a_remedy(bench: Bench, run_dir: Path) -> None:
    image = run_dir / "dirty.img"
    shutil.copyfile(images.small_image("ext4"), image)
    subprocess.run(["debugfs", "-w", "-R", "feature needs_recovery", image], check=True, capture_output=True)
    on = bench.acquire(bench.loopback(path=str(image)))
    with pytest.raises(Invalid, match="noload"):
        bench.acquire(bench.attach(on, "ext4"))
    assert (place(bench.acquire(bench.attach(on, "ext4", ["noload"]))) / "data").is_dir()


def test_the_same_device_with_other_options_is_a_conflict(bench: Bench) -> None:
    on = bench.acquire(bench.loopback("ext4", ro=False))
    first = bench.acquire(bench.attach(on, "ext4"))
    with pytest.raises(Conflict) as refusal:
        bench.acquire(bench.attach(on, "ext4", ["ro"]))
    assert refusal.value.fields["holders"] == [f"the mount at {os.path.realpath(place(first))}"]


def test_a_file_system_mounted_twice_is_released_one_by_one(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    first, second = bench.acquire(bench.attach(on)), bench.acquire(bench.attach(on))
    bench.release(first)
    assert (place(second) / "data").is_dir()
    bench.release(second)


def test_a_detached_tree_keeps_it_until_it_is_closed(bench: Bench) -> None:
    """As a container's root does; the mount is gone then, and the release that is tried again must still see it."""
    record = bench.mounted()
    tree = mount.open_tree(libc.AT_FDCWD, str(place(record)), mount.OPEN_TREE_CLONE | mount.OPEN_TREE_CLOEXEC)
    try:
        for _ in range(2):
            with pytest.raises(Conflict, match="in use"):
                bench.release(record)
    finally:
        os.close(tree)
    bench.release(record)


def test_a_copy_in_another_namespace_goes_with_the_mountpoint(bench: Bench) -> None:
    record = bench.mounted()
    dev = standing(record).dev
    with mount_namespace() as pid:
        assert mountinfo.holders(dev) == [pid]
        bench.release(record)
        assert mountinfo.holders(dev) == []


def test_whether_a_mount_is_read_only_at_planning_time(bench: Bench) -> None:
    driver = bench.driver(bench.attach(bench.plan(Attachment(kind="loopback")).record).record)
    nested = Attachment(kind="loopback", loopback=Loopback("/image", "root", ro=True))
    writable = Attachment(kind="loopback", loopback=Loopback("/image", "root"))
    assert driver.read_only(Attach(nested, "squashfs"))
    assert not driver.read_only(Attach(writable, "ext4"))
    assert driver.read_only(Attach(writable, "ext4", ["ro"]))
    assert not driver.read_only(Attach(writable, "ext4", ["ro", "rw"]))
    assert not driver.read_only(Attach(Attachment(id=3), "ext4"))


# --------------------------------------------------------------------------------------------------- overlay


def test_an_overlay_is_written_and_its_lower_is_not(bench: Bench) -> None:
    lower = bench.mounted()
    record = bench.acquire(bench.overlay(lower))
    (place(record) / "data/message").write_text("changed")
    (place(record) / "etc/passwd").unlink()
    assert (place(lower) / "data/message").read_text() == "written when the image was made\n"
    assert (place(lower) / "etc/passwd").exists()
    assert record.facts.upperdir is not None
    assert Path(record.facts.upperdir, "data/message").read_text() == "changed"


def is_volatile(record: AnyRecord) -> bool:
    """As the kernel shows it; differently since 6.18."""
    return bool({"volatile", "fsync=volatile"} & set(standing(record).super_options.split(",")))


def test_it_is_volatile_and_carries_our_mark(bench: Bench) -> None:
    record = bench.layered()
    assert is_volatile(record)
    assert standing(record).source == bench.site.mark(record.key)


def test_the_first_lower_is_the_topmost(bench: Bench, run_dir: Path) -> None:
    binds = []
    for name in ("first", "second"):
        (run_dir / name).mkdir()
        (run_dir / name / "who").write_text(name)
        (run_dir / name / f"only-{name}").touch()
        binds.append(bench.acquire(bench.bind(str(run_dir / name))))
    merged = place(bench.acquire(bench.overlay(*binds)))
    assert (merged / "who").read_text() == "first"
    assert {path.name for path in merged.iterdir()} == {"who", "only-first", "only-second"}


def test_its_root_looks_like_its_lowers(bench: Bench, run_dir: Path) -> None:
    lower = run_dir / "lower"
    lower.mkdir()
    lower.chmod(0o1750)
    os.chown(lower, 1234, 5678)
    merged = place(bench.acquire(bench.overlay(bench.acquire(bench.bind(str(lower)))))).stat()
    assert (merged.st_mode & 0o7777, merged.st_uid, merged.st_gid) == (0o1750, 1234, 5678)


def test_one_lower_given_twice_is_refused(bench: Bench) -> None:
    lower = bench.mounted()
    with pytest.raises(Invalid, match="the same directory") as refusal:
        bench.acquire(bench.overlay(lower, lower))
    assert refusal.value.fields["path"] == "$.lower[1]"


def test_one_directory_by_two_mounts_is_refused(bench: Bench) -> None:
    on = bench.acquire(bench.loopback())
    first, second = bench.acquire(bench.attach(on)), bench.acquire(bench.attach(on))
    with pytest.raises(Invalid, match=f"{second.key} is the same directory as {first.key}"):
        bench.acquire(bench.overlay(first, second))


def test_a_lower_within_another_is_refused(bench: Bench, run_dir: Path) -> None:
    (run_dir / "outer/inner").mkdir(parents=True)
    outer = bench.acquire(bench.bind(str(run_dir / "outer")))
    inner = bench.acquire(bench.bind(str(run_dir / "outer/inner")))
    with pytest.raises(Invalid, match="lies within another"):
        bench.acquire(bench.overlay(inner, outer))


def test_a_third_overlay_over_two_is_refused(bench: Bench) -> None:
    second = bench.layered(bench.layered())
    for top in (second, bench.acquire(bench.bind_inside(second, "/"))):
        with pytest.raises(Invalid, match="no third") as refusal:
            bench.acquire(bench.overlay(top))
        assert refusal.value.fields["path"] == "$.lower[0]"


def test_paths_with_the_characters_of_the_option_syntax(site: Site, run_dir: Path) -> None:
    odd = Site(run_dir=str(run_dir / r"a:b,c\d=e f"), instance=site.instance)
    os.makedirs(odd.mounts_dir)
    bench = Bench(odd)
    record = bench.layered(bench.mounted(), bench.mounted("erofs"))
    (place(record) / "written").write_text("here")
    assert record.facts.upperdir is not None
    assert Path(record.facts.upperdir, "written").read_text() == "here"
    bench.release_all()


def test_more_lowers_than_a_page_of_options_holds(bench: Bench, run_dir: Path) -> None:
    binds = []
    for number in range(90):
        (run_dir / f"lower-{number}").mkdir()
        (run_dir / f"lower-{number}" / str(number)).touch()
        binds.append(bench.acquire(bench.bind(str(run_dir / f"lower-{number}"))))
    record = bench.acquire(bench.overlay(*binds))
    assert {path.name for path in place(record).iterdir()} == {str(number) for number in range(90)}
    assert is_volatile(record)
    (place(record) / "written").touch()


def test_release_removes_what_a_container_left_in_the_upper(bench: Bench) -> None:
    record = bench.layered()
    fd = os.open(place(record) / "var", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deep", dir_fd=fd)
        deeper = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    (place(record) / "out").symlink_to("/etc")
    os.mkfifo(place(record) / "fifo")
    before = set(os.listdir("/etc"))
    bench.release(record)
    assert not os.path.exists(bench.site.upperdir(record.token))
    assert set(os.listdir("/etc")) == before


def test_what_is_mounted_in_the_upper_by_a_stranger_is_not_emptied(bench: Bench, run_dir: Path) -> None:
    record = bench.layered()
    dear = run_dir / "dear"
    dear.mkdir()
    (dear / "kept").write_text("dear to somebody")
    assert record.facts.upperdir is not None
    spot = Path(record.facts.upperdir, "spot")
    spot.mkdir()
    mount.mount(str(dear), str(spot), None, mount.MS_BIND, None)
    try:
        with pytest.raises(Conflict, match="something is mounted in"):
            bench.release(record)
        assert (dear / "kept").read_text() == "dear to somebody"
    finally:
        mount.umount(str(spot))
    bench.release(record)


def test_an_overlay_in_another_namespace_keeps_its_upper(bench: Bench, run_dir: Path) -> None:
    """Where it is mounted at another place, so that removing the mountpoint does not detach it."""
    record = bench.layered()
    spot = run_dir / "spot"
    spot.mkdir()
    mount.mount(str(place(record)), str(spot), None, mount.MS_BIND, None)
    with mount_namespace() as pid:
        mount.umount(str(spot))
        with pytest.raises(Conflict) as refusal:
            bench.release(record)
        assert refusal.value.fields["holders"] == [f"process {pid} (sleep)"]
        assert os.path.isdir(bench.site.upperdir(record.token))
    bench.release(record)
    assert not os.path.exists(bench.site.upperdir(record.token))


# ------------------------------------------------------------------------------------------------------ bind


def test_a_bind_shows_the_directory(bench: Bench, run_dir: Path) -> None:
    source = run_dir / "source"
    source.mkdir()
    record = bench.acquire(bench.bind(str(source)))
    (place(record) / "file").write_text("through it")
    assert (source / "file").read_text() == "through it"


def test_a_read_only_bind_leaves_its_source_writable(bench: Bench, run_dir: Path) -> None:
    source = run_dir / "source"
    source.mkdir()
    record = bench.acquire(bench.bind(str(source), ro=True))
    with pytest.raises(OSError, match="Read-only"):
        (place(record) / "file").touch()
    (source / "file").touch()
    assert (place(record) / "file").exists()


@pytest.fixture
def tree(run_dir: Path) -> Path:
    """A directory with a tmpfs mounted in it, on which a file is."""
    source = run_dir / "tree"
    (source / "inner").mkdir(parents=True)
    return source


@pytest.mark.parametrize("ro", [True, False])
def test_a_recursive_bind_has_what_is_mounted_inside(bench: Bench, tree: Path, ro: bool) -> None:
    mount.mount("inner", str(tree / "inner"), "tmpfs", 0, None)
    try:
        (tree / "inner/file").touch()
        record = bench.acquire(bench.bind(str(tree), recursive=True, ro=ro))
        assert (place(record) / "inner/file").exists()
        if ro:
            with pytest.raises(OSError, match="Read-only"):
                (place(record) / "inner/new").touch()
        else:
            (place(record) / "inner/new").touch()
        bench.release(record)
        assert mountinfo.at(str(tree / "inner")) is not None
    finally:
        mount.umount(str(tree / "inner"))


def test_a_plain_bind_has_not(bench: Bench, tree: Path) -> None:
    mount.mount("inner", str(tree / "inner"), "tmpfs", 0, None)
    try:
        (tree / "inner/file").touch()
        record = bench.acquire(bench.bind(str(tree)))
        assert not list((place(record) / "inner").iterdir())
    finally:
        mount.umount(str(tree / "inner"))


def test_what_is_mounted_at_the_source_later_does_not_come_along(bench: Bench, tree: Path) -> None:
    mount.mount("tree", str(tree), "tmpfs", 0, None)
    mount.mount(None, str(tree), None, mount.MS_SHARED, None)
    try:
        (tree / "inner").mkdir()
        record = bench.acquire(bench.bind(str(tree), recursive=True))
        mount.mount("later", str(tree / "inner"), "tmpfs", 0, None)
        assert mountinfo.below(str(place(record))) == []
        mount.umount(str(tree / "inner"))
        bench.release(record)
    finally:
        mount.umount(str(tree))


def test_a_stranger_inside_a_plain_bind_is_named_and_left(bench: Bench, tree: Path) -> None:
    record = bench.acquire(bench.bind(str(tree)))
    inner = place(record) / "inner"
    mount.mount("stranger", str(inner), "tmpfs", 0, None)
    try:
        with pytest.raises(Conflict) as refusal:
            bench.release(record)
        assert refusal.value.fields["holders"] == [f"the mount at {os.path.realpath(inner)}"]
    finally:
        mount.umount(str(inner))


def test_an_unbindable_mount_is_refused(bench: Bench, tree: Path) -> None:
    mount.mount("tree", str(tree), "tmpfs", 0, None)
    try:
        mount.mount(None, str(tree), None, mount.MS_UNBINDABLE, None)
        with pytest.raises(Invalid, match="unbindable"):
            bench.acquire(bench.bind(str(tree)))
    finally:
        mount.umount(str(tree))


def test_a_path_in_a_mount_stays_in_it(bench: Bench) -> None:
    layered = bench.layered()
    (place(layered) / "out").symlink_to("../../../../../../etc")
    record = bench.acquire(bench.bind_inside(layered, "/out"))
    assert os.path.samefile(place(record), place(layered) / "etc")


def test_what_is_no_directory_is_refused(bench: Bench, run_dir: Path) -> None:
    (run_dir / "file").touch()
    for path, reason in {"file": "no directory", "missing": "does not exist on this host"}.items():
        with pytest.raises(Invalid, match=reason) as refusal:
            bench.acquire(bench.bind(str(run_dir / path)))
        assert refusal.value.fields["path"] == "$.path"


def test_a_recursive_bind_of_our_own_mounts_is_refused(bench: Bench, run_dir: Path) -> None:
    for path in (run_dir, run_dir.parent, Path("/")):
        with pytest.raises(Invalid, match="this server's own mounts"):
            bench.acquire(bench.bind(str(path), recursive=True))
