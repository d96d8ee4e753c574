"""What a test leaves behind in the guest. This runs there: nothing is imported that the agent has not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PLACES = ("/run", "/tmp", "/var/tmp", "/dev/shm", "/var/lib/imageapi")


def traces() -> list[str]:
    """All that is there now and could be left behind, a line each."""
    found = (*_mounts(), *_devices(), *_kernel(), *_processes(), *_files())
    return sorted(set(found))


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        yield f"mount {' '.join(line.split()[2:])}"


def _devices() -> Iterator[str]:
    for path in Path("/sys/block").iterdir():
        if path.name.startswith("loop"):
            backing = path / "loop/backing_file"
            if backing.exists():
                yield f"loop device {path.name} on {backing.read_text().strip()}"
        elif not path.name.startswith("nbd") or (path / "pid").exists():
            yield f"block device {path.name}"


def _kernel() -> Iterator[str]:
    """Keys for Ceph, iSCSI sessions, NFS servers that are in use."""
    for line in Path("/proc/keys").read_text().splitlines():
        if line.split()[7] == "ceph":
            yield f"key {' '.join(line.split()[7:])}"
    for path in Path("/sys/class/iscsi_session").glob("*"):
        yield f"iscsi {path.name}"
    for name in ("servers", "volumes"):
        for line in Path(f"/proc/fs/nfsfs/{name}").read_text().splitlines()[1:]:
            yield f"nfs {name} {line}"


def _processes() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if command and stat[0] not in "ZX":  # a thread of the kernel has no command line
            yield f"process {path.name} started at tick {stat[19]}"


def described(trace: str) -> str:
    """With the command line, which is no part of a process' identity."""
    if not trace.startswith("process"):
        return trace
    try:
        command = Path(f"/proc/{trace.split()[1]}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        command = "?"
    return f"{trace}: {command}"


def _files() -> Iterator[str]:
    for place in PLACES:
        if os.path.isdir(place):
            yield from (f"file {place}/{name}" for name in os.listdir(place))
    yield from (f"control group {path}" for path, _, _ in os.walk("/sys/fs/cgroup"))
