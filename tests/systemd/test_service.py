"""The service under systemd, in a guest that has booted it: kept alive, stopped, activated, and ended with its host.

All tests share one guest: each leaves nothing in it, and the last one reboots it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lab.ceph import Cluster
from lab.guest.guest import Guest
from lab.guest.network import SERVER as HOST
from lab.guest.network import Network
from lab.guest.service import CODE, CONTAINERS, ENVIRONMENT, SERVER, SOCKET, UNITS, Service
from lab.images import small_image, systemd_image
from lab.iscsi import Server as Target
from lab.machine import Machine
from lab.server import box, eventually

pytestmark = pytest.mark.guest

IMAGE, DEBIAN = "/root/image", "/root/debian"
TALKING = "/bin/sh -c 'trap \"echo asked; exit 0\" TERM; i=0; while true; do echo line $i; i=$((i+1)); sleep 0.1; done'"
WWN = "iqn.2026-01.test:systemd"
IMPATIENT = """\
[Service]
WatchdogSec=5
"""
WITNESS = """\
[Service]
ExecStop=cp -a /run/imageapi /var/lib/at-the-end
"""
"""What the network's unit does when it goes."""
OLD = "/var/lib/before"
POWER_LOSS = f"""\
[Service]
ExecStartPre=cp -a {OLD} /run/imageapi
"""
"""At the next boot there is a run directory as one is found that was on a disk when the power failed."""


GUEST = {"systemd": True}


@pytest.fixture(scope="module")
def guest(guest_of_module: Guest) -> Guest:
    return guest_of_module


@pytest.fixture(scope="module")
def installed(guest: Guest) -> Service:
    service = Service(guest)
    service.install()
    guest.put(small_image(), IMAGE)
    service.systemctl("enable", SERVER)
    service.drop_in(SERVER, IMPATIENT)
    return service


@pytest.fixture
def service(installed: Service) -> Iterator[Service]:
    """It runs, and has nothing; so it is at the end."""
    installed.systemctl("start", SERVER)
    installed.reconnect()
    yield installed
    installed.clear()
    installed.http.close()


def squashfs(path: str = IMAGE) -> dict[str, Any]:
    image = {"path": path, "base": "root", "ro": True}
    return {"kind": "loopback", "loopback": {"fs_type": "squashfs", "mount_options": ["ro"], "loopback": image}}


def on(lower: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "overlay", "overlay": {"lower": [lower]}}


def talker(service: Service, **more: Any) -> Any:
    return service.post("/container", box(TALKING, mount=on(squashfs()), **more))


def lines(service: Service, made: Any) -> list[str]:
    """What a talker has said so far."""
    return [line for line in service.guest.read(made["logfile"]).decode().splitlines() if line.startswith("line")]


def goes_on(service: Service, made: Any) -> None:
    """The container is the one that it was, by all that is told of it, and its log has no gap and grows."""
    assert service.get(f"/container/{made['id']}") == made
    said = len(lines(service, made))
    eventually(lambda: len(lines(service, made)) > said, "it goes on")
    found = lines(service, made)
    assert found == [f"line {number}" for number in range(len(found))]


def test_containers_are_in_a_scope_of_their_own_and_a_restart_is_nothing_to_them(service: Service) -> None:
    made = talker(service)
    scope = service.unit_of(made["pid"])
    assert scope[0] == "imageapi.slice"
    assert service.unit_of(service.pid) == ["system.slice", SERVER]
    assert [service.show(scope[1], name) for name in ("Delegate", "TasksMax")] == ["yes", "infinity"]
    assert service.show(SERVER, "StatusText").endswith("attachments")
    before = service.pid
    service.systemctl("restart", SERVER)
    assert service.again(before) != before
    goes_on(service, made)
    assert service.unit_of(made["pid"]) == scope


def test_a_killed_server_is_started_again(service: Service) -> None:
    made, before = talker(service), service.pid
    service.guest.run("kill", "-KILL", str(before))
    service.again(before)
    goes_on(service, made)


def test_one_that_hangs_is_ended_by_the_watchdog_and_started_again(service: Service) -> None:
    made, before = talker(service), service.pid
    service.guest.run("kill", "-STOP", str(before))
    service.again(before)
    assert "Watchdog timeout" in service.journal()
    goes_on(service, made)


OLDER = f"""\
[Service]
ExecStart={CODE}/bin/imageapi-server --scheme unix --socket-path /run/imageapi.sock --scheme http --host localhost \
--port 8080 --tls-port 0 --cleanup-timeout 10s --graceful-timeout 15s --max-header-size 1MiB --keep-alive 3m
Environment=IMAGEAPI_LOGLEVEL=INFO
"""


