"""A real iSCSI target on loopback: tgtd in user space, all of it in one directory.

It runs in the foreground as a child of the test process, so that nothing of it can outlive that unseen, on an address
of its own: targets stand side by side, and the machine's own control socket is not touched.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lab.ceph import wait_until

PORT = 3260


class Account(NamedTuple):
    """A name and its secret."""

    user: str
    secret: str


class TargetError(Exception):
    """A command of tgtadm's failed; the text is what it wrote."""


def free_address(port: int = PORT) -> str:
    """A loopback address on which nobody listens on the port."""
    for _ in range(100):
        address = f"127.0.{random.randint(2, 254)}.{random.randint(2, 254)}"
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return address
    raise TargetError(f"no loopback address is free on port {port}")


class Server:
    """A target server: any number of targets, each with its disks. `portals` are addresses with ports."""

    def __init__(
        self,
        directory: str | None = None,
        portals: Sequence[str] = (),
        *,
        host: str | None = None,
        enter: tuple[str, ...] = (),
    ) -> None:
        """`enter` is the beginning of the command: one that runs it in another network, where `host` is an address."""
        self.directory = directory or tempfile.mkdtemp(prefix="imageapi-iscsi-")
        os.makedirs(self.directory, exist_ok=True)
        self.host = host or free_address()
        self._enter = enter
        self._portals = [f"{self.host}:{PORT}", *portals]
        self._made: list[tuple[str, ...]] = []
        self._targets = 0
        self._process: subprocess.Popen[bytes] | None = None

    # ------------------------------------------------------------------------------------------ life

    def start(self) -> None:
        """Run it, with all the targets that were made so far."""
        portals = ",".join(f"portal={each}" for each in self._portals)
        with open(f"{self.directory}/log", "ab") as log:
            self._process = subprocess.Popen(
                [*self._enter, "tgtd", "--foreground", "--control-port", "1", "--iscsi", portals],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
            )  # fmt: skip
        wait_until(self._answers, "the target server answers")
        for words in self._made:
            self._tgtadm(*words)

    def kill(self) -> None:
        """SIGKILL: connections are reset, and refused until `start`. It takes no other signal while it has targets."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it and remove the directory."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """It is stopped: it takes connections and says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    # --------------------------------------------------------------------------------------- targets

    def add_target(
        self, name: str, *, account: Account | None = None, mutual: Account | None = None, initiator: str = ""
    ) -> int:
        """A target without disks, and its number. With `initiator` it lets only that one in."""
        self._targets += 1
        tid = ("--tid", str(self._targets))
        self._make("new", "target", *tid, "--targetname", name)
        self._make("bind", "target", *tid, *(("--initiator-name", initiator) if initiator else ("-I", "ALL")))
        for who, direction in ((account, ()), (mutual, ("--outgoing",))):
            if who is not None:
                self._make("new", "account", "--user", who.user, "--password", who.secret)
                self._make("bind", "account", *tid, "--user", who.user, *direction)
        return self._targets

    def add_disk(self, target: int, lun: int, path: str, *, read_only: bool = False) -> None:
        """The file `path` as a disk of a target. tgt has LUN 0 for itself."""
        words = ("--tid", str(target), "--lun", str(lun))
        self._make("new", "logicalunit", *words, "--backing-store", path)
        if read_only:
            self._make("update", "logicalunit", *words, "--params", "readonly=1")

    def sessions(self, target: int) -> int:
        """How many initiators are logged in to a target."""
        shown = self._tgtadm("--op", "show", "--mode", "conn", "--tid", str(target))
        return shown.count("Session:")

    # ----------------------------------------------------------------------------------------- parts

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "TGT_IPC_SOCKET": f"{self.directory}/control"}

    def _make(self, verb: str, what: str, *words: str) -> None:
        command = ("--op", verb, "--mode", what, *words)
        self._tgtadm(*command)
        self._made.append(command)

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise TargetError(f"tgtd ended by itself; see {self.directory}/log")
        with contextlib.suppress(TargetError):
            self._tgtadm("--op", "show", "--mode", "sys")
            return True
        return False

    def _tgtadm(self, *words: str) -> str:
        done = subprocess.run(
            ["tgtadm", "--control-port", "1", "--lld", "iscsi", *words],
            env=self._environment, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        if done.returncode:
            raise TargetError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout
