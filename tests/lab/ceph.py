"""A real Ceph on loopback: one monitor, one OSD, no manager, all of it in one directory.

`ceph-mon` and `ceph-osd` run in the foreground as children of the test process, so that nothing of them can outlive it
unseen and their end can be awaited. The monitor listens on the default ports (3300, 6789) of a loopback address of its
own: clients that know an address only, as the kernel and the tutorial do, reach it, and clusters stand side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator

PORTS = (3300, 6789)
"""The monitor's ports for msgr2 and msgr1 (IANA's, and the kernel's default)."""

CONF = """\
[global]
fsid = {fsid}
mon initial members = a
mon host = [v2:{bracketed}:3300,v1:{bracketed}:6789]
ms bind ipv4 = {v4}
ms bind ipv6 = {v6}
public addr = {address}
cluster addr = {address}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
run dir = {directory}
admin socket = {directory}/$name.asok
pid file = {directory}/$name.pid
log file = {directory}/$name.log
crash dir = {directory}/crash
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd heartbeat grace = 5
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
paxos propose interval = 0.05
paxos min wait = 0.01
mon data avail warn = 2
mon data avail crit = 1
mon data = {directory}/mon
[client.admin]
keyring = {directory}/admin.keyring
[osd]
osd data = {directory}/osd
osd objectstore = bluestore
osd memory target = 939524096
bluestore block size = 2147483648
bluestore block create = true
"""


class CephError(Exception):
    """A command of Ceph's failed; the text is its command line and what it wrote."""


def free_address() -> str:
    """A loopback address on which nobody listens on a monitor's ports."""
    for _ in range(100):
        address = f"127.0.{random.randint(2, 254)}.{random.randint(2, 254)}"
        if all(_is_free(address, port) for port in PORTS):
            return address
    raise CephError("no loopback address is free on ports 3300 and 6789")


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Return once `condition` holds.

    Raises: TimeoutError naming `what` was awaited.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


