"""The rbd driver when something breaks, is killed halfway, or must stay secret."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from drivers import interruptions
from drivers.exporting import (
    ATTRIBUTES_VALID,
    assert_nothing_left,
    attached,
    can_be_asked,
    daemons,
    loops,
    process_texts,
    spied,
)
from drivers.rbd.on_cluster import DRIVER, READ_ONLY, definition, problem, record
from imageapi import errors
from imageapi.config import Site
from imageapi.drivers import block, daemon_process, export_loop, partitions, storage_daemon
from imageapi.drivers.ceph import daemon
from imageapi.drivers.deadline import Deadline
from imageapi.drivers.qmp import conversation, descriptor
from imageapi.linux import loop, mount
from imageapi.records import AnyRecord
from imageapi.spec import Secret
from lab.ceph import Cluster, wait_until
from lab.machine import Machine
from lab.remote import read_directly, stopped

pytestmark = pytest.mark.ceph


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_ended_in_use_is_cleared_away(site: Site, ceph: Cluster, image: str, number: int) -> None:
    target = f"{site.mounts_dir}/here"
    os.mkdir(target)
    what = record(definition(ceph, image))
    with attached(site, what) as device:
        mount.mount(device, target, "squashfs", mount.MS_RDONLY, None)
        (pid,) = daemons(site).values()
        os.kill(pid, number)
        wait_until(lambda: DRIVER.observe(what, site) is None, "the daemon's end is seen")
        wait_until(lambda: not can_be_asked(device), "the kernel no longer knows the file's attributes")
        mount.umount(target)
        os.rmdir(target)
    assert os.listdir(site.helpers_dir) == []


def test_a_dead_daemon_is_replaced_while_its_images_wait_for_release(site: Site, ceph: Cluster, image: str) -> None:
    lost, new = (record(definition(ceph, image), number) for number in range(2))
    with attached(site, lost):
        (pid,) = daemons(site).values()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: DRIVER.observe(lost, site) is None, "the daemon's end is seen")
        with attached(site, new) as device:
            assert Path(device).read_bytes() == ceph.read_image(image)


def test_a_daemon_that_ends_before_the_device_is_noted_again_is_replaced_as_well(
    site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device whose file was changed has another sequence number, and shows no file when its daemon is replaced."""

    def dying(*of: Any, sequence: str = "") -> None:
        if not sequence:
            raise KeyboardInterrupt
        note(*of, sequence=sequence)

    what, note = record(definition(ceph, image)), export_loop._note
    with attached(site, what) as device:
        end_daemon(what, site)
        monkeypatch.setattr(export_loop, "_note", dying)
        with pytest.raises(KeyboardInterrupt):
            DRIVER.mend(what, site)
        monkeypatch.undo()
        end_daemon(what, site)
        facts, complaint = DRIVER.mend(what, site)
        assert (facts.device_file, complaint) == (device, None)
        assert Path(device).read_bytes() == ceph.read_image(image)


