"""Whether what a server has written down, what it shows, and what is in the kernel are one and the same."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imageapi.linux import cgroup
from lab import table
from lab.machine import backing_files
from lab.processes import processes
from lab.server import Server, alive
from lab.session import current

_PLACES = ("mountpoint", "upperdir", "workdir")
SPARE = 1
"""A child in waiting has a FIFO and a parked pidfd as well."""


def differences(server: Server) -> list[str]:
    """A sentence for each thing that is not as it should be. What is just on its way counts, too: so look again."""
    records = {collection: _records(server.run_dir, collection) for collection in ("container", "mount", "attach")}
    return [
        *_shown(server, records),
        *_mounts(server.run_dir, records["mount"]),
        *_directories(server.run_dir, records["mount"]),
        *_loops(server.run_dir, records["attach"]),
        *_helpers(server.run_dir, records["attach"]),
        *_lives(server.run_dir, records["container"]),
        *_strays(server.run_dir, records["container"]),
        *_dead(server),
        *_groups(server.run_dir, records["container"]),
    ]


def _records(run_dir: Path, collection: str) -> dict[int, dict[str, Any]]:
    found = {}
    for path in (run_dir / "state" / collection).iterdir():
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            found[int(path.stem)] = json.loads(path.read_text())
    return found


def _differ(what: str, wanted: set[Any], found: set[Any]) -> Iterator[str]:
    yield from (f"{what} {one} is missing" for one in sorted(wanted - found))
    yield from (f"{what} {one} is nobody's" for one in sorted(found - wanted))


def _shown(server: Server, records: dict[str, dict[int, dict[str, Any]]]) -> Iterator[str]:
    for collection, written in records.items():
        shown = {one["id"]: one for one in server.get(f"/{collection}")}
        yield from _differ(f"{collection} in the answers", set(written), set(shown))
        yield from (f"{collection} {key}: {one['problem']}" for key, one in shown.items() if _is_wrong(one))


def _is_wrong(shown: dict[str, Any]) -> bool:
    """Whether an object has a problem that is not only that its command has failed, or that squashfs keeps what it met
    while there was no storage helper."""
    return "problem" in shown and shown.get("state") != "dead" and "keeps errors that it met" not in shown["problem"]


def _mounts(run_dir: Path, records: dict[int, dict[str, Any]]) -> Iterator[str]:
    lines = (line.split() for line in table.lines())
    found = [fields[4] for fields in lines if fields[4].startswith(f"{run_dir}/")]
    yield from (f"{path} is mounted more than once" for path in set(found) if found.count(path) > 1)
    keep = {path for path in found if path.startswith((f"{run_dir}/supervisor/keep", f"{run_dir}/logs"))}
    wanted = {mountpoint for record in records.values() if (mountpoint := record["facts"].get("mountpoint"))}
    yield from _differ("mount at", wanted, {path for path in found if "/helpers/" not in path} - keep)


def _directories(run_dir: Path, records: dict[int, dict[str, Any]]) -> Iterator[str]:
    facts = [record["facts"] for record in records.values()]
    wanted = {Path(path).name for one in facts for place in _PLACES if (path := one.get(place))}
    yield from _differ("directory", wanted, set(os.listdir(run_dir / "mounts")))


def _loops(run_dir: Path, records: dict[int, dict[str, Any]]) -> Iterator[str]:
    """By what sysfs says: to ask a loop device may wait for the store of another test, which that has stopped."""
    wanted = {device for record in records.values() if (device := record["facts"].get("device_file"))}
    session = current()
    ours = (f"{run_dir}/", *([f"{session.images}/"] if session else ()))
    yield from _differ("loop device", wanted, {device for device, file in backing_files() if file.startswith(ours)})


def _helpers(run_dir: Path, records: dict[int, dict[str, Any]]) -> Iterator[str]:
    """Storage daemons, their directories, and what they have mounted."""
    served = {f"attach-{key}": record["facts"]["helper"] for key, record in records.items() if _helped(record)}
    links = {path.parent.name: os.readlink(path) for path in run_dir.glob("helpers/*/daemon")}
    directories = {path.name for path in run_dir.glob("helpers/*")}
    yield from _differ("export of", set(served), set(links))
    yield from _differ("helper's directory", {*served, *map(os.path.basename, links.values())}, directories)
    mounted = (line.split()[4] for line in table.lines())
    exports = [path.split("/")[-2] for path in mounted if path.startswith(f"{run_dir}/helpers/")]
    yield from _differ("mounted export of", set(served), set(exports))
    yield from _differ("storage daemon", {pid for pid, _ in served.values()}, storage_daemons(run_dir))


def _helped(record: dict[str, Any]) -> bool:
    return record["facts"].get("helper") is not None


def storage_daemons(run_dir: Path) -> set[int]:
    """The processes that serve images to the server of a run directory."""
    helpers = (one for one in processes().values() if one.name == "qemu-storage-da")
    return {one.pid for one in helpers if f"{run_dir}/" in one.command}


def _lives(run_dir: Path, records: dict[int, dict[str, Any]]) -> Iterator[str]:
    """The supervisor's files: for each container that runs, and for the child in waiting."""
    running = {key for key, record in records.items() if record["run"].get("state") in ("running", "stopping")}
    directory = run_dir / "supervisor"
    entries = {}
    for path in directory.glob("*.json"):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            entries[int(path.stem)] = json.loads(path.read_text())
    living = {key for key, entry in entries.items() if entry["life"].get("running", True)}
    yield from _differ("life of container", running, living)
    yield from (f"end of container {key} is nobody's" for key in set(entries) - set(records))
    for key in running & living:
        wanted, life = records[key]["run"], entries[key]["life"]
        if (wanted["pid"], wanted["attempt"]) != (life["pid"], life["attempt"]) or not alive(life["pid"]):
            yield f"container {key} has {wanted}, its supervisor {life}"
    names = {entries[key]["name"] for key in living}
    for what, found in (("FIFO", _fifos(directory)), ("parked pidfd", _parked(directory))):
        yield from (f"{what} {name} is missing" for name in names - found)
        if len(found - names) > SPARE:
            yield f"{what}s {found - names} are nobody's"


