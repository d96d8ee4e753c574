"""Exports of an NFS server, with a stock kernel on both sides."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from drivers.dead_store import Another, another
from lab.guest.guest import Guest
from lab.guest.server import GuestServer
from lab.images import small_image
from lab.nfs import CLOSED, HOST, HOST_V6, SILENT, STORE, STORE_V3, NfsServer
from lab.server import box, eventually

pytestmark = pytest.mark.guest


def export(host: str = HOST, path: str = STORE, **more: Any) -> dict[str, Any]:
    return {"host": host, "path": path, **more}


def image_on_server() -> dict[str, Any]:
    """A mount of the small image, which is a file of the server's."""
    image = {"path": "small.sqsh", "base": "mount", "mount": {"kind": "nfs", "nfs": export(ro=True)}, "ro": True}
    return {"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": image}}


MOUNTABLE: dict[str, tuple[dict[str, Any], str]] = {
    # name: (definition, words of the mount's options as the kernel shows them)
    "the default": (export(), "rw,vers=4.2"),
    "4.1": (export(version="4.1"), "vers=4.1"),
    "4.0": (export(version="4.0"), "vers=4.0,clientaddr=10.77.0.2"),
    "the newest 4": (export(version="4"), "vers=4.2"),
    "3, to read": (export(path=STORE_V3, version="3", ro=True), "ro,vers=3,nolock"),
    "3, without locks": (export(path=STORE_V3, version="3", options=["nolock"]), "rw,vers=3,nolock"),
    "IPv6": (export(f"[{HOST_V6}]"), f"vers=4.2,proto=tcp6,addr={HOST_V6}"),
    "IPv6, 3": (export(HOST_V6, STORE_V3, version="3", ro=True), "vers=3,proto=tcp6"),
    "by name": (export("storage.example"), f"addr={HOST}"),
    "options": (
        export(options=["nconnect=4,rsize=65536", "softerr", "timeo=100", "noatime"]),
        "nconnect=4,rsize=65536,softerr,timeo=100",
    ),
}


def test_exports_are_mounted_used_and_let_go(guest: Guest, guest_server: GuestServer, storage: NfsServer) -> None:
    """All in one guest, which takes longer to come up than any of it."""
    every_version_address_and_option(guest, guest_server)
    what_was_written_is_with_the_server(guest, guest_server)
    an_image_becomes_a_container_in_one_request(guest, guest_server)


def every_version_address_and_option(guest: Guest, guest_server: GuestServer) -> None:
    guest.sh(f"echo '{HOST} storage.example' >>/etc/hosts")
    for name, (definition, words) in MOUNTABLE.items():
        made = guest_server.post("/mount/nfs", definition)
        line = guest.run("grep", f" {made['mountpoint']} ", "/proc/self/mountinfo")
        shown = line.split()[-1].split(",")
        assert [word for word in words.split(",") if word not in shown] == [], (name, line)
        assert "nosuid,nodev" in line
        assert guest.read(f"{made['mountpoint']}/message") == b"written by the server\n"
        guest_server.delete(f"/mount/nfs/{made['id']}")
    assert guest.run("cat", "/proc/fs/nfsfs/servers").count("\n") == 1, "no client of a server is left"


def what_was_written_is_with_the_server(guest: Guest, guest_server: GuestServer) -> None:
    made = guest_server.post("/mount/nfs", export())
    writer = guest.start("sh", "-c", f"cd {made['mountpoint']}; echo kept >written; exec sleep 1000")
    eventually(lambda: guest.complete("test", "-s", f"/srv{STORE}/written").returncode == 0, "it is written")
    refused = guest_server.refused("DELETE", f"/mount/nfs/{made['id']}", 409)
    assert refused["holders"] == [f"process {writer} (sleep)"]
    guest.kill(writer)
    guest_server.delete(f"/mount/nfs/{made['id']}")
    assert guest.read(f"/srv{STORE}/written") == b"kept\n"


def an_image_becomes_a_container_in_one_request(guest: Guest, guest_server: GuestServer) -> None:
    guest.put(small_image(), f"/srv{STORE}/small.sqsh")
    tree = {"kind": "nfs", "nfs": export(path=f"{STORE}/tree")}
    guest.sh(f"unsquashfs -quiet -no-progress -dest /srv{STORE}/tree /srv{STORE}/small.sqsh")
    for lower in (image_on_server(), tree):
        mount = {"kind": "overlay", "overlay": {"lower": [lower]}}
        made = guest_server.post("/container", box("/bin/sh -c 'echo new >/data/new; cat /data/new'", mount=mount))
        guest_server.await_state(made["id"], "exited")
        assert b"new\n" in guest.read(made["logfile"])
        guest_server.delete(f"/container/{made['id']}")
        assert guest_server.everything() == []


REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    # name: (definition, code, JSON path, words of the message)
    "no such export": (export(path="/nothing"), 422, "$.path", "exportfs -v"),
    "no such export, 3": (export(path="/nothing", version="3", ro=True), 422, "$.path", "exportfs -v"),
    "for somebody else": (export(path=CLOSED), 422, "$.path", "does not export it to this host"),
    "for somebody else, 3": (export(path=CLOSED, version="3", ro=True), 422, "$.path", "does not let this host mount"),
    "a file": (export(path=f"{STORE}/message"), 422, "$.path", "'loopback'"),
    "locks without their service": (export(path=STORE_V3, version="3"), 501, "$.version", "rpc.statd"),
    "krb5 without its service": (export(options=["soft", "sec=krb5"]), 501, "$.options[1]", "rpc.gssd"),
    "a transport that is not here": (export(options=["proto=rdma"]), 501, "$.options[0]", "transport"),
    "udp": (export(path=STORE_V3, version="3", options=["nolock", "udp"]), 501, "$.options[1]", "udp"),
    "an address that nobody has": (export(SILENT), 504, "$.host", "does not answer"),
    "another service": (export(options=["port=111"]), 422, "$.host", "is no NFS server"),
    "an option that is none": (export(options=["rsise=4096"]), 422, "$.options[0]", "did you mean 'rsize'?"),
}


