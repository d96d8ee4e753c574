"""The rbd driver on a real cluster, by way of the storage daemon."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from drivers.exporting import attached, daemons, is_read_only, loops, spied, write_in_parallel
from drivers.rbd.on_cluster import DRIVER, READ_ONLY, definition, problem, record
from imageapi import errors, records
from imageapi.config import Site
from imageapi.drivers import export_loop, storage_daemon
from imageapi.drivers.ceph import daemon
from imageapi.drivers.qmp import Qmp
from imageapi.linux import loop, mount
from imageapi.spec import MASK, Rbd, RbdOptions, Secret
from lab.ceph import Cluster, free_address

pytestmark = pytest.mark.ceph


def test_the_device_holds_the_bytes_of_the_image(site: Site, ceph: Cluster, image: str) -> None:
    with attached(site, record(definition(ceph, image))) as device:
        assert Path(device).read_bytes() == ceph.read_image(image)
        assert is_read_only(device)
    assert os.listdir(site.helpers_dir) == []


def test_the_device_is_ours_by_its_mark_and_is_found_again(site: Site, ceph: Cluster, image: str) -> None:
    what = record(definition(ceph, image), 7)
    assert DRIVER.observe(what, site) is None
    with attached(site, what) as device:
        state = loop.status(device)
        assert state is not None
        assert state.name == site.mark(what.key)
        facts = DRIVER.observe(what, site)
        assert facts is not None
        assert (facts.device_file, f"/dev/loop{facts.device_id}") == (device, device)
    assert DRIVER.observe(what, site) is None


def test_a_file_system_on_it_can_be_mounted(site: Site, ceph: Cluster, image: str) -> None:
    target = f"{site.mounts_dir}/here"
    os.mkdir(target)
    with attached(site, record(definition(ceph, image))) as device:
        mount.mount(device, target, "squashfs", mount.MS_RDONLY, None)
        try:
            assert Path(target, "etc/hello").read_text() == "hello\n"
            with pytest.raises(errors.Conflict, match=f"{device} is in use by the mount at .*/here"):
                DRIVER.release(record(definition(ceph, image)), site)
            assert Path(target, "noise").stat().st_size == 2 << 20
        finally:
            mount.umount(target)
            os.rmdir(target)


def test_release_can_be_repeated_and_needs_no_acquire(site: Site, ceph: Cluster, image: str) -> None:
    what = record(definition(ceph, image))
    DRIVER.release(what, site)
    with attached(site, what):
        pass
    DRIVER.release(what, site)


def test_the_daemon_outlives_the_process_that_attached(site: Site, ceph: Cluster, image: str) -> None:
    what = record(definition(ceph, image))
    program = (
        "import sys, msgspec; from imageapi import config, records; from imageapi.drivers.attach.rbd import Driver;"
        "site = msgspec.json.decode(sys.argv[1], type=config.Site);"
        "print(Driver().acquire(records.decode('attach', sys.stdin.buffer.read()), [], site).device_file)"
    )
    command = [sys.executable, "-c", program, msgspec.json.encode(site).decode()]
    done = subprocess.run(
        command, input=records.encode(what), capture_output=True, timeout=60, check=True, start_new_session=True
    )
    try:
        (pid,) = daemons(site).values()
        assert os.getsid(pid) != os.getsid(0)
        assert Path(done.stdout.decode().strip()).read_bytes() == ceph.read_image(image)
    finally:
        DRIVER.release(what, site)


def test_a_read_only_user_needs_the_capabilities_that_the_refusal_names(site: Site, ceph: Cluster, image: str) -> None:
    key = ceph.add_user("reader", {"mon": "profile rbd", "osd": "profile rbd-read-only pool=rbd"})
    what = definition(ceph, image, name="reader", secret=Secret(key))
    refusal = problem(site, what)
    assert refusal.code == 422
    assert daemon.osd_caps(what) in refusal.message
    ceph.ceph("auth", "caps", "client.reader", "mon", "profile rbd", "osd", daemon.osd_caps(what))
    with attached(site, record(what)) as device:
        assert Path(device).read_bytes() == ceph.read_image(image)


def test_a_snapshot_is_attached_read_only(site: Site, ceph: Cluster, image: str) -> None:
    what = definition(ceph, image, snapshot="one", ro=False)
    assert DRIVER.read_only(what)
    with attached(site, record(what)) as device:
        assert is_read_only(device)
        assert Path(device).read_bytes() == ceph.read_image(image)


def test_an_image_in_a_namespace(site: Site, ceph: Cluster, small_squashfs: Path) -> None:
    ceph.rbd("namespace", "create", "rbd/tenant")
    ceph.import_image(str(small_squashfs), "inner.sqsh", pool="rbd/tenant")
    with attached(site, record(definition(ceph, "inner.sqsh", namespace="tenant"))) as device:
        assert Path(device).read_bytes() == small_squashfs.read_bytes().ljust(os.path.getsize(small_squashfs))
    assert problem(site, definition(ceph, "inner.sqsh", namespace="nobody")).fields["path"] == "$.options.namespace"


def test_the_second_messenger_and_its_options(site: Site, ceph: Cluster, image: str) -> None:
    chosen: dict[str, Any] = {
        "ms_mode": "secure",
        "nocrc": True,
        "noshare": True,
        "read_from_replica": "localize",
        "crush_location": "host:h1|rack:r1",
        "compression_hint": "compressible",
        "mount_timeout": 5,
        "rxbounce": True,
        "noudev": True,
        "notrim": True,
    }
    with attached(site, record(definition(ceph, image, **chosen))) as device:
        assert Path(device).read_bytes() == ceph.read_image(image)


@pytest.mark.parametrize("features", ["layering", "layering,exclusive-lock,object-map,fast-diff,deep-flatten"])
def test_what_is_written_is_in_the_cluster_after_the_detach(site: Site, ceph: Cluster, features: str) -> None:
    name = f"scratch-{len(features)}"
    ceph.create_image(name, "8M", features=features)
    what = record(definition(ceph, name, rw=True))
    written = os.urandom(3 << 20)
    with attached(site, what) as device, open(device, "r+b") as block:
        block.seek(1 << 20)
        block.write(written)
    assert ceph.read_image(name)[1 << 20 : 4 << 20] == written
    with attached(site, record(definition(ceph, name, rw=True), 1)) as device:
        assert Path(device).read_bytes()[1 << 20 : 4 << 20] == written


def test_writes_that_are_under_way_at_once_do_not_mix(site: Site, ceph: Cluster) -> None:
    ceph.create_image("busy", "16M")
    written = os.urandom(16 << 20)
    with attached(site, record(definition(ceph, "busy", rw=True))) as device:
        write_in_parallel(device, written)
    assert ceph.read_image("busy") == written


def test_writes_that_the_cluster_refuses_are_told_once_and_then_let_go(site: Site, ceph: Cluster) -> None:
    ceph.create_image("not-yours", "8M")
    key = ceph.add_user("watcher", READ_ONLY)
    what = record(definition(ceph, "not-yours", name="watcher", secret=Secret(key), rw=True))
    with attached(site, what) as device:
        with open(device, "r+b") as block:
            block.write(b"x" * 4096)
        with pytest.raises(errors.Problem, match="refused the last writes"):
            DRIVER.release(what, site)
        assert DRIVER.observe(what, site) is not None
    assert os.listdir(site.helpers_dir) == []


def test_ten_images_share_one_daemon_which_ends_with_the_last(site: Site, ceph: Cluster, image: str) -> None:
    records = [record(definition(ceph, image), number) for number in range(10)]
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        facts = list(pool.map(lambda what: DRIVER.acquire(what, [], site), records))
        assert len({each.device_file for each in facts}) == 10
        assert len(daemons(site)) == 1
        list(pool.map(lambda what: DRIVER.release(what, site), records[:9]))
        assert len(daemons(site)) == 1
        DRIVER.release(records[9], site)
    assert os.listdir(site.helpers_dir) == []


def test_a_full_daemon_is_left_alone(site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_daemon, "LIMIT", 1)
    first, second = (record(definition(ceph, image), number) for number in range(2))
    with attached(site, first), attached(site, second):
        assert len(daemons(site)) == 2


def test_an_image_is_attached_and_detached_without_a_look_at_the_others(
    site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, *others = (record(definition(ceph, image), number) for number in range(5))
    commands, looked_at = spied(Qmp, "execute", monkeypatch), spied(export_loop, "_sysfs", monkeypatch)
    said = []
    with contextlib.ExitStack() as standing:
        for other in others:
            standing.enter_context(attached(site, other))
            commands.clear()
            looked_at.clear()
            with attached(site, what) as device:
                pass
            said.append([command for _, command in commands])
            assert {name for name, *_ in looked_at} == {Path(device).name}
    assert said == [said[0]] * len(others)
    assert "query-named-block-nodes" not in said[0]


def test_a_device_is_known_where_the_kernel_does_not_number_them(
    site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Linux 5.15: another file can be put under it all the same."""
    what, sysfs = record(definition(ceph, image)), export_loop._sysfs
    monkeypatch.setattr(export_loop, "_sysfs", lambda name, key: "" if key == "diskseq" else sysfs(name, key))
    with attached(site, what) as device:
        export_loop.move(site, what.key, device)
        assert export_loop.find(site, what.key) == device


