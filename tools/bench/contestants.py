"""Whom the service is measured against: the bare system calls, and other programs that start containers."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.bench.lab import Lab
from tools.bench.measure import MILLISECOND, Contestant, Unable

UNIFIED = Path("/sys/fs/cgroup/unified")
"""Where cgroup v2 is mounted beside v1 (systemd's "hybrid")."""
_GROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")
_TRACES = ("/run/crun", *(f"{parent}/{name}" for parent in _GROUPS for name in ("payload", "supervisor")))
"""Empty directories and control groups: crun's --version, and systemd-nspawn where systemd does not rule."""


class Limit:
    """The program `limit`: one round a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def round(self, command: str) -> dict[str, float]:
        """When each phase had ended, in ms since the first system call.

        Raises: OSError, when it has ended; its words are on standard error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        pairs = (pair.split("=") for pair in self._process.stdout.readline().split())
        if not (moments := {name: int(moment) / MILLISECOND for name, moment in pairs}):
            raise OSError("the limit program has ended; its words are above")
        return moments


@contextlib.contextmanager
def limit(lab: Lab) -> Iterator[Limit]:
    directory = lab.directory("limit-layers")
    command = [lab.program("limit"), str(lab.image), str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Limit(process)
    finally:
        process.communicate(timeout=30)
        shutil.rmtree(directory)


# ------------------------------------------------------------------------------------------------ the peers


@contextlib.contextmanager
def tidied() -> Iterator[None]:
    """In the end what the peers leave in `_TRACES` is gone, unless it was there before."""
    new = [path for path in map(Path, _TRACES) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            for each in sorted([path, *path.rglob("*/")], reverse=True):
                with contextlib.suppress(FileNotFoundError):
                    each.rmdir()


def peers(lab: Lab, root: str) -> dict[str, Contestant]:
    """Those of apt, each starting `/bin/stamp` in `root`, which is mounted, until its first instruction."""
    return {name: _starting(lab, root, name) for name in _PEERS}


def _starting(lab: Lab, root: str, name: str) -> Contestant:
    return lambda: {name: _started(lab, _PEERS[name](lab, root))}


def _started(lab: Lab, command: list[str]) -> float:
    """Milliseconds from the command's own execve to the first instruction of what it starts.

    Raises: Unable.
    """
    done = subprocess.run([lab.program("launch"), *command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    times = [int(line) for line in done.stdout.splitlines() if line.strip().isdigit()]
    if done.returncode or len(times) != 2:
        raise Unable(" ".join((done.stderr.strip() or f"exit status {done.returncode}").split()))
    return (times[1] - times[0]) / MILLISECOND


def _unshare(lab: Lab, root: str) -> list[str]:
    return ["unshare", "--fork", "--pid", "--mount", "--uts", "--ipc", f"--root={root}", "/bin/stamp"]


def _bubblewrap(lab: Lab, root: str) -> list[str]:
    own = ("--unshare-pid", "--unshare-uts", "--unshare-ipc", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run")
    return ["bwrap", "--bind", root, "/", *own, "/bin/stamp"]


def _crun(lab: Lab, root: str) -> list[str]:
    bundle, state = _bundle(lab, root), str(lab.place / "crun")
    options = ("--root", state, "--cgroup-manager=disabled")
    return [*_without_unified(), "crun", *options, "run", "--bundle", str(bundle), "bench-crun"]


def _runc(lab: Lab, root: str) -> list[str]:
    return ["runc", "--root", str(lab.place / "runc"), "run", "--bundle", str(_bundle(lab, root)), "bench-runc"]


def _podman(lab: Lab, root: str) -> list[str]:
    places = [f"--{name}={lab.place / 'podman' / name}" for name in ("root", "runroot", "tmpdir")]
    cheap = ("--network=host", "--cgroups=disabled", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
    run = ("--storage-driver=vfs", "--runtime=crun", "run", "--rm", *cheap, "--rootfs", root, "/bin/stamp")
    return [*_without_unified(), "podman", *places, *run]


def _nspawn(lab: Lab, root: str) -> list[str]:
    alone = ("--quiet", "--register=no", "--keep-unit", "--console=pipe")
    return ["systemd-nspawn", *alone, f"--directory={root}", "/bin/stamp"]


_PEERS: Mapping[str, Callable[[Lab, str], list[str]]] = {
    "unshare": _unshare,
    "bubblewrap": _bubblewrap,
    "crun": _crun,
    "runc": _runc,
    "podman with crun": _podman,
    "systemd-nspawn": _nspawn,
}


def _without_unified() -> list[str]:
    """The crun of Debian 12 refuses to run where both versions of control groups are mounted."""
    return ["--without", str(UNIFIED)] if UNIFIED.is_mount() else []


def _bundle(lab: Lab, root: str) -> Path:
    """An OCI bundle of the four namespaces that our containers have, without control groups of its own."""
    bundle = lab.place / "bundle"
    if not bundle.exists():
        if shutil.which("runc") is None:
            raise Unable("runc, which writes the bundle, is not installed")
        bundle.mkdir()
        subprocess.run(["runc", "spec"], cwd=bundle, check=True)
        config = json.loads((bundle / "config.json").read_text())
        (bundle / "config.json").write_text(json.dumps(_changed(config, root)))
    return bundle


def _changed(config: dict[str, Any], root: str) -> dict[str, Any]:
    config["root"] = {"path": root, "readonly": False}
    config["process"].update(args=["/bin/stamp"], terminal=False)
    config["mounts"] = [each for each in config["mounts"] if each["type"] != "cgroup"]
    config["linux"].pop("resources", None)
    config["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    return config
