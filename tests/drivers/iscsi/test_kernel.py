"""The iscsi driver in a guest, with the kernel's initiator and open-iscsi, on a target of this side."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from drivers.dead_store import another
from drivers.iscsi.on_target import (
    ACCOUNT,
    FAR,
    GUARDED,
    IMAGE,
    INITIATOR,
    MUTUAL,
    OPEN,
    PARTED,
    SCRATCH,
    TARGET_ACCOUNT,
    Lab,
    fill,
)
from lab import lio, partitions
from lab.guest.guest import Guest
from lab.guest.network import SERVER, SERVER_V6, Network
from lab.guest.server import GuestServer
from lab.images import small_image
from lab.iscsi import PORT, Server
from lab.machine import Machine
from lab.server import box, eventually

pytestmark = pytest.mark.guest

OTHER_PORTAL = "10.99.0.2"
CHAP = {"user": ACCOUNT.user, "secret": ACCOUNT.secret}
PROOF = {"mutual_user": TARGET_ACCOUNT.user, "mutual_secret": TARGET_ACCOUNT.secret}


@pytest.fixture(scope="module")
def lab(machine: Machine, lab_network: Network, small_squashfs: Path) -> Iterator[Lab]:
    """A server that guests reach."""
    portals = [f"{OTHER_PORTAL}:{PORT}", f"[{SERVER_V6}]:{PORT}"]
    server = Server(str(machine.session.fast / "iscsi-guest"), portals, host=SERVER, enter=lab_network.enter)
    with machine.expecting():
        server.start()
        fill(server, small_squashfs)
    yield Lab(server, small_squashfs.read_bytes())
    server.stop()


def run_iscsid(guest: Guest) -> None:
    with guest.expecting():
        guest.start("iscsid", "-f")
        eventually(lambda: "ISCSIADM_ABSTRACT" in guest.read("/proc/net/unix").decode(), "iscsid listens")


@pytest.fixture
def initiator(guest: Guest, lab: Lab) -> Guest:
    """A guest in which iscsid runs."""
    run_iscsid(guest)
    return guest


def await_state(guest: Guest, session: int, state: str) -> None:
    path = f"/sys/class/iscsi_session/session{session}/state"
    eventually(lambda: guest.read(path).decode().strip() == state, f"session {session} is {state}")


def asked(**fields: Any) -> dict[str, Any]:
    """An attachment of the image on the open target, read-only; `fields` say otherwise."""
    return {"initiator": INITIATOR, "target": OPEN, "host": SERVER, "lun": IMAGE, "ro": True, **fields}


GOOD: dict[str, dict[str, Any]] = {
    "CHAP": {"target": GUARDED, "chap": CHAP, "scheduler": "none", "queue_depth": 7},
    "mutual CHAP": {"target": MUTUAL, "chap": {**CHAP, **PROOF, "user": "node2"}},
    "a LUN above 255": {"lun": FAR},
    "IPv6": {"host": SERVER_V6},
}


def test_the_device_is_the_logical_unit_as_it_was_asked_for(initiator: Guest) -> None:
    for case, fields in GOOD.items():
        found = initiator.call("drivers.iscsi.in_guest:looked_at", asked(**fields))
        assert (found["device"], found["observed"], found["begins"]) == ("/dev/sda", "/dev/sda", "hsqs"), case
        assert (found["ro"], found["sessions"], found["left"], found["others"]) == ("1", 1, [], []), case
        assert f"[{fields.get('scheduler', 'mq-deadline')}]" in found["queue/scheduler"], case
        assert found["device/queue_depth"] == str(fields.get("queue_depth", 16)), case


def test_partitions_are_there_by_their_numbers_either_way(initiator: Guest) -> None:
    for backend, fields in (("kernel", {}), ("daemon", {"readPartitions": True})):
        found = initiator.call("drivers.iscsi.in_guest:looked_at", asked(lun=PARTED, **fields), backend)
        assert (found["partitions"], found["left"]) == ({"1": "", "2": "hsqs"}, []), backend


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "a wrong secret": ({"target": GUARDED, "chap": {**CHAP, "secret": "not-the-secret"}}, 422, "$.chap.secret"),
    "no CHAP": ({"target": GUARDED}, 422, "$.chap"),
    "no proof": (
        {"target": MUTUAL, "chap": {**CHAP, **PROOF, "user": "node2", "mutual_secret": "another-one"}},
        422,
        "$.chap.mutual_secret",
    ),
    "no such target": ({"target": "iqn.2026-01.test:none"}, 422, "$.target"),
    "no such LUN": ({"lun": 7}, 422, "$.lun"),
    "no such scheduler": ({"scheduler": "fair"}, 422, "$.scheduler"),
    "no portal": ({"port": 3999}, 504, "$.host"),
}


def test_what_cannot_be_attached_says_why_and_leaves_nothing(initiator: Guest) -> None:
    for case, (fields, code, path) in REFUSED.items():
        problem = initiator.call("drivers.iscsi.in_guest:refused", asked(**fields))
        assert (problem["code"], problem["path"]) == (code, path), (case, problem)


def test_a_host_without_iscsid_is_told_to_start_it_and_sessions_without_a_record_end(guest: Guest, lab: Lab) -> None:
    problem = guest.call("drivers.iscsi.in_guest:refused", asked())
    assert (problem["code"], "systemctl start iscsid" in problem["message"]) == (501, True), problem
    run_iscsid(guest)
    found = guest.call("drivers.iscsi.in_guest:swept", asked())
    assert found == {"removed": ["the iSCSI sessions or records of attach 7"], "left": []}


def test_an_attach_and_a_detach_killed_halfway_leave_nothing(initiator: Guest) -> None:
    """Not at every step: a login takes its time here."""
    assert initiator.call("drivers.iscsi.in_guest:killed", asked(), "acquire", 5, 19) > 1
    assert initiator.call("drivers.iscsi.in_guest:killed", asked(), "release", 3, 19) > 1


# -------------------------------------------------------------------------------------- the kernel's own target


READING = """\
while :; do
    dd if=$0 of=/dev/null bs=64k iflag=direct status=none && echo good >>/tmp/reads || echo bad >>/tmp/reads
    sleep 0.1
