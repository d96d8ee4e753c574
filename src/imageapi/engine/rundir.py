"""The run directory: made, locked, and given the random id that all its marks carry.

One server at a time works in it. Its workers hold a lock of their own, so that the next server begins only when the
last one's calls into the kernel have ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time

from imageapi import errors
from imageapi.config import Config, Site
from imageapi.errors import Conflict
from imageapi.linux import inotify, whole

log = logging.getLogger(__name__)

WORKERS_PATIENCE = 1.0
"""How long, in seconds, a start waits for a killed server's workers. One that hangs in the kernel is not waited for:
what it was making is found by its record."""

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
    site = config.site(_instance(config.run_dir))
    restore(site)
    for directory, mode in _directories(site).items():
        os.chmod(directory, mode)
    return site, _lock_workers(config.run_dir)


def _directories(site: Site) -> dict[str, int]:
    public = dict.fromkeys((site.mounts_dir, site.logs_dir), PUBLIC)
    return public | dict.fromkeys((site.state_dir, site.supervisor_dir, site.helpers_dir), PRIVATE)


def restore(site: Site) -> None:
    """Make the directories that are missing: all at first, and later what somebody has removed. Raises: OSError."""
    for directory, mode in _directories(site).items():
        if not os.path.isdir(directory):
            os.makedirs(directory, mode)


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
    """Who works in the directory is written over the last one's: that needs no room."""
    descriptor = os.open(f"{run_dir}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _try_lock(descriptor, fcntl.LOCK_EX):
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        raise Conflict(f"{run_dir} is in use by process {holder}; stop that server, or choose another --run-dir")
    os.write(descriptor, f"{os.getpid()}\n".encode().ljust(os.fstat(descriptor).st_size))


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
    """The id of a run directory; None of one that no server has worked in."""
    with contextlib.suppress(FileNotFoundError), open(f"{run_dir}/instance") as file:
        return file.read().strip() or None  # there was no room for it
    return None


def _instance(run_dir: str) -> str:
    """The directory's own id, drawn when it was new."""
    if known := instance(run_dir):
        return known
    drawn = os.urandom(4).hex()
    whole.write(f"{run_dir}/instance", f"{drawn}\n".encode())
    return drawn