def test_a_stop_leaves_containers_running_whoever_starts_the_server_next(service: Service) -> None:
    """A request, by the socket that systemd keeps; a unit of the Go service, which says nothing of KillMode=, and so
    ends all that is in its control group; and our own unit again."""
    made = talker(service)
    service.systemctl("stop", SERVER)
    assert service.pid == 0
    service.guest.run("test", "-d", f"/proc/{made['pid']}")
    service.systemctl("start", SOCKET)
    assert service.pid == 0
    service.reconnect()
    goes_on(service, made)
    assert service.pid
    service.systemctl("stop", SOCKET, SERVER)
    service.guest.write(f"{UNITS}/older.service", OLDER)
    service.systemctl("start", "older")
    eventually(lambda: service.guest.complete("test", "-S", "/run/imageapi.sock").returncode == 0, "it listens", 60)
    service.reconnect()
    goes_on(service, made)
    service.systemctl("stop", "older")
    service.guest.run("rm", f"{UNITS}/older.service")
    service.systemctl("start", SERVER)
    service.reconnect()
    goes_on(service, made)


def test_a_reload_takes_the_log_level(service: Service) -> None:
    before = service.pid
    service.guest.write(ENVIRONMENT, "IMAGEAPI_LOGLEVEL=DEBUG\n")
    service.systemctl("reload", SERVER)
    eventually(lambda: "the log level is DEBUG now" in service.journal(), "it says so")
    assert service.pid == before
    service.guest.run("rm", ENVIRONMENT)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("setpriv --no-new-privs", "may not do all that root may"),
        ("unshare --mount", "has a mount namespace of its own"),
        ("env", ""),
    ],
)
def test_a_unit_that_takes_too_much_is_told(installed: Service, command: str, said: str) -> None:
    ask = "from imageapi.linux import systemd; print(systemd.booted(), *systemd.restrictions())"
    found = installed.guest.run(*command.split(), "env", f"PYTHONPATH={CODE}/src", "python3", "-c", ask)
    assert found.startswith("True")
    assert said in found if said else found == "True\n"


def test_containers_are_not_stopped_by_hand_with_their_unit(service: Service) -> None:
    made = talker(service)
    refusal = service.guest.complete("systemctl", "stop", CONTAINERS)
    assert b"may be requested by dependency only" in refusal.stderr
    goes_on(service, made)


# -------------------------------------------------------------------------------------------- the end of the host


@pytest.fixture(scope="module")
def target(machine: Machine, lab_network: Network) -> Iterator[Target]:
    server = Target(str(machine.session.fast / "iscsi-systemd"), host=HOST, enter=lab_network.enter)
    with machine.expecting():
        server.start()
        server.add_disk(server.add_target(WWN), 1, str(small_image()))
    yield server
    server.stop()


def test_a_reboot_stops_containers_releases_storage_and_starts_clean(
    service: Service, guest_ceph: Cluster, target: Target
) -> None:
    guest = service.guest
    guest.put(systemd_image(), DEBIAN)
    guest_ceph.import_image(str(small_image()), "reboot.sqsh")
    rbd = {"monitors": [guest_ceph.monitor], "pool": "rbd", "image": "reboot.sqsh",
           "options": {"ro": True, "secret": guest_ceph.admin_key}}  # fmt: skip
    iscsi = {"initiator": "iqn.2026-01.test:node", "target": WWN, "host": HOST, "lun": 1, "ro": True}
    boxes = [
        talker(service),
        *(service.post("/container", box(TALKING, mount=on(mounted(kind, one))))
          for kind, one in (("rbd", rbd), ("iscsi", iscsi))),
        service.post("/container", box("/usr/lib/systemd/systemd", mount=on(squashfs(DEBIAN)), systemd=True)),
    ]  # fmt: skip
    guest.run("cp", "-a", "--one-file-system", "/run/imageapi", OLD)
    service.drop_in("lab-network.service", WITNESS)
    service.drop_in(SERVER, POWER_LOSS)
    guest.reboot()
    assert left_when_the_network_went(guest) == []
    for made in boxes:
        log = guest.read(made["logfile"].replace("/var/run/imageapi", "/var/lib/at-the-end")).decode()
        assert "stopping container: the host is going down" in log
        assert log.endswith("container deleted\n")
        assert made["systemd"] or "\nasked\n" in log
    at_the_end = ("/var/lib/at-the-end/mounts", "/var/lib/at-the-end/state/container")
    assert guest.run("find", *at_the_end, "-mindepth", "1") == ""
    service.again(0)
    assert service.everything() == [], "what the records of before say is void"
    assert talker(service)["id"] == boxes[-1]["id"] + 1, "no id that was shown is used again"
    assert guest.run("find", "/run/imageapi/mounts", "-mindepth", "1", "-maxdepth", "1").count("/mount_") == 2


def left_when_the_network_went(guest: Guest) -> list[str]:
    """But for this checkout."""
    found = guest.read("/var/lib/network-went").decode().splitlines()
    assert found[0] == "network went"
    return [line for line in found[1:] if " /imageapi " not in line]


def mounted(kind: str, attachment: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, kind: {"fs_type": "squashfs", "mount_options": ["ro"], kind: attachment}}
