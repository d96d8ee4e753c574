"""The saved state that every guest starts from: booted once, its modules loaded, its agent waiting."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from lab.guest import link, qemu
from lab.guest.root import KERNEL, root
from tools import images

ACCELERATOR = os.environ.get("LAB_ACCELERATOR", "tcg,thread=multi")
"""Emulation works everywhere; `LAB_ACCELERATOR=kvm` is faster where the machine can."""


DISK = "1G"
"""The size of the disk of a guest that reboots. It has holes where nothing is written."""


class State(NamedTuple):
    """A stopped machine: its memory, and the rest of it."""

    shape: qemu.Shape
    directory: Path

    @property
    def memory(self) -> Path:
        return self.directory / "memory"

    @property
    def devices(self) -> Path:
        return self.directory / "devices"

    @property
    def disk(self) -> Path | None:
        """What it has written, where that is not in its memory."""
        return self.directory / "disk" if self.shape.systemd else None


def booted(version: str = KERNEL, *, systemd: bool = False) -> State:
    """The state after a boot, made on first use: a quarter of a minute.

    Raises: subprocess.CalledProcessError, OSError, RuntimeError.
    """
    shape = qemu.Shape(root(version), ACCELERATOR, systemd)
    emulator = subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True).stdout
    code = hashlib.sha256(Path(qemu.__file__).read_bytes() + Path(__file__).read_bytes()).hexdigest()
    made_of = f"{shape.root.disk.stat().st_mtime_ns} {shape.root.directory} {shape.accelerator} {emulator} {code}"
    name = "guest-systemd" if systemd else "guest-state"
    return State(shape, images.cached(name, "d", made_of, lambda directory: _boot(State(shape, directory))))


def _boot(state: State) -> None:
    state.directory.mkdir()
    scratch = state.directory.parent / "boot"
    scratch.mkdir()
    if state.disk:
        images.run("mke2fs", "-q", "-t", "ext4", str(state.disk), DISK)
    machine = qemu.Qemu(state.shape, state.memory, scratch)
    machine.start(disk=state.disk)
    try:
        agent = link.Link(machine)
        agent.run(["sync"], timeout=qemu.PATIENCE)
        agent.close()
        machine.save(state.devices)
    finally:
        machine.stop()