def test_what_cannot_be_mounted_says_why_and_leaves_nothing(
    guest: Guest, guest_server: GuestServer, storage: NfsServer
) -> None:
    for name, (definition, code, path, words) in REFUSED.items():
        problem = guest_server.refused("POST", "/mount/nfs", code, definition)
        assert (problem["path"], words in problem["message"]) == (path, True), (name, problem)
    storage.without("4.2")
    assert "give '4'" in guest_server.refused("POST", "/mount/nfs", 422, export())["message"]
    made = guest_server.post("/mount/nfs", export(version="4"))
    assert "vers=4.1" in guest.run("grep", made["mountpoint"], "/proc/self/mountinfo")
    guest_server.delete(f"/mount/nfs/{made['id']}")
    storage.without("4")
    assert "speaks NFS versions 3 to 3" in guest_server.refused("POST", "/mount/nfs", 422, export())["message"]
    storage.stop()
    assert "has no NFS service at port" in guest_server.refused("POST", "/mount/nfs", 422, export())["message"]
    assert guest_server.everything() == []


def writer_in(guest: Guest, mount: dict[str, Any]) -> int:
    """A process that goes on writing to a file in the mount, and has begun; its pid."""
    name = str(mount["id"])
    script = f"exec >>{mount['mountpoint']}/{name}; while :; do echo x; sleep 0.01; done"
    pid = guest.start("sh", "-c", script)
    eventually(lambda: guest.complete("test", "-s", f"/srv{STORE}/{name}").returncode == 0, "it writes")
    return pid


def restarted(server: GuestServer) -> None:
    """What it would try again by itself after up to half a minute, it tries at once then."""
    server.kill()
    server.start()


def gone(server: GuestServer, mount: dict[str, Any]) -> bool:
    return server.http.get(f"/mount/nfs/{mount['id']}").status_code == 404


def gone_after(guest: Guest, command: str, server: GuestServer, mount: dict[str, Any]) -> bool:
    """An unmount by force, which before Linux 6.5 is the only way, may have to be repeated: it ends what waits just
    then."""
    if guest.kernel < (6, 5):
        guest.complete("sh", "-c", command)
    return gone(server, mount)


def test_a_server_that_falls_silent_costs_only_what_is_asked_of_it(
    guest: Guest, impatient_server: GuestServer, storage: NfsServer
) -> None:
    server = impatient_server
    with another(server) as untouched:
        costs_only_what_is_asked_of_it(guest, server, storage, untouched)


def costs_only_what_is_asked_of_it(guest: Guest, server: GuestServer, storage: NfsServer, untouched: Another) -> None:
    guest.put(small_image(), f"/srv{STORE}/small.sqsh")
    unwritten, written, given_up = (server.post("/mount/nfs", export()) for _ in range(3))
    reading = "/bin/sh -c 'while :; do cat /bin/busybox >/dev/null; done'"
    mount = {"kind": "overlay", "overlay": {"lower": [image_on_server()]}}
    container = server.post("/container", box(reading, mount=mount))
    writers = [writer_in(guest, each) for each in (written, given_up)]
    storage.silence()
    guest.run("kill", "-KILL", *map(str, writers))
    guest.sh("echo 3 >/proc/sys/vm/drop_caches")

    untouched.while_late([partial(server.refused, "POST", "/mount/nfs", 504, export())])
    restarted(server)
    assert [one.get("problem") for one in server.everything()] == [None] * 8, "nobody is asked for them"

    server.delete(f"/mount/nfs/{unwritten['id']}")
    deletes = [partial(server.refused, "DELETE", f"/mount/nfs/{each['id']}", 504) for each in (written, given_up)]
    said = [each["message"] for each in untouched.while_late(deletes)]
    assert all("has not taken all that was written" in each for each in said)
    assert "is being deleted" in server.get(f"/mount/nfs/{written['id']}")["problem"]
    assert "has not ended in 6s" in server.refused("DELETE", f"/container/{container['id']}?force=1", 504)["message"]

    command = said[1].split("'")[1]
    assert command.startswith("echo 1 > /sys/fs/nfs/" if guest.kernel >= (6, 5) else "umount -f ")
    guest.run("sh", "-c", command, check=guest.kernel >= (6, 5))
    eventually(lambda: gone_after(guest, command, server, given_up), "what is given up goes")
    assert not gone(server, written)

    storage.speak()
    restarted(server)
    eventually(lambda: server.everything() == [], "the rest goes, too", 60)
    for writer in writers:
        guest.await_end(writer)


def test_what_is_interrupted_at_any_step_is_undone(guest: Guest, storage: NfsServer) -> None:
    """With version 3, which opens no session with the server for each of some hundred mounts."""
    steps = guest.call("drivers.nfs.contract:interrupted", HOST, STORE_V3, "3")
    assert all(count > 5 for count in steps.values()), steps