def _fifos(directory: Path) -> set[str]:
    return {path.stem for path in directory.glob("*.out")}


def _parked(directory: Path) -> set[str]:
    return set(os.listdir(directory / "keep/pids")) if (directory / "keep/pids").exists() else set()


def _strays(run_dir: Path, records: dict[int, dict[str, Any]]) -> Iterator[str]:
    """Processes in a pid namespace of their own on an overlay of this run directory that are no container's."""
    known = {_namespace(pid) for record in records.values() if (pid := record["run"].get("pid"))}
    for pid in processes():
        namespace = _namespace(pid)
        if namespace not in (None, _namespace(os.getpid()), *known) and f"{run_dir}/" in _root(pid):
            yield f"process {pid} is no container's"


def children(pid: int) -> list[int]:
    """The children of a process that has one thread, those that it has not reaped among them."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _dead(server: Server) -> Iterator[str]:
    """Children of the supervisor that have ended, and that it does not reap."""
    with contextlib.suppress(StopIteration, FileNotFoundError):  # there is no supervisor
        yield from (
            f"process {pid} has ended, and is not reaped" for pid in children(server.supervisor) if not alive(pid)
        )


def _groups(run_dir: Path, records: dict[int, dict[str, Any]]) -> Iterator[str]:
    """The control groups of containers with systemd."""
    prefix = f"imageapi-{(run_dir / 'instance').read_text().strip()}-"
    wanted = {
        f"{prefix}container-{key}-{record['run']['attempt']}"
        for key, record in records.items()
        if record["spec"].get("systemd") and record["run"].get("pid")
    }
    for hierarchy in cgroup.hierarchies():
        found = {name for name in os.listdir(hierarchy.directory) if name.startswith(prefix)}
        yield from _differ(f"{hierarchy.directory}: control group", wanted, found)


def _namespace(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return None


def _root(pid: int) -> str:
    """What is mounted at the root of a process. Its other mounts tell nothing: a container of another server is in this
    host's mount namespace while it takes its root, and may hang there."""
    with contextlib.suppress(OSError):
        lines = table.lines(f"/proc/{pid}/mountinfo")
        return next((line for line in reversed(lines) if line.split()[4] == "/"), "")
    return ""