def test_partitions_are_read_again_when_a_daemon_is_replaced(
    site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel forgets them where its device has to be empty for a moment."""
    wanted = msgspec.structs.replace(definition(ceph, image), readPartitions=True)
    calls = spied(partitions, "have_read", monkeypatch)
    with attached(site, what := record(wanted)) as device:
        end_daemon(what, site)
        assert DRIVER.mend(what, site)[1] is None
        assert calls == [(device,)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_device_that_was_not_noted_goes_though_its_daemon_has_ended(
    site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """One that is told to end takes its mount along: then the kernel does not tell on what the device stands."""
    what = record(definition(ceph, image))
    with monkeypatch.context() as patched:
        _die_before_the_note(patched)
        _attach_in_another_process(what, site)
    (device,) = loops(site)
    end_daemon(what, site, number)
    DRIVER.release(what, site)
    assert not loop.backing_path(device)
    assert_nothing_left(site, "after both deaths")


def _die_before_the_note(patched: pytest.MonkeyPatch) -> None:
    def dying(*of: Any, sequence: str = "") -> None:
        note(*of, sequence=sequence) if sequence else os._exit(0)

    note = export_loop._note
    patched.setattr(export_loop, "_note", dying)


def _attach_in_another_process(what: AnyRecord, site: Site) -> None:
    if (pid := os.fork()) == 0:
        try:
            DRIVER.acquire(what, [], site)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def end_daemon(what: AnyRecord, site: Site, number: int = signal.SIGKILL) -> None:
    (pid,) = daemons(site).values()
    os.kill(pid, number)
    wait_until(lambda: not storage_daemon.standing(site, what.key), "the daemon's end is seen")


def test_an_image_is_not_cut_off_while_it_is_found_out_who_uses_it(
    site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes a while on a host with many processes and mounts."""

    def asked(device: str) -> errors.Conflict:
        assert not [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
        return busy(device)

    busy, what = block.busy, record(definition(ceph, image))
    monkeypatch.setattr(block, "busy", asked)
    with attached(site, what) as device:
        user = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(errors.Conflict, match="in use"):
                DRIVER.release(what, site)
        finally:
            os.close(user)


def test_a_hung_daemon_of_one_image_that_cannot_lose_anything_is_killed(
    site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_process, "GREETING_TIMEOUT", 1.0)
    with attached(site, record(definition(ceph, image))):
        (pid,) = daemons(site).values()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(ATTRIBUTES_VALID)
    assert os.listdir(site.helpers_dir) == []


def test_what_stands_on_a_hung_daemon_of_several_images_is_taken_away_and_the_daemon_waited_for(
    site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_process, "GREETING_TIMEOUT", 1.0)
    first, second = (record(definition(ceph, image), number) for number in range(2))
    with attached(site, first), attached(site, second) as kept:
        (pid,) = daemons(site).values()
        with stopped(pid):
            with pytest.raises(errors.TimedOut, match=f"process {pid} .* does not answer"):
                DRIVER.release(first, site)
            assert len(loops(site)) == 1
        assert Path(kept).read_bytes() == ceph.read_image(image)
    assert_nothing_left(site, "after the release")


def test_a_hung_daemon_is_killed_when_nothing_stands_on_any_of_its_images(
    site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_process, "GREETING_TIMEOUT", 1.0)
    what = [record(definition(ceph, image), number) for number in range(2)]
    for each in what:
        DRIVER.acquire(each, [], site)
    (pid,) = daemons(site).values()
    with stopped(pid):
        with pytest.raises(errors.TimedOut):
            DRIVER.release(what[0], site)
        for each in reversed(what):
            DRIVER.release(each, site)
    assert_nothing_left(site, "after the release")


@pytest.mark.parametrize("several", [False, True], ids=["alone", "beside another"])
def test_an_image_whose_daemon_was_forgotten_is_let_go_all_the_same(
    site: Site, ceph: Cluster, small_squashfs: Path, several: bool
) -> None:
    """Somebody has removed what says which it is: meanwhile none is taken for one that nobody needs. The cluster takes
    a killed daemon for a watcher for half a minute: no other test has had this image."""
    ceph.import_image(str(small_squashfs), image := f"forgotten-{several}")
    forgotten, other = (record(definition(ceph, image), number) for number in range(2))
    with contextlib.ExitStack() as also, attached(site, forgotten):
        if several:
            also.enter_context(attached(site, other))
        (name,) = storage_daemon.daemons(site)
        os.unlink(storage_daemon.private_path(site, forgotten.key, "daemon"))
        assert storage_daemon.idle(site) == {}
        DRIVER.release(forgotten, site)
        assert storage_daemon.daemons(site) == [name] * several
        assert ceph.watchers(image) == several


def test_a_daemon_that_nobody_needs_any_more_is_found_and_ended(site: Site, ceph: Cluster, image: str) -> None:
    """Somebody has removed all that there was of its image. Its device is known by the record alone."""
    what = record(definition(ceph, image))
    with attached(site, what) as device:
        what.facts = DRIVER.observe(what, site) or what.facts
        storage_daemon.sever(site, what.key)
        shutil.rmtree(os.path.dirname(storage_daemon.export_path(site, what.key)))
        ((name, pid),) = storage_daemon.idle(site).items()
        assert pid in daemons(site).values()
        storage_daemon.end_idle(site, name)
        assert daemons(site) == {}
        assert loop.backing_path(device)
    assert not loop.backing_path(device)


def test_a_device_that_is_another_s_by_now_is_left_alone(site: Site, ceph: Cluster, image: str) -> None:
    """The record that knew it has outlived it."""
    gone, other = (record(definition(ceph, image), number) for number in range(2))
    with attached(site, gone):
        gone.facts = DRIVER.observe(gone, site) or gone.facts
    with attached(site, other) as device:
        gone.facts.device_file = device
        DRIVER.release(gone, site)
        assert Path(device).read_bytes() == ceph.read_image(image)


def test_a_new_image_is_not_kept_waiting_by_a_hung_daemon(
    site: Site, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_process, "GREETING_TIMEOUT", 0.5)
    first, second = (record(definition(ceph, image), number) for number in range(2))
    with attached(site, first):
        (pid,) = daemons(site).values()
        with stopped(pid), attached(site, second) as device:
            assert Path(device).read_bytes() == ceph.read_image(image)
            assert len(daemons(site)) == 2


def test_an_image_that_takes_its_time_to_open_holds_up_no_other(site: Site, ceph: Cluster, image: str) -> None:
    """librados waits for a monitor in QEMU's own loop; what is open already has a thread of its own."""
    first, second = (record(definition(ceph, image), number) for number in range(2))
    with attached(site, first) as device, concurrent.futures.ThreadPoolExecutor(1) as pool:
        source, whole = daemon.source(second.key, second.definition, site), ceph.read_image(image)
        with ceph.silent_mon():
            opening = pool.submit(storage_daemon.export, site, second.key, source, Deadline(20))
            wait_until(lambda: (Path(site.helpers_dir) / "attach-1/export").exists(), "the image is being opened")
            assert read_directly(device, 1 << 20) == whole[1 << 20 : 2 << 20]
            assert not opening.done()
        opening.result(20)
        DRIVER.release(second, site)


def test_osds_that_do_not_answer_are_a_time_out_and_leave_nothing(
    site: Site, machine: Machine, ceph: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "DEADLINE", 2.0)
    ceph.kill_osd()
    try:
        refusal = problem(site, definition(ceph, image))
    finally:
        with machine.expecting():
            ceph.restart_osd()
    assert refusal.code == 504
    assert ceph.monitor in refusal.message


def test_reads_wait_for_an_osd_that_is_away(site: Site, machine: Machine, ceph: Cluster, image: str) -> None:
    with attached(site, record(definition(ceph, image))) as device, concurrent.futures.ThreadPoolExecutor(1) as pool:
        ceph.kill_osd()
        reading = pool.submit(Path(device).read_bytes)
        with machine.expecting():
            ceph.restart_osd()
        assert reading.result(timeout=60) == ceph.read_image(image)


def test_an_attach_that_was_killed_halfway_is_undone_from_its_record(site: Site, ceph: Cluster, image: str) -> None:
    what = definition(ceph, image)
    key = record(what).key
    source = daemon.source(key, what, site)
    storage_daemon.export(site, key, source, Deadline(20))
    assert loops(site) == []
    DRIVER.release(record(what), site)
    assert os.listdir(site.helpers_dir) == []


def test_an_attach_killed_at_any_step_is_undone_from_its_record(site: Site, ceph: Cluster, image: str) -> None:
    what = record(definition(ceph, image))
    for step in interruptions.some_deaths(lambda: DRIVER.acquire(what, [], site)):
        DRIVER.release(what, site)
        assert_nothing_left(site, f"after death at step {step}")
    DRIVER.release(what, site)


def test_an_attach_that_fails_at_any_step_leaves_nothing(site: Site, ceph: Cluster, image: str) -> None:
    what = record(definition(ceph, image))
    for step, failed in interruptions.errors(lambda: DRIVER.acquire(what, [], site)):
        if not failed:
            DRIVER.release(what, site)
        assert_nothing_left(site, f"after an error at step {step}")
    DRIVER.release(what, site)


def test_a_detach_killed_at_any_step_is_finished_by_the_next(site: Site, ceph: Cluster, image: str) -> None:
    what = record(definition(ceph, image))
    DRIVER.acquire(what, [], site)
    for step in interruptions.some_deaths(lambda: DRIVER.release(what, site)):
        DRIVER.release(what, site)
        assert_nothing_left(site, f"after death at step {step}")
        DRIVER.acquire(what, [], site)
    DRIVER.release(what, site)


# ------------------------------------------------------------------------------------------- the secret


def test_the_secret_is_nowhere_to_be_read(site: Site, ceph: Cluster, image: str) -> None:
    key = ceph.add_user("hidden", READ_ONLY)
    what = record(definition(ceph, image, name="hidden", secret=Secret(key)))
    with attached(site, what):
        (pid,) = daemons(site).values()
        assert (shown := process_texts())[f"/proc/{pid}/cmdline"]
        assert all(key.encode() not in shown[path] for path in shown)
        files = [path for path in Path(site.run_dir).rglob("*") if path.is_file() and path.name != "export"]
        assert {path.name for path in files} == {"pid", "ceph.conf", "image", "loop"}
        assert all(key not in path.read_text() for path in files)
        assert Path(site.helpers_dir).stat().st_mode & 0o077 == 0


def test_the_daemon_itself_keeps_no_secret_object(site: Site, ceph: Cluster, image: str) -> None:
    with attached(site, record(definition(ceph, image))):
        (name,) = daemons(site)
        directory = descriptor(f"{site.helpers_dir}/{name}")
        with conversation(directory, "qmp", Deadline(5)) as qmp:
            kinds = {each["type"] for each in qmp.execute("qom-list", path="/objects") if each["name"] != "type"}
            assert kinds == {"child<iothread>"}
        os.close(directory)