class Cluster:
    """One cluster. `monitor` is what a client is told: an address without a port."""

    def __init__(
        self, directory: str | None = None, address: str | None = None, *, enter: tuple[str, ...] = ()
    ) -> None:
        """`enter` is the beginning of every command: one that runs it in another network."""
        self.directory = directory or tempfile.mkdtemp(prefix="imageapi-ceph-")
        os.makedirs(self.directory, exist_ok=True)
        self.monitor = address or free_address()
        self.fsid = str(uuid.uuid4())
        self._enter = enter
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ------------------------------------------------------------------------------------------ life

    def start(self) -> None:
        """Make the cluster and the pool `rbd`. Leaves nothing when it fails.

        Raises: CephError, TimeoutError.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            self._make_monitor()
            self.restart_mon()
            self._make_osd()
            self.restart_osd()
            self.add_pool("rbd")
            undo.pop_all()

    def stop(self) -> None:
        """End both daemons and remove the directory."""
        for name in ("osd", "mon"):
            self._end(name, signal.SIGTERM)
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def pids(self) -> list[int]:
        """The processes of this cluster that run now."""
        return [process.pid for process in self._daemons.values()]

    @contextlib.contextmanager
    def running(self) -> Iterator[Cluster]:
        """Started on entry, gone on exit."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    # ---------------------------------------------------------------------------------------- faults

    def kill_osd(self) -> None:
        """SIGKILL: reads block until `restart_osd`."""
        self._end("osd", signal.SIGKILL)

    def restart_osd(self) -> None:
        """Run the OSD and wait until the cluster counts it as up: this boot of it, not the one that was killed."""
        before = self._osd_boot()
        self._daemons["osd"] = self._spawn("ceph-osd", "-i", "0")
        wait_until(lambda: self._osd_boot() > before, "the OSD is up")

    def kill_mon(self) -> None:
        """SIGKILL: connections are refused until `restart_mon`."""
        self._end("mon", signal.SIGKILL)

    def restart_mon(self) -> None:
        """Run the monitor and wait until it answers."""
        self._daemons["mon"] = self._spawn("ceph-mon", "-i", "a", "--public-addr", self.monitor)
        self.ceph("mon", "stat")

    @contextlib.contextmanager
    def silent_mon(self) -> Iterator[None]:
        """The monitor is stopped: it accepts connections and says nothing."""
        with self._stopped("mon"):
            yield

    @contextlib.contextmanager
    def silent_osd(self) -> Iterator[None]:
        """The OSD is stopped: reads and writes wait."""
        with self._stopped("osd"):
            yield

    @contextlib.contextmanager
    def _stopped(self, name: str) -> Iterator[None]:
        os.kill(self._daemons[name].pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._daemons[name].pid, signal.SIGCONT)

    # ---------------------------------------------------------------------------------------- content

    def add_pool(self, name: str) -> None:
        """A pool for images."""
        self.ceph("osd", "pool", "create", name, "8", "8")
        self.ceph("osd", "pool", "set", name, "size", "1", "--yes-i-really-mean-it")
        self.rbd("pool", "init", name)

    def add_user(self, name: str, caps: dict[str, str]) -> str:
        """Make client.`name` with `caps` (`{"mon": "profile rbd", "osd": …}`) and return its key."""
        words = [word for pair in caps.items() for word in pair]
        return self.ceph("auth", "get-or-create-key", f"client.{name}", *words).strip()

    @property
    def admin_key(self) -> str:
        """The key of client.admin."""
        return _run("ceph-authtool", self._path("admin.keyring"), "-p", "-n", "client.admin").strip()

    def import_image(self, path: str, name: str, pool: str = "rbd", features: str = "layering") -> None:
        """Store the file `path` as image `name`; `pool` may be `pool/namespace`."""
        self.rbd("import", "--image-feature", features, "--no-progress", path, f"{pool}/{name}")

    def create_image(self, name: str, size: str, pool: str = "rbd", features: str = "layering") -> None:
        """An empty image of `size` (`64M`)."""
        self.rbd("create", "--size", size, "--image-feature", features, f"{pool}/{name}")

    def read_image(self, name: str, pool: str = "rbd") -> bytes:
        """All bytes of an image as the cluster has them."""
        return subprocess.run(
            [*self._enter, "rbd", "-c", self.conf, "export", "--no-progress", f"{pool}/{name}", "-"],
            check=True,
            capture_output=True,
            timeout=120,
        ).stdout

    def snapshot(self, image: str, name: str, pool: str = "rbd", protect: bool = False) -> None:
        """Take the snapshot `name` of `image`."""
        self.rbd("snap", "create", "--no-progress", f"{pool}/{image}@{name}")
        if protect:
            self.rbd("snap", "protect", f"{pool}/{image}@{name}")

    def watchers(self, image: str, pool: str = "rbd") -> int:
        """How many clients hold the image open."""
        status = json.loads(self.rbd("status", "--format", "json", f"{pool}/{image}"))
        return len(status["watchers"])

    # --------------------------------------------------------------------------------------- commands

    @property
    def conf(self) -> str:
        """The path of ceph.conf, for commands of one's own."""
        return self._path("ceph.conf")

    def ceph(self, *words: str, stdin: str = "") -> str:
        """Run a command of the `ceph` tool as client.admin and return what it printed."""
        return _run(*self._enter, "ceph", "-c", self.conf, "--connect-timeout", "30", *words, stdin=stdin)

    def rbd(self, *words: str) -> str:
        """Run a command of the `rbd` tool as client.admin and return what it printed."""
        return _run(*self._enter, "rbd", "-c", self.conf, *words)

    # ------------------------------------------------------------------------------------------ parts

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _make_monitor(self) -> None:
        for name in ("mon", "osd", "crash"):
            os.makedirs(self._path(name), exist_ok=True)
        with open(self.conf, "w", encoding="utf-8") as conf:
            conf.write(
                CONF.format(
                    fsid=self.fsid,
                    address=self.monitor,
                    bracketed=_bracketed(self.monitor),
                    directory=self.directory,
                    v6=str(":" in self.monitor).lower(),
                    v4=str(":" not in self.monitor).lower(),
                )
            )
        self._make_keyrings()
        bracketed = _bracketed(self.monitor)
        address = f"[v2:{bracketed}:3300,v1:{bracketed}:6789]"
        _run("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", address, self._path("monmap"))
        _run(
            *self._enter,
            "ceph-mon",
            "-c",
            self.conf,
            "-i",
            "a",
            "--mkfs",
            "--monmap",
            self._path("monmap"),
            "--keyring",
            self._path("mon.keyring"),
        )

    def _make_keyrings(self) -> None:
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        admin, mon = self._path("admin.keyring"), self._path("mon.keyring")
        _run("ceph-authtool", "--create-keyring", admin, "--gen-key", "-n", "client.admin", *everything)
        _run("ceph-authtool", "--create-keyring", mon, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        _run("ceph-authtool", mon, "--import-keyring", admin)

    def _make_osd(self) -> None:
        identity = str(uuid.uuid4())
        key = _run("ceph-authtool", "--gen-print-key").strip()
        self.ceph("osd", "new", identity, "-i", "-", stdin=json.dumps({"cephx_secret": key}))
        _run("ceph-authtool", "--create-keyring", self._path("osd/keyring"), "-n", "osd.0", "--add-key", key)
        _run(*self._enter, "ceph-osd", "-c", self.conf, "-i", "0", "--mkfs", "--osd-uuid", identity)

    def _osd_boot(self) -> int:
        """The epoch at which the OSD last came up; 0 before the first time."""
        osd = self._daemons.get("osd")
        if osd is not None and osd.poll() is not None:
            raise CephError(f"ceph-osd ended by itself; see {self._path('osd.0.log')}")
        return int(json.loads(self.ceph("osd", "dump", "--format", "json"))["osds"][0]["up_from"])

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self._enter, *command, "-c", self.conf, "-f"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )

    def _end(self, name: str, number: int) -> None:
        process = self._daemons.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise CephError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