def test_an_image_that_can_be_written_is_attached_once_whatever_its_monitors_are_called(
    site: Site, ceph: Cluster, image: str
) -> None:
    by_number = [str(int(ipaddress.ip_address(ceph.monitor)))]
    alike, writer = (
        record(msgspec.structs.replace(what, monitors=by_number), 1)
        for what in (definition(ceph, image), definition(ceph, image, rw=True))
    )
    with attached(site, record(definition(ceph, image))):
        with attached(site, alike):
            assert len(loops(site)) == 2
        with pytest.raises(errors.Conflict, match="attached already, as attach 0"):
            DRIVER.acquire(writer, [], site)
        assert len(loops(site)) == 1
        with attached(site, record(definition(ceph, image, rw=True, force=True), 1)):
            assert len(loops(site)) == 2


def test_two_users_have_a_daemon_each(site: Site, ceph: Cluster, image: str) -> None:
    key = ceph.add_user("second", READ_ONLY)
    second = definition(ceph, image, name="second", secret=Secret(key))
    with attached(site, record(definition(ceph, image))), attached(site, record(second, 1)):
        assert len(daemons(site)) == 2


# ------------------------------------------------------------------------------------------- what is refused


def test_what_the_cluster_has_not_is_named(site: Site, ceph: Cluster, image: str) -> None:
    other_key = Secret(ceph.add_user("other", READ_ONLY))
    cases = {
        "$.image": definition(ceph, "nothing"),
        "$.pool": definition(ceph, image, pool="puddle"),
        "$.snapshot": definition(ceph, image, snapshot="never"),
        "$.options.secret": definition(ceph, image, secret=other_key),
    }
    for path, what in cases.items():
        refusal = problem(site, what)
        assert (refusal.code, refusal.fields["path"]) == (422, path)
    unknown = problem(site, definition(ceph, image, name="nobody", secret=other_key))
    assert (unknown.code, "client.nobody" in unknown.message) == (422, True)


