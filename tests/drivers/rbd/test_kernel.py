"""The kernel's rbd driver, in a guest that has it, against a real cluster."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from drivers.dead_store import another
from lab.ceph import Cluster
from lab.guest.guest import Guest
from lab.guest.network import SERVER, SERVER_V6, Network
from lab.guest.server import RUN_DIR, GuestServer, running
from lab.images import small_image
from lab.machine import Machine
from lab.server import box, eventually

pytestmark = [pytest.mark.guest, pytest.mark.ceph]

IMAGE = "small.sqsh"
LOCKED = "locked"
BUS = "/sys/bus/rbd"
WRONG = "AQAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA=="


@pytest.fixture(scope="module")
def ceph(guest_ceph: Cluster) -> Cluster:
    """With an image of a squashfs, a snapshot of it, one in a namespace, and an empty image with a lock."""
    guest_ceph.import_image(str(small_image()), IMAGE)
    guest_ceph.snapshot(IMAGE, "one", protect=True)
    guest_ceph.rbd("namespace", "create", "rbd/other")
    guest_ceph.import_image(str(small_image("ext4")), IMAGE, pool="rbd/other")
    guest_ceph.create_image(LOCKED, "4M", features="layering,exclusive-lock")
    return guest_ceph


@pytest.fixture
def rbd(ceph: Cluster) -> Callable[..., dict[str, Any]]:
    """The body of an attachment, as client.admin unless options say otherwise."""

    def body(image: str = IMAGE, **more: Any) -> dict[str, Any]:
        outer: dict[str, Any] = {name: more.pop(name) for name in ("monitors", "pool", "snapshot") if name in more}
        options = {"secret": ceph.admin_key, **more}
        chosen = {name: value for name, value in options.items() if value is not None}
        return {"monitors": [ceph.monitor], "pool": "rbd", "image": image, **outer, "options": chosen}

    return body


Body = Callable[..., dict[str, Any]]


def attached(server: GuestServer, body: dict[str, Any]) -> tuple[str, dict[str, str], str]:
    """Attach, look and delete: the kernel's words for the monitors and the options, and the content's hash."""
    made = server.post("/attach/rbd", body)
    monitors, options = server.guest.read(f"{BUS}/devices/{made['device_id']}/config_info").decode().split(" ")[:2]
    digest = server.guest.run("sha256sum", made["device_file"]).split()[0]
    server.delete(f"/attach/rbd/{made['id']}")
    assert server.guest.sh(f"ls {BUS}/devices; ls /dev | grep rbd || true") == ""
    words = (word.partition("=") for word in options.split(","))
    return monitors, {name: value for name, _, value in words}, digest


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_way_to_name_the_monitors(guest_server: GuestServer, rbd: Body) -> None:
    guest_server.guest.sh(f"echo {SERVER} mon-a >>/etc/hosts")
    for given, told, mode in (
        ([SERVER], f"{SERVER}:6789", None),
        ([f"{SERVER}:6789"], f"{SERVER}:6789", None),
        (["mon-a"], f"{SERVER}:6789", None),
        (["10.99.0.9", "no.such.name.invalid", "mon-a:6789", SERVER], f"{SERVER}:6789", None),
        ([f"{SERVER}:3300"], f"{SERVER}:3300", "prefer-crc"),
    ):
        monitors, options, content = attached(guest_server, rbd(monitors=given))
        assert (monitors, options.get("ms_mode"), content) == (told, mode, digest(small_image())), given


def test_a_cluster_on_ipv6(guest_server: GuestServer, machine: Machine, lab_network: Network, rbd: Body) -> None:
    cluster = Cluster(str(machine.session.fast / "ceph6"), SERVER_V6, enter=lab_network.enter)
    with cluster.running():
        cluster.import_image(str(small_image()), IMAGE)
        for monitor in (SERVER_V6, f"[{SERVER_V6}]:6789"):
            body = rbd(monitors=[monitor], secret=cluster.admin_key)
            monitors, _, content = attached(guest_server, body)
            assert (monitors, content) == (f"[{SERVER_V6}]:6789", digest(small_image()))


def test_the_messengers(guest_server: GuestServer, rbd: Body) -> None:
    for mode in ("legacy", "crc", "secure", "prefer-crc", "prefer-secure"):
        monitors, options, content = attached(guest_server, rbd(ms_mode=mode, ro=True))
        port = 6789 if mode == "legacy" else 3300
        assert (monitors, options["ms_mode"], content) == (f"{SERVER}:{port}", mode, digest(small_image()))


FLAGS: list[dict[str, Any]] = [
    {"share": True, "crc": True, "tcp_nodelay": True, "cephx_sign_messages": True, "ceph_requires_signatures": True},
    {"noshare": True, "nocrc": True, "notcp_nodelay": True, "noceph_requires_signatures": True, "rxbounce": True},
    {"osdkeepalive": 5, "osd_idle_ttl": 60, "mount_timeout": 7, "queue_depth": 32, "alloc_size": 65536, "noudev": True},
    {"notrim": True, "abort_on_full": True, "compression_hint": "incompressible", "ip": "10.0.2.15", "udev": True},
    {"read_from_replica": "localize", "crush_location": "host:h1|rack:r1", "rw": True},
    {"lock_on_read": True, "exclusive": True, "lock_timeout": 5},
]
OTHER_WORDS = {
    "ceph_requires_signatures": "cephx_require_signatures",
    "noceph_requires_signatures": "nocephx_require_signatures",
}
NOT_THE_KERNELS = ("udev", "noudev")


def test_every_option_reaches_the_kernel(guest_server: GuestServer, rbd: Body) -> None:
    for chosen in FLAGS:
        _, options, _ = attached(guest_server, rbd(LOCKED, **chosen))
        for name, value in chosen.items():
            told = options.get(OTHER_WORDS.get(name, name))
            assert told == (None if name in NOT_THE_KERNELS else "" if value is True else str(value)), name


def test_the_key_cannot_be_read_and_is_gone_afterwards(guest_server: GuestServer, ceph: Cluster, rbd: Body) -> None:
    guest = guest_server.guest
    made = guest_server.post("/attach/rbd", rbd())
    told = guest.sh(f"cat {BUS}/devices/*/config_info /proc/[0-9]*/cmdline; cat /proc/keys; dmesg")
    assert ceph.admin_key not in told
    assert f"key=imageapi:{guest.read('/run/imageapi/instance').decode().strip()}:attach/{made['id']}" in told
    eventually(lambda: " ceph " not in guest.read("/proc/keys").decode(), "the key is gone")
    assert guest.run("stat", "-c", "%A", made["device_file"]) == "brw-------\n"
    guest_server.delete(f"/attach/rbd/{made['id']}")


def test_namespaces_and_snapshots(guest_server: GuestServer, ceph: Cluster, rbd: Body) -> None:
    _, _, content = attached(guest_server, rbd(namespace="other"))
    assert content == digest(small_image("ext4"))
    made = guest_server.post("/attach/rbd", rbd())
    guest_server.guest.sh(f"dd if=/dev/zero of={made['device_file']} bs=4096 count=1 conv=fsync")
    snapshot = guest_server.post("/attach/rbd", rbd(snapshot="one"))
    same = guest_server.guest.run("sha256sum", snapshot["device_file"]).split()[0]
    assert same == digest(small_image())
    assert guest_server.guest.run("blockdev", "--getro", snapshot["device_file"]) == "1\n"
    ceph.rbd("snap", "rollback", "--no-progress", f"rbd/{IMAGE}@one")


def test_a_refusal_says_what_to_do(guest_server: GuestServer, ceph: Cluster, rbd: Body) -> None:
    """The kernel gives one errno for three things that may be missing; its log says which."""
    ceph.create_image("journal", "64M", features="layering,exclusive-lock,journaling")
    reader = ceph.add_user("reader", {"mon": "profile rbd", "osd": "profile rbd-read-only pool=rbd"})
    elsewhere = ceph.add_user("elsewhere", {"mon": "profile rbd", "osd": "profile rbd pool=elsewhere"})
    other = "00000000-0000-0000-0000-000000000001"
    for body, code, path, words in (
        (rbd(secret=WRONG), 422, "$.options.secret", "'ceph auth get client.admin'"),
        (rbd(secret=None), 422, "$.options.secret", "'ceph auth get-key client.admin'"),
        (rbd(name="nobody"), 422, "$.options.secret", "no such user"),
        (rbd("nope"), 422, "$.image", "no image 'nope' in 'rbd'"),
        (rbd(namespace="none"), 422, "$.image", "in 'rbd/none'"),
        (rbd(pool="nope"), 422, "$.pool", "no pool 'nope'"),
        (rbd(snapshot="nope"), 422, "$.snapshot", "no snapshot 'nope'"),
        (rbd("journal"), 501, "$.image", "journaling"),
        (rbd(name="reader", secret=reader), 422, "$.options.name", "attach with 'ro'"),
        (rbd(name="elsewhere", secret=elsewhere, ro=True), 422, "$.options.name", "rbd-read-only pool=rbd"),
        (rbd(exclusive=True), 422, "$.options.exclusive", "rbd feature enable rbd/small.sqsh exclusive-lock"),
        (rbd(fsid=other), 422, "$.options.fsid", ceph.fsid),
        (rbd(alloc_size=3000), 422, "$.options", "alloc_size must be a power of 2"),
        (rbd(ms_mode="crc", monitors=[f"{SERVER}:6789"]), 422, "$.options.ms_mode", "3300"),
        (rbd(monitors=["10.99.0.9"]), 504, "$.monitors", "10.99.0.9:6789"),
    ):
        problem = guest_server.refused("POST", "/attach/rbd", code, body)
        assert (problem["path"], words in problem["message"]) == (path, True), problem
    assert guest_server.get("/attach") == []
    assert guest_server.guest.sh(f"ls {BUS}/devices") == ""
    made = guest_server.post("/attach/rbd", rbd(name="reader", secret=reader, ro=True))
    guest_server.delete(f"/attach/rbd/{made['id']}")


def test_read_only_images_are_shared_and_writers_are_alone(guest_server: GuestServer, ceph: Cluster, rbd: Body) -> None:
    guest = guest_server.guest
    mount = {"kind": "rbd", "rbd": {"fs_type": "squashfs", "mount_options": ["ro"], "rbd": rbd(ro=True)}}
    for _ in range(2):
        guest_server.post("/container", box("/bin/true", mount={"kind": "overlay", "overlay": {"lower": [mount]}}))
    assert len(guest_server.get("/attach")) == 1
    guest_server.refused("POST", "/attach/rbd", 409, rbd())
    guest.sh(f"echo {SERVER} another-name >>/etc/hosts")
    renamed = guest_server.refused("POST", "/attach/rbd", 409, rbd(monitors=["another-name"]))
    assert "/dev/rbd0" in renamed["message"]
    forced = guest_server.post("/attach/rbd", rbd(monitors=["another-name"], force=True))
    assert forced["device_file"] == "/dev/rbd1"
    guest_server.clear()
    by_hand = f"{SERVER}:6789 name=admin,secret={ceph.admin_key} rbd {IMAGE} -"
    guest.run("sh", "-c", f"cat >{BUS}/add_single_major", stdin=by_hand)
    assert "/dev/rbd0" in guest_server.refused("POST", "/attach/rbd", 409, rbd(ro=True))["message"]
    assert guest.sh(f"ls {BUS}/devices") == "0\n", "a stranger's device is left alone"
    guest.sh(f"echo 0 >{BUS}/remove_single_major")


def test_the_lock_of_another_client_is_named(guest_server: GuestServer, rbd: Body) -> None:
    guest_server.post("/attach/rbd", rbd(LOCKED, exclusive=True))
    problem = guest_server.refused("POST", "/attach/rbd", 409, rbd(LOCKED, exclusive=True, force=True))
    assert "rbd lock ls rbd/locked" in problem["message"]


def test_a_device_in_use_stays_and_its_user_is_named(guest_server: GuestServer, rbd: Body) -> None:
    made = guest_server.post("/attach/rbd", rbd(ro=True))
    pid = guest_server.guest.start("sh", "-c", f"exec sleep 1000 <{made['device_file']}")
    eventually(lambda: guest_server.guest.read(f"/proc/{pid}/comm") == b"sleep\n", "it is open")
    problem = guest_server.refused("DELETE", f"/attach/rbd/{made['id']}", 409)
    assert problem["holders"] == [f"process {pid} (sleep)"]
    guest_server.guest.kill(pid)
    guest_server.delete(f"/attach/rbd/{made['id']}")


def test_osds_that_are_away_cost_only_what_needs_them(guest: Guest, ceph: Cluster, machine: Machine, rbd: Body) -> None:
    """Reads wait; a create and deletes say what they wait for, also to the next server; other images do not notice.
    When the OSDs are back, all of it comes to its end, with nothing left here or in the cluster."""
    ceph.import_image(str(small_image("ext4")), "disk", features="layering,exclusive-lock")
    ceph.create_image("clean", "4M", features="layering,exclusive-lock")
    with running(guest, "--operation-timeout", "8s") as server, another(server) as untouched:
        read, clean = (server.post("/attach/rbd", body) for body in (rbd(ro=True), rbd("clean")))
        guest.sh(f"dd if=/dev/urandom of={clean['device_file']} bs=4096 count=1 oflag=direct status=none")
        disk = server.post("/mount/rbd", {"fs_type": "ext4", "rbd": rbd("disk")})
        guest.sh(f"echo kept {disk['mountpoint']} >{disk['mountpoint']}/file")
        ceph.kill_osd()
        try:
            guest.sh("echo 3 >/proc/sys/vm/drop_caches")
            reader = guest.start("sh", "-c", f"sha256sum {read['device_file']} >/tmp/read")
            create = partial(server.refused, "POST", "/attach/rbd", 504, rbd(snapshot="one", mount_timeout=1))
            deletes = (f"/attach/rbd/{clean['id']}", f"/mount/rbd/{disk['id']}")
            late = [create, *(partial(server.refused, "DELETE", each, 504) for each in deletes)]
            created, detached, unmounted = (each["message"] for each in untouched.while_late(late))
            assert "OSDs of pool 'rbd'" in created
            assert all("goes when that is back" in each for each in (detached, unmounted))
            server.stop()
            server.start()
            assert len(server.get("/attach")) == 3
            eventually(lambda: waits(server, "/mount/rbd", disk, "has not answered"), "it says what it waits for")
            eventually(lambda: waits(server, "/attach/rbd", clean, "told that image 'clean'"), "so does the other")
        finally:
            with machine.expecting():
                ceph.restart_osd()
        guest.await_end(reader)
        assert guest.read("/tmp/read").split()[0].decode() == digest(small_image())
        eventually(lambda: len(server.everything()) == 1, "what was deleted is gone", 60)
        server.delete(f"/attach/rbd/{read['id']}")
    assert f"kept {disk['mountpoint']}".encode() in ceph.read_image("disk")
    for image in ("disk", "clean"):
        assert (ceph.watchers(image), ceph.rbd("lock", "ls", f"rbd/{image}")) == (0, ""), image
    guest.run("rm", "/tmp/read")


def waits(server: GuestServer, collection: str, made: dict[str, Any], words: str) -> bool:
    return words in server.get(f"{collection}/{made['id']}").get("problem", "")


def test_a_monitor_that_dies_is_named_and_what_is_mapped_goes_on(
    guest_server: GuestServer, ceph: Cluster, machine: Machine, rbd: Body
) -> None:
    made = guest_server.post("/attach/rbd", rbd(ro=True))
    ceph.kill_mon()
    assert guest_server.refused("POST", "/attach/rbd", 504, rbd(snapshot="one"))["path"] == "$.monitors"
    guest_server.guest.sh("echo 3 >/proc/sys/vm/drop_caches")
    assert guest_server.guest.run("sha256sum", made["device_file"]).split()[0] == digest(small_image())
    guest_server.delete(f"/attach/rbd/{made['id']}")
    with machine.expecting():
        ceph.restart_mon()
    guest_server.post("/attach/rbd", rbd(snapshot="one"))


def test_one_that_somebody_unmaps_and_one_without_a_record(guest_server: GuestServer, rbd: Body) -> None:
    gone = guest_server.post("/attach/rbd", rbd(ro=True))
    guest_server.guest.sh(f"echo {gone['device_id']} >{BUS}/remove_single_major")
    eventually(lambda: waits(guest_server, "/attach", gone, "gone from the kernel"), "it is said to be gone")
    left = guest_server.post("/attach/rbd", rbd(ro=True))
    guest_server.kill()
    guest_server.guest.run("rm", f"{RUN_DIR}/state/attach/{left['id']}.json")
    guest_server.start()
    assert guest_server.guest.sh(f"ls {BUS}/devices") == ""


def test_a_container_on_an_image_and_nothing_left(guest_server: GuestServer, rbd: Body) -> None:
    mount = {"kind": "rbd", "rbd": {"fs_type": "squashfs", "mount_options": ["ro"], "rbd": rbd(ro=True)}}
    command = "/bin/sh -c 'read text </data/message; echo $text >/data/copy; exec sleep 1000'"
    made = guest_server.post("/container", box(command, mount={"kind": "overlay", "overlay": {"lower": [mount]}}))
    guest_server.kill()
    guest_server.start()
    assert guest_server.get(f"/container/{made['id']}")["state"] == "running"
    guest_server.clear()
    assert guest_server.guest.sh(f"ls {BUS}/devices; ls /run/imageapi/mounts") == ""


def test_a_death_at_any_step_leaves_nothing(guest: Guest, rbd: Body) -> None:
    record = json.dumps({"id": 1, "token": 1, "spec": {"kind": "rbd", "rbd": rbd(ro=True)}})
    done = guest.complete("python3", "-m", "drivers.in_guest", stdin=record, timeout=200)
    assert done.returncode == 0, done.stderr.decode()
    acquire, release, calls = json.loads(done.stdout)
    assert (acquire > 10, release > 3, calls > 10) == (True, True, True), done.stdout
