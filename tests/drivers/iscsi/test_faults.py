"""The iscsi driver when something breaks, is killed halfway, or must stay secret."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivers import interruptions
from drivers.exporting import (
    ATTRIBUTES_VALID,
    assert_nothing_left,
    attached,
    daemons,
    process_texts,
)
from drivers.iscsi.on_target import DRIVER, MUTUAL, SCRATCH, TARGET_ACCOUNT, Lab, chap, definition, fill, mutual, record
from imageapi import errors
from imageapi.config import Site
from imageapi.drivers import daemon_process, exported, storage_daemon
from imageapi.drivers.deadline import Deadline
from imageapi.drivers.iscsi import portals
from imageapi.drivers.qmp import conversation, descriptor
from imageapi.linux import mount
from lab.ceph import wait_until
from lab.iscsi import PORT, Server
from lab.machine import Machine

pytestmark = pytest.mark.iscsi


def back(server: Server, machine: Machine) -> None:
    """The target is there again, as it was."""
    with machine.expecting():
        server.start()


def test_reads_wait_for_a_target_that_is_away(site: Site, machine: Machine, lab: Lab) -> None:
    with attached(site, record(definition(lab))) as device, concurrent.futures.ThreadPoolExecutor(1) as pool:
        lab.server.kill()
        reading = pool.submit(Path(device).read_bytes)
        back(lab.server, machine)
        assert reading.result(timeout=30) == lab.image


def test_what_is_only_read_is_detached_while_the_target_is_away(
    site: Site, machine: Machine, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a read waits in the daemon, which then answers nobody."""
    monkeypatch.setattr(daemon_process, "GREETING_TIMEOUT", 1.0)
    target = f"{site.mounts_dir}/here"
    os.mkdir(target)
    what = record(definition(lab))
    device = DRIVER.acquire(what, [], site).device_file
    assert device is not None
    mount.mount(device, target, "squashfs", mount.MS_RDONLY, None)
    try:
        lab.server.kill()
        mount.umount(target)
        os.rmdir(target)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            reading = pool.submit(Path(device).read_bytes)
            time.sleep(ATTRIBUTES_VALID)
            DRIVER.release(what, site)
            with pytest.raises(OSError, match="Input/output error"):
                reading.result(10)
    finally:
        back(lab.server, machine)
    DRIVER.release(what, site)
    assert_nothing_left(site, "after the detach")


def test_what_was_written_is_not_given_up_while_the_target_is_away(site: Site, machine: Machine, lab: Lab) -> None:
    what = record(definition(lab, lun=SCRATCH, ro=False))
    written = os.urandom(1 << 20)
    with attached(site, what) as device:
        with open(device, "r+b") as block:
            block.write(written)
        lab.server.kill()
        try:
            (pid,) = daemons(site).values()
            with pytest.raises(errors.TimedOut, match=f"does not answer.* 'kill -9 {pid}' "):
                DRIVER.release(what, site)
            assert DRIVER.observe(what, site) is not None
        finally:
            back(lab.server, machine)
    assert lab.scratch.read_bytes()[: 1 << 20] == written
    assert_nothing_left(site, "after the detach")


def test_a_target_that_takes_connections_and_says_nothing_is_away(site: Site, lab: Lab) -> None:
    what = record(definition(lab, lun=SCRATCH, ro=False))
    refused = pytest.raises(errors.TimedOut, match="is detached when the target is back")
    with attached(site, what), lab.server.silent(), refused:
        DRIVER.release(what, site)
    assert_nothing_left(site, "after the detach")