@pytest.mark.parametrize("secret", ["not base64!", MASK, "QUJDREVGR0g="])
def test_a_secret_that_is_no_key_never_reaches_the_cluster(site: Site, ceph: Cluster, image: str, secret: str) -> None:
    refusal = problem(site, definition(ceph, image, secret=Secret(secret)))
    assert (refusal.code, refusal.fields["path"]) == (422, "$.options.secret")


def test_a_cluster_that_wants_a_key_says_so(site: Site, ceph: Cluster, image: str) -> None:
    refusal = problem(site, Rbd([ceph.monitor], "rbd", image))
    assert (refusal.code, refusal.fields["path"]) == (422, "$.options.secret")


def test_an_option_only_the_kernel_can_honour(site: Site, ceph: Cluster, image: str) -> None:
    refusal = problem(site, definition(ceph, image, lock_on_read=True))
    assert (refusal.code, refusal.fields["path"]) == (501, "$.options.lock_on_read")
    assert "--rbd-backend kernel" in refusal.message


def test_a_host_without_the_storage_daemon_is_told_what_to_install(
    site: Site, ceph: Cluster, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = definition(ceph, image)
    monkeypatch.setenv("PATH", str(tmp_path))
    refusal = problem(site, what)
    assert refusal.code == 501
    assert "qemu-block-extra" in refusal.message


def test_a_monitor_that_is_not_there(site: Site, ceph: Cluster, image: str) -> None:
    address = free_address()
    refusal = problem(site, Rbd([address], "rbd", image))
    assert refusal.code == 504
    assert address in refusal.message


def test_a_monitor_that_accepts_and_is_silent_stops_nobody_else(site: Site, ceph: Cluster, image: str) -> None:
    address = free_address()
    with socket.create_server((address, 6789)), attached(site, record(definition(ceph, image), 1)) as device:
        with pytest.raises(errors.TimedOut, match=address):
            DRIVER.acquire(record(Rbd([address], "rbd", image, None, RbdOptions(mount_timeout=1))), [], site)
        assert Path(device).read_bytes() == ceph.read_image(image)


def test_one_living_monitor_of_several_is_enough(site: Site, ceph: Cluster, image: str) -> None:
    silent = free_address()
    options = definition(ceph, image).options
    with socket.create_server((silent, 6789)):
        several = Rbd([silent, free_address(), f"{ceph.monitor}:3300"], "rbd", image, None, options)
        with attached(site, record(several)) as device:
            assert Path(device).read_bytes() == ceph.read_image(image)