done
"""


def reads(guest: Guest) -> list[str]:
    return guest.read("/tmp/reads").decode().split()


def goes_on(guest: Guest) -> None:
    """The reader has read again, and no read has ever failed."""
    before = len(reads(guest))
    eventually(lambda: len(reads(guest)) > before + 2, "it reads")
    assert set(reads(guest)) == {"good"}


def paths(guest: Guest) -> str:
    """A letter for each path of the multipath device: `A` is used, `F` has failed."""
    words = guest.run("dmsetup", "status", "--target", "multipath").split()
    return "".join(state for path, state in itertools.pairwise(words) if re.fullmatch(r"8:\d+", path))


def test_a_target_with_two_portals(initiator: Guest, guest_server: GuestServer) -> None:
    """One is enough; where multipathd runs both are one device, and each may be lost and come back."""
    chap = {**CHAP, **PROOF}
    with initiator.expecting():
        initiator.write("/tmp/disk", partitions.gpt(bytes(4096), small_image().read_bytes()))
        lio.serve(initiator, "/tmp/disk", INITIATOR, chap)
    what = asked(target=lio.TARGET, host=lio.PORTALS[0], lun=0, chap=chap)
    a_single_portal_is_enough(initiator, what)
    with initiator.expecting():
        lio.run_multipathd(initiator)
    made = guest_server.post("/mount/iscsi", {"fs_type": "squashfs", "partition": 2, "iscsi": what})
    a_partition_is_read_on_while_a_portal_is_lost(initiator, made)
    lio.lose_portal(initiator, lio.PORTALS[1])
    refused = guest_server.refused("DELETE", f"/attach/iscsi/{made['iscsi_id']}?force=1", 409)
    assert refused["holders"] == [f"mount {made['id']} (attach)"]
    guest_server.delete(f"/mount/iscsi/{made['id']}")
    eventually(lambda: guest_server.everything() == [], "it is detached")
    assert initiator.run("ls", "/sys/class/iscsi_session") == ""
    assert initiator.run("ls", "/dev/mapper") == "control\n"


def a_single_portal_is_enough(initiator: Guest, what: dict[str, Any]) -> None:
    one = initiator.call("drivers.iscsi.in_guest:looked_at", what)
    assert (one["device"], one["sessions"], one["left"]) == ("/dev/sda", 1, [])
    problem = initiator.call("drivers.iscsi.in_guest:refused", {**what, "initiator": "iqn.2026-01.test:stranger"})
    assert (problem["code"], problem["path"]) == (422, "$.initiator"), problem
    by_qemu = initiator.call("drivers.iscsi.in_guest:looked_at", what, "daemon")
    assert (by_qemu["device"][:9], by_qemu["sessions"], by_qemu["left"]) == ("/dev/loop", 0, [])


def a_partition_is_read_on_while_a_portal_is_lost(initiator: Guest, made: dict[str, Any]) -> None:
    device = initiator.run("findmnt", "-no", "SOURCE", made["mountpoint"]).strip()
    assert (device[:8], initiator.run("blockdev", "--getro", "/dev/dm-0")) == ("/dev/dm-", "1\n")
    eventually(lambda: paths(initiator) == "AA", "there are two paths", 60)
    reader = initiator.start("sh", "-c", READING, device)
    lio.lose_portal(initiator, lio.PORTALS[0])
    eventually(lambda: "F" in paths(initiator), "a path has failed", 60)
    goes_on(initiator)
    lio.bring_back_portal(initiator, lio.PORTALS[0])
    eventually(lambda: paths(initiator) == "AA", "the path is back", 60)
    goes_on(initiator)
    initiator.kill(reader)
    initiator.run("rm", "/tmp/reads")


# ------------------------------------------------------------------------------------------- through the server


def test_a_container_on_a_squashfs_on_iscsi_beside_sessions_of_others(
    initiator: Guest, guest_server: GuestServer
) -> None:
    with initiator.expecting():
        portal = f"{SERVER}:{PORT},1"
        initiator.run("iscsiadm", "-m", "node", "-o", "new", "-T", OPEN, "-p", portal)
        initiator.run("iscsiadm", "-m", "node", "-T", OPEN, "-p", portal, "--login")
        eventually(lambda: "sdc" in initiator.run("ls", "/sys/block"), "the other's disks are there")
    lower = [
        {"kind": "iscsi", "iscsi": {"fs_type": "squashfs", "iscsi": fields}}
        for fields in (asked(target=GUARDED, chap=CHAP), asked())
    ]
    mount = {"kind": "overlay", "overlay": {"lower": lower}}
    made = guest_server.post("/container", box("/bin/none", mount=mount, state="created"))
    assert len({each["device_file"] for each in guest_server.get("/attach")}) == 2
    assert ACCOUNT.secret not in str(guest_server.everything())
    guest_server.delete(f"/container/{made['id']}")
    assert guest_server.everything() == []
    assert initiator.run("ls", "/sys/class/iscsi_session").split() == ["session1"]


def test_a_writer_is_alone_and_what_it_wrote_is_on_the_target(
    initiator: Guest, guest_server: GuestServer, machine: Machine, lab: Lab
) -> None:
    writer = asked(lun=SCRATCH, ro=False)
    made = guest_server.post("/attach/iscsi", writer)
    problem = guest_server.refused("POST", "/attach/iscsi", 409, asked(lun=SCRATCH, host=OTHER_PORTAL))
    assert "options.force" in problem["message"]
    forced = guest_server.post("/attach/iscsi", {**writer, "options": {"force": True}})
    guest_server.delete(f"/attach/iscsi/{forced['id']}")

    initiator.run("dd", f"of={made['device_file']}", "bs=64k", "conv=fsync", stdin=lab.image)
    user = initiator.start("sh", "-c", f"exec 9<{made['device_file']}; exec sleep 1000")
    eventually(lambda: initiator.read(f"/proc/{user}/comm") == b"sleep\n", "the device is open")
    problem = guest_server.refused("DELETE", f"/attach/iscsi/{made['id']}", 409)
    assert problem["holders"] == [f"process {user} (sleep)"]
    initiator.kill(user)

    lab.server.kill()
    try:
        await_state(initiator, 1, "FAILED")
        problem = guest_server.refused("DELETE", f"/attach/iscsi/{made['id']}", 504)
        assert "when the target is back" in problem["message"]
    finally:
        with machine.expecting():
            lab.server.start()
    eventually(lambda: guest_server.get("/attach") == [], "it is detached by itself", 60)
    assert lab.scratch.read_bytes()[: len(lab.image)] == lab.image


def test_a_target_that_stays_away_costs_what_was_not_written_and_no_more(
    initiator: Guest, guest_server: GuestServer, machine: Machine, lab: Lab
) -> None:
    """What is only read is detached at once; what was written when the kernel gives it up, and that is told once.
    Nobody else notices, and the server can be started again."""
    read = guest_server.post("/mount/iscsi", {"fs_type": "squashfs", "mount_options": ["ro"], "iscsi": asked()})
    written = guest_server.post("/attach/iscsi", asked(lun=SCRATCH, ro=False, max_comands=1))
    initiator.sh("echo 10 >/sys/class/iscsi_session/session2/recovery_tmo")
    lab.server.kill()
    try:
        await_state(initiator, 1, "FAILED")
        with another(guest_server) as untouched:
            create = partial(guest_server.refused, "POST", "/attach/iscsi", 504, asked(lun=FAR))
            untouched.while_late([create])
        guest_server.stop()
        guest_server.start()
        assert len(guest_server.everything()) == 3
        guest_server.delete(f"/mount/iscsi/{read['id']}")
        await_state(initiator, 2, "FREE")
        problem = guest_server.refused("DELETE", f"/attach/iscsi/{written['id']}", 500)
        assert "which are lost" in problem["message"]
        eventually(lambda: guest_server.everything() == [], "it is let go at the next attempt", 60)
    finally:
        with machine.expecting():
            lab.server.start()
