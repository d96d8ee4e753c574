"""The run directory: made, locked, and given the random id that all its marks carry.

One server at a time works in it. Its workers hold a lock of their own, so that the next server begins only when the
last one's calls into the kernel have ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time

from imageapi import errors
from imageapi.config import Config, Site
from imageapi.errors import Conflict
from imageapi.linux import inotify, mountinfo, whole

log = logging.getLogger(__name__)

WORKERS_PATIENCE = 1.0
"""How long, in seconds, a start waits for a killed server's workers. One that hangs in the kernel is not waited for:
what it was making is found by its record."""

_MARK = re.compile("imageapi:([0-9a-f]{8}):")
"""How all marks begin; see config.Site."""
PUBLIC, PRIVATE = 0o755, 0o700


def prepare(config: Config) -> tuple[Site, int]:
    """The site, and the locked descriptor that the zygote is to keep. The server's own lock is held until it ends.

    Raises: Problem; Conflict, when another server works in the directory.
    """
    try:
        return _prepare(config)
    except OSError as error:
        raise errors.from_oserror(error, f"preparing {config.run_dir}") from error


def _prepare(config: Config) -> tuple[Site, int]:
    os.makedirs(config.run_dir, PUBLIC, exist_ok=True)
    _lock_server(config.run_dir)
    site = config.site(instance(config.run_dir) or os.urandom(4).hex())
    restore(site)
    for directory, mode in _directories(site).items():
        os.chmod(directory, mode)
    return site, _lock_workers(config.run_dir)


def _directories(site: Site) -> dict[str, int]:
    public = dict.fromkeys((site.mounts_dir, site.logs_dir), PUBLIC)
    return public | dict.fromkeys((site.state_dir, site.supervisor_dir, site.helpers_dir), PRIVATE)


def restore(site: Site) -> bool:
    """Make what is missing, all at first, and later what somebody has removed: the directories, and the id, without
    which the next server would not know what is ours. Whether anything was. Raises: OSError."""
    missing = [each for each in _directories(site).items() if not os.path.isdir(each[0])]
    for directory, mode in missing:
        os.makedirs(os.path.dirname(directory), PUBLIC, exist_ok=True)
        os.mkdir(directory, mode)
        os.chmod(directory, mode)  # whatever umask we were started with
    if _noted(site.run_dir) == site.instance:
        return bool(missing)
    whole.write(f"{site.run_dir}/instance", f"{site.instance}\n".encode())
    return True


def watching() -> int:
    """An inotify instance, to which the workers add what is to be watched. Without one, changes of files are seen only
    when something else has changed as well."""
    try:
        return inotify.create()
    except OSError as error:
        log.warning("changes of files are not seen at once: %s; raise fs.inotify.max_user_instances", error)
        return -1


def boot_id() -> str:
    """What tells this boot from all others (random(4))."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _lock_server(run_dir: str) -> None:
    """Have the directory locked until this process ends: not a file in it, which somebody may remove."""
    directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if not _try_lock(directory, fcntl.LOCK_EX):
        os.close(directory)
        raise Conflict(f"{run_dir} is in use by {_holder(run_dir)}; stop that server, or choose another --run-dir")
    sign(run_dir)


def sign(run_dir: str) -> None:
    """Say whose the directory is, over what the last one has said: that needs no room. Raises: OSError."""
    whole.write(f"{run_dir}/lock", f"{os.getpid()}\n".encode())


def _holder(run_dir: str) -> str:
    with contextlib.suppress(OSError), open(f"{run_dir}/lock") as file:
        return f"process {file.read().strip()}"
    return "another process"


def _lock_workers(run_dir: str) -> int:
    """A descriptor under the workers' lock, taken alone when the last server's workers are gone, and then shared."""
    descriptor = os.open(f"{run_dir}/workers.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + WORKERS_PATIENCE
    while not _try_lock(descriptor, fcntl.LOCK_EX) and time.monotonic() < deadline:
        time.sleep(0.01)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def instance(run_dir: str) -> str | None:
    """The id of a run directory, as it is written there, or in the mark of the supervisor's mount; None of one that no
    server has worked in."""
    return _noted(run_dir) or _marked(run_dir)


def _noted(run_dir: str) -> str | None:
    with contextlib.suppress(FileNotFoundError), open(f"{run_dir}/instance") as file:
        return file.read().strip() or None  # there was no room for it
    return None


def _marked(run_dir: str) -> str | None:
    found = mountinfo.at(f"{Site(run_dir=run_dir).supervisor_dir}/keep")
    mark = _MARK.match(found.source) if found else None
    return mark[1] if mark else None