def test_what_was_written_at_a_portal_that_is_away_is_not_given_up_for_another(
    site: Site, machine: Machine, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU stays with the portal that it has."""
    with another_portal(machine, lab) as first:
        both = [portals.Portal(server.host, PORT) for server in (first, lab.server)]
        monkeypatch.setattr(portals, "resolve", lambda _: both)
        what = record(definition(lab, lun=SCRATCH, ro=False))
        with attached(site, what) as device:
            with open(device, "r+b") as block:
                block.write(b"kept" * 1024)
            with first.silent(), pytest.raises(errors.TimedOut, match=f"does not answer at {first.host}"):
                DRIVER.release(what, site)
        assert Path(first.directory, "scratch-1").read_bytes().startswith(b"kept" * 1024)
    assert_nothing_left(site, "after the detach")


@contextlib.contextmanager
def another_portal(machine: Machine, lab: Lab) -> Iterator[Server]:
    """A server of its own with the same targets."""
    server = Server(str(machine.session.fast / "another"))
    server.start()
    try:
        image = machine.session.fast / "another-image"
        image.write_bytes(lab.image)
        fill(server, image)
        image.unlink()
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_ended_as_the_refusal_says_lets_go_of_all(site: Site, machine: Machine, lab: Lab, number: int) -> None:
    what = record(definition(lab, lun=SCRATCH, ro=False))
    DRIVER.acquire(what, [], site)
    lab.server.kill()
    try:
        (pid,) = daemons(site).values()
        os.kill(pid, number)
        wait_until(lambda: DRIVER.observe(what, site) is None, "the daemon's end is seen")
        DRIVER.release(what, site)
    finally:
        back(lab.server, machine)
    assert_nothing_left(site, "after the detach")


def test_a_daemon_that_was_told_to_end_and_waits_for_a_silent_target_is_helped_to_its_end(
    site: Site, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wants to log out, and has closed the image's file by then: there is nothing left to be lost."""
    monkeypatch.setattr(daemon_process, "GREETING_TIMEOUT", 0.5)
    what = record(definition(lab, lun=SCRATCH, ro=False))
    DRIVER.acquire(what, [], site)
    (pid,) = daemons(site).values()
    with lab.server.silent():
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: DRIVER.observe(what, site) is None, "the daemon's end has begun")
        DRIVER.release(what, site)
    assert_nothing_left(site, "after the detach")


def test_a_target_that_falls_silent_is_a_time_out_and_leaves_nothing(
    site: Site, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has let us in; QEMU it does not."""
    monkeypatch.setattr(exported, "DEADLINE", 1.0)
    export = storage_daemon.export

    def silenced(*arguments: object) -> str:
        with lab.server.silent():
            return export(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(storage_daemon, "export", silenced)
    with pytest.raises(errors.TimedOut, match="does not answer in time"):
        DRIVER.acquire(record(definition(lab)), [], site)
    assert_nothing_left(site, "after the failed attach")


# ------------------------------------------------------------------------------------------- killed halfway


def test_an_attach_killed_at_any_step_is_undone_from_its_record(site: Site, lab: Lab) -> None:
    what, step = record(definition(lab)), 0
    for step in interruptions.some_deaths(lambda: DRIVER.acquire(what, [], site)):
        DRIVER.release(what, site)
        assert_nothing_left(site, f"after death at step {step}")
    DRIVER.release(what, site)
    assert step > 20


def test_an_attach_that_fails_at_any_step_leaves_nothing(site: Site, lab: Lab) -> None:
    what, step = record(definition(lab)), 0
    for step, failed in interruptions.errors(lambda: DRIVER.acquire(what, [], site)):
        if not failed:
            DRIVER.release(what, site)
        assert_nothing_left(site, f"after an error at step {step}")
    DRIVER.release(what, site)
    assert step > 10


def test_a_detach_killed_at_any_step_is_finished_by_the_next(site: Site, lab: Lab) -> None:
    what, step = record(definition(lab)), 0
    DRIVER.acquire(what, [], site)
    for step in interruptions.some_deaths(lambda: DRIVER.release(what, site)):
        DRIVER.release(what, site)
        assert_nothing_left(site, f"after death at step {step}")
        DRIVER.acquire(what, [], site)
    DRIVER.release(what, site)
    assert step > 10


# ------------------------------------------------------------------------------------------- the secrets


def test_the_secrets_are_nowhere_to_be_read(site: Site, lab: Lab) -> None:
    what = record(definition(lab, target=MUTUAL, chap=mutual()))
    secrets = [chap().secret.reveal().encode(), TARGET_ACCOUNT.secret.encode()]
    with attached(site, what):
        (pid,) = daemons(site).values()
        assert (shown := process_texts())[f"/proc/{pid}/cmdline"]
        assert all(secret not in text for secret in secrets for text in shown.values())
        files = [path for path in Path(site.run_dir).rglob("*") if path.is_file() and path.name != "export"]
        assert {path.name for path in files} == {"pid", "loop", "portal"}
        assert all(secret not in path.read_bytes() for secret in secrets for path in files)


def test_the_daemon_itself_keeps_no_secret_object(site: Site, lab: Lab) -> None:
    with attached(site, record(definition(lab, target=MUTUAL, chap=mutual()))):
        (name,) = daemons(site)
        directory = descriptor(f"{site.helpers_dir}/{name}")
        with conversation(directory, "qmp", Deadline(5)) as qmp:
            kinds = {each["type"] for each in qmp.execute("qom-list", path="/objects") if each["name"] != "type"}
            assert kinds == {"child<iothread>"}
        os.close(directory)
