"""One virtual machine under QEMU: started, spoken to over QMP and a serial port, ended with this process.

Its memory is a file. A boot shares it (`share=on`), so that the file is what is left when the state is saved; a restore
maps it privately (`share=off`), so that nothing is read that is not used, and any number of guests start from it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lab.guest.root import CHECKOUT, Root

MEMORY = "2G"
PATIENCE = 120.0
"""Seconds for a boot under emulation; a restore takes a fraction of one."""

WORDS = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr nowatchdog audit=0 rcupdate.rcu_expedited=1"
"""The kernel's command line: under emulation it does without what only costs time."""
SYSTEMD = "lab_init=/lib/systemd/systemd net.ifnames=0"
"""More of it."""

DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""prctl(2), PR_SET_PDEATHSIG: also when pytest is killed outright."""


class Shape(NamedTuple):
    """What a saved state fits: a restore must say the same."""

    root: Root
    accelerator: str
    systemd: bool = False
    """With systemd as its init, and a disk for what it writes, so that it can reboot. The other ends when it does."""

    def words(self) -> list[str]:
        cpu = "host" if self.accelerator == "kvm" else "Nehalem"
        return [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *(() if self.systemd else ("-no-reboot",)),
            *("-machine", "q35,memory-backend=memory,vmport=off", "-accel", self.accelerator),
            *("-cpu", cpu, "-smp", "1", "-m", MEMORY),  # the second costs a seventh more, to keep it in step
            *("-kernel", str(self.root.kernel), "-initrd", str(self.root.initramfs)),
            *("-append", f"{WORDS} {SYSTEMD if self.systemd else ''}"),
            *("-drive", f"file={self.root.disk},if=virtio,format=raw,readonly=on"),
            *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=terminal"),
            *("-device", "virtserialport,chardev=agent,name=agent"),
            *("-device", "virtio-net-pci,netdev=net", "-serial", "chardev:log"),
            *_shared("checkout", CHECKOUT, "readonly=on"),
        ]


def _shared(tag: str, path: Path, more: str) -> list[str]:
    return ["-virtfs", f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap,{more}"]


class Qemu:
    """One process of QEMU. `directory` holds its sockets and logs; `prefix` is a command that runs a command."""

    def __init__(self, shape: Shape, memory: Path, directory: Path, *, prefix: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self._shape = shape
        self._memory = memory
        self._prefix = prefix

    def start(
        self, incoming: bool = False, share: bool = True, ports: tuple[str, ...] = (), disk: Path | None = None
    ) -> None:
        """Boot, or with `incoming` wait for a state. With `share` the memory's file is what is written to, and left for
        a state to be saved. `ports` are forwarded ones, in QEMU's words (hostfwd). `disk` is written to."""
        forward = "".join(f",hostfwd={port}" for port in ports)
        command = [
            *(*DIE_WITH_US, *self._prefix, *self._shape.words()),
            *(
                "-object",
                f"memory-backend-file,id=memory,size={MEMORY},mem-path={self._memory},share={'on' if share else 'off'}",
            ),
            *("-netdev", f"user,id=net,ipv4=on,ipv6=on{forward}"),
            *(*self._socket("agent"), *self._socket("terminal")),
            *("-chardev", f"file,id=log,path={self.directory / 'console.log'}"),
            *("-qmp", f"unix:{self.directory / 'qmp'},server=on,wait=off"),
            *(("-drive", f"file={disk},if=virtio,format=raw,cache=unsafe") if disk else ()),
            *(("-incoming", "defer") if incoming else ()),
        ]
        with (self.directory / "qemu.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._connection = self.connect("qmp")
        self._qmp = self._connection.makefile("rwb")
        self._qmp.readline()
        self.command("qmp_capabilities")
        self.command("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])

    def _socket(self, name: str) -> tuple[str, str]:
        return "-chardev", f"socket,id={name},path={self.directory / name},server=on,wait=off"

    def connect(self, name: str) -> socket.socket:
        """A connection to one of its sockets, which are there soon after it starts.

        Raises: RuntimeError when it has ended.
        """
        connection = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + PATIENCE
        while connection.connect_ex(str(self.directory / name)):
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: QEMU does not listen")
            time.sleep(0.005)
        return connection

    def check(self) -> None:
        """Raises: RuntimeError with its last words, when it has ended."""
        if self.process.poll() is not None:
            said = (self.directory / "qemu.log").read_text(errors="replace")
            raise RuntimeError(f"QEMU ended ({self.process.returncode}): {said[-2000:]}\n{self.console()}")

    def console(self) -> str:
        """The end of what the guest's kernel wrote."""
        with contextlib.suppress(OSError):
            return (self.directory / "console.log").read_text(errors="replace")[-2000:]
        return ""

    # ---------------------------------------------------------------------------------------------------- QMP

    def command(self, name: str, **arguments: Any) -> Any:
        """Raises: RuntimeError, QEMU's own words."""
        self._qmp.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self._qmp.flush()
        answer = next(message for message in self._messages() if "event" not in message)
        if "error" in answer:
            raise RuntimeError(f"{name}: {answer['error']['desc']}")
        return answer["return"]

    def _messages(self) -> Iterator[dict[str, Any]]:
        while line := self._qmp.readline():
            yield json.loads(line)
        self.process.wait()
        self.check()

    def save(self, state: Path) -> None:
        """Stop it, and write all but its memory."""
        self.command("stop")
        self.command("migrate", uri=f"exec:cat >{state}")
        self._migrated()

    def load(self, state: Path) -> None:
        """What `save` wrote; it runs on from there."""
        self.command("migrate-incoming", uri=f"exec:cat {state}")
        self._migrated()
        self.command("cont")

    def _migrated(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while (status := self.command("query-migrate").get("status")) != "completed":
            if status == "failed" or time.monotonic() > deadline:
                raise RuntimeError(f"the state was not moved: {status}")
            time.sleep(0.002)

    def await_event(self, name: str, seconds: float = PATIENCE) -> None:
        """Raises: TimeoutError, when it does not come in time."""
        self._connection.settimeout(seconds)
        next(message for message in self._messages() if message.get("event") == name)
        self._connection.settimeout(None)

    def stop(self) -> None:
        """It is only a process: nothing of it has to be saved."""
        with contextlib.suppress(OSError):
            self._qmp.close()
        self._connection.close()
        self.process.kill()
        self.process.wait()
