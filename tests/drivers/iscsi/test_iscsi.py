"""The iscsi driver on a real target, by way of the storage daemon."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from drivers.exporting import attached, daemons, is_read_only, write_in_parallel
from drivers.iscsi.on_target import (
    ACCOUNT,
    CLOSED,
    DRIVER,
    FAR,
    GUARDED,
    IMAGE,
    INITIATOR,
    MUTUAL,
    PARTED,
    PROTECTED,
    SCRATCH,
    SCRATCH_SIZE,
    Lab,
    chap,
    definition,
    mutual,
    problem,
    record,
)
from imageapi import errors
from imageapi.config import Site
from imageapi.drivers import exported
from imageapi.drivers.deadline import Deadline
from imageapi.drivers.iscsi import pdu, portals
from imageapi.linux import blockqueue, loop, mount
from imageapi.spec import Secret
from lab.iscsi import PORT, free_address

pytestmark = pytest.mark.iscsi

GOOD: dict[str, dict[str, Any]] = {
    "without CHAP": {},
    "with CHAP": {"target": GUARDED, "chap": chap()},
    "with mutual CHAP": {"target": MUTUAL, "chap": mutual()},
    "CHAP that nobody asks for": {"chap": chap()},
    "a LUN above 255": {"lun": FAR},
    "IPv6": {"host": "::1", "port": 3269},
    "IPv6 in brackets": {"host": "[::1]", "port": 3269},
    "a name": {"host": "localhost", "port": 3268},
}


@pytest.mark.parametrize("fields", GOOD.values(), ids=GOOD)
def test_the_device_holds_the_bytes_of_the_disk(site: Site, lab: Lab, fields: dict[str, Any]) -> None:
    with attached(site, record(definition(lab, **fields))) as device:
        assert Path(device).read_bytes() == lab.image.ljust(len(lab.image))
        assert is_read_only(device)
    assert os.listdir(site.helpers_dir) == []


def test_the_device_is_ours_by_its_mark_and_is_found_again(site: Site, lab: Lab) -> None:
    what = record(definition(lab), 7)
    assert DRIVER.observe(what, site) is None
    with attached(site, what) as device:
        state = loop.status(device)
        assert state is not None
        assert state.name == site.mark(what.key)
        facts = DRIVER.observe(what, site)
        assert facts is not None
        assert (facts.device_file, f"/dev/loop{facts.device_id}") == (device, device)
    assert DRIVER.observe(what, site) is None


def test_a_file_system_on_it_can_be_mounted(site: Site, lab: Lab) -> None:
    target = f"{site.mounts_dir}/here"
    os.mkdir(target)
    what = record(definition(lab))
    with attached(site, what) as device:
        mount.mount(device, target, "squashfs", mount.MS_RDONLY, None)
        try:
            assert Path(target, "etc/hello").read_text() == "hello\n"
            with pytest.raises(errors.Conflict, match=f"{device} is in use by the mount at .*/here"):
                DRIVER.release(what, site)
        finally:
            mount.umount(target)
            os.rmdir(target)


def test_release_can_be_repeated_and_needs_no_acquire(site: Site, lab: Lab) -> None:
    what = record(definition(lab))
    DRIVER.release(what, site)
    with attached(site, what):
        pass
    DRIVER.release(what, site)


def test_what_is_written_is_on_the_target_after_the_detach(site: Site, lab: Lab) -> None:
    what = record(definition(lab, lun=SCRATCH, ro=False))
    written = os.urandom(3 << 20)
    with attached(site, what) as device, open(device, "r+b") as block:
        assert not is_read_only(device)
        block.seek(1 << 20)
        block.write(written)
    with attached(site, record(definition(lab, lun=SCRATCH), 1)) as device:
        assert Path(device).read_bytes()[1 << 20 : 4 << 20] == written


def test_writes_that_are_under_way_at_once_do_not_mix(site: Site, lab: Lab) -> None:
    written = os.urandom(SCRATCH_SIZE)
    with attached(site, record(definition(lab, lun=SCRATCH, ro=False))) as device:
        write_in_parallel(device, written)
    assert lab.scratch.read_bytes() == written


def test_images_of_one_target_have_a_daemon_and_a_session_each(site: Site, lab: Lab) -> None:
    before = lab.server.sessions(1)
    with attached(site, record(definition(lab))), attached(site, record(definition(lab, lun=SCRATCH), 1)):
        assert (len(daemons(site)), lab.server.sessions(1) - before) == (2, 2)
    assert lab.server.sessions(1) == before


def test_the_scheduler_is_the_devices_as_long_as_it_is_ours(site: Site, lab: Lab) -> None:
    with attached(site, record(definition(lab, scheduler="mq-deadline"))) as device:
        assert blockqueue.schedulers(Path(device).name)[0] == "mq-deadline"
    assert blockqueue.schedulers(Path(device).name)[0] == exported.NO_SCHEDULER


def test_a_portal_is_told_what_it_is_asked_for_and_names_itself(lab: Lab) -> None:
    found = portals.reach(definition(lab, target=GUARDED, chap=chap()), Deadline(5), discover=True)
    assert [str(each) for each in found] == [f"{lab.server.host}:3260"]


# ------------------------------------------------------------------------------------------------ whose it is


def test_a_target_is_the_same_by_every_portal_and_in_every_case(lab: Lab) -> None:
    one = definition(lab, target=GUARDED)
    other = definition(lab, target=GUARDED.upper(), host="elsewhere", port=1)
    assert DRIVER.identities(one) == DRIVER.identities(other)
    assert DRIVER.identities(one) != DRIVER.identities(definition(lab, target=GUARDED, lun=SCRATCH))


# ---------------------------------------------------------------------------------------------- what is refused


UNPROVEN = {"target": MUTUAL, "chap": mutual(mutual_secret=Secret("not-the-proof"))}
REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a wrong secret": ({"target": GUARDED, "chap": chap(secret=Secret("not-it"))}, "$.chap.secret", ACCOUNT.user),
    "an unknown user": ({"target": GUARDED, "chap": chap(user="who")}, "$.chap.secret", "'who'"),
    "no CHAP": ({"target": GUARDED}, "$.chap", "wants CHAP: give chap.user and chap.secret"),
    "a target that is not proven": (UNPROVEN, "$.chap.mutual_secret", "does not prove"),
    "another's proof": ({"target": MUTUAL, "chap": mutual(mutual_user="x")}, "$.chap.mutual_secret", "does not prove"),
    "no account to prove": ({"target": GUARDED, "chap": mutual(user="node")}, "$.chap.secret", "to prove itself with"),
    "a target that proves nothing": ({"chap": mutual()}, "$.chap.secret", "to prove itself with"),
    "half of a pair": ({"chap": chap(mutual_user="t")}, "$.chap.mutual_secret", "mutual_secret too"),
    "the other half": ({"chap": chap(mutual_secret=Secret("of-target"))}, "$.chap.mutual_user", "mutual_user too"),
    "one secret for both": ({"chap": mutual(mutual_secret=chap().secret)}, "$.chap.mutual_secret", "choose two"),
    "no such target": ({"target": "iqn.2026-01.test:none"}, "$.target", "no target iqn.2026-01.test:none"),
    "a target for others": ({"target": CLOSED}, "$.target", INITIATOR),
    "no such LUN": ({"lun": 7}, "$.lun", f"its disks are at LUN {IMAGE}, {SCRATCH}, {PROTECTED}, {PARTED}, {FAR}"),
    "no disk": ({"lun": 0}, "$.lun", f"no disk at LUN 0: its disks are at LUN {IMAGE}"),
    "a protected disk": ({"lun": PROTECTED, "ro": False}, "$.ro", "set ro"),
    "no such name": ({"host": "nowhere.invalid"}, "$.host", "nowhere.invalid"),
    "no such scheduler": ({"scheduler": "fair"}, "$.scheduler", "mq-deadline"),
}
"""What cannot be attached: the fields, the JSON path of the refusal, and what it says."""


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_attached_says_why(site: Site, lab: Lab, case: str) -> None:
    fields, path, words = REFUSALS[case]
    refusal = problem(site, definition(lab, **fields))
    assert (refusal.code, refusal.fields["path"]) == (422, path), refusal.message
    assert words in refusal.message
    assert lab.server.sessions(1) == 0


def test_a_portal_that_is_not_there(site: Site, lab: Lab) -> None:
    address = free_address()
    refusal = problem(site, definition(lab, host=address))
    assert (refusal.code, refusal.fields["path"]) == (504, "$.host")
    assert f"{address}:3260 (Connection refused)" in refusal.message


def test_a_portal_that_takes_connections_and_is_silent(site: Site, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portals, "CONNECT_TIMEOUT", 0.3)
    with socket.create_server((address := free_address(), 3260)):
        refusal = problem(site, definition(lab, host=address))
    assert (refusal.code, f"{address}:3260 (no answer in time)" in refusal.message) == (504, True)


@contextlib.contextmanager
def answering(data: bytes) -> Iterator[str]:
    """An address where whoever connects is sent `data`, once, and then nothing more."""
    address = free_address()
    with socket.create_server((address, 3260)) as server, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(data)

        said = pool.submit(answer)
        yield address
        said.result(5)


@pytest.mark.parametrize("data", [b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4, b"", b"\x23" + bytes(20)])
def test_a_portal_that_speaks_something_else(site: Site, lab: Lab, data: bytes) -> None:
    with answering(data) as address:
        refusal = problem(site, definition(lab, host=address))
    assert (refusal.code, f"what listens at {address}:3260 is no iSCSI target" in refusal.message) == (500, True)


def test_a_portal_that_sends_us_to_another(lab: Lab) -> None:
    address = pdu.encode_text({"TargetAddress": f"{lab.server.host}:3260,1"})
    status = bytes(28) + (0x0101).to_bytes(2, "big")
    with answering(pdu.encode(pdu.LOGIN_RESPONSE, 0, status, address)) as host:
        found = portals.reach(definition(lab, host=host), Deadline(5))
    assert [str(each) for each in found] == [f"{lab.server.host}:3260"]


@pytest.mark.parametrize("silent", [0, 3])
def test_a_name_with_dead_addresses_is_tried_at_the_next(
    site: Site, lab: Lab, monkeypatch: pytest.MonkeyPatch, silent: int
) -> None:
    """Those that say nothing have their share of the time, and no more."""
    with contextlib.ExitStack() as listening:
        dead = [free_address()]
        for _ in range(silent):
            dead.append(listening.enter_context(socket.create_server((free_address(), PORT))).getsockname()[0])
        monkeypatch.setattr(
            portals, "resolve", lambda _: [portals.Portal(each, PORT) for each in (*dead, lab.server.host)]
        )
        found = portals.reach(definition(lab, host="many.addresses"), Deadline(4))
    assert [str(each) for each in found] == [f"{lab.server.host}:{PORT}"]


def test_a_host_without_the_storage_daemon_is_told_what_to_install(
    site: Site, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refusal = problem(site, definition(lab))
    assert (refusal.code, "qemu-block-extra" in refusal.message) == (501, True)
