"""What stands in the kernel or under the run directory with our mark, and has no record: found at start, and removed.

A record is written before anything is made, so this finds something only when a record was lost or removed by hand.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Collection
from functools import partial

from imageapi.config import Site
from imageapi.drivers import block, exported, progress, storage_daemon
from imageapi.errors import Problem
from imageapi.linux import iscsi, mountinfo
from imageapi.linux.tree import remove_tree
from imageapi.records import Key

log = logging.getLogger(__name__)

_OURS = re.compile(r"(mount|upper|work)_(\d{9})")


def sweep(site: Site, keys: Collection[Key], tokens: Collection[int]) -> list[str]:
    """Remove what belongs to none of the records with these keys and tokens; what was removed, for the log.

    What cannot be removed is left, and logged by its error: the next start tries again.
    """
    return [
        *_sweep_mounts(site, tokens),
        *_sweep_loops(site, keys),
        *_sweep_exports(site, keys),
        *_sweep_sessions(site, keys),
    ]


def _sweep_mounts(site: Site, tokens: Collection[int]) -> list[str]:
    removed = []
    for name in sorted(os.listdir(site.mounts_dir)):
        match = _OURS.fullmatch(name)
        if match and int(match[2]) not in tokens:
            removed += _attempt(_clear_directory, f"{site.mounts_dir}/{name}")
    return removed


def _clear_directory(path: str) -> None:
    while mountinfo.at(path):
        from imageapi.drivers.nfs import client

        client.unmount(path)  # what the mount is of may be silent: so it is not waited for
    if os.path.basename(path).startswith("mount_"):
        os.rmdir(path)
    else:
        remove_tree(path)


def _sweep_loops(site: Site, keys: Collection[Key]) -> list[str]:
    marks = {site.mark(key) for key in keys}
    removed = []
    for mark, device in block.marked(site.mark_prefix).items():
        if mark not in marks:
            removed += _attempt(block.detach_loop, device)
    return removed


def _sweep_exports(site: Site, keys: Collection[Key]) -> list[str]:
    removed = []
    for key in storage_daemon.exports(site):
        if key not in keys:
            removed += _attempt(partial(_abandon, key, site), f"the export of {key}")
    return removed


def _sweep_sessions(site: Site, keys: Collection[Key]) -> list[str]:
    if not iscsi.available():
        return []
    from imageapi.drivers.iscsi import kernel  # not for those who have no use for it: everything is forked from here

    removed = []
    for key in kernel.strays(site):
        if key not in keys:
            removed += _attempt(lambda _, key=key: kernel.abandon(key, site), f"the iSCSI sessions of {key}")  # type: ignore[misc]
    return removed


def _abandon(key: Key, site: Site, _: str) -> None:
    exported.abandon(key, site)


def _attempt(remove: Callable[[str], None], what: str) -> list[str]:
    """`what`, if it could be removed, as a list of one or none.

    Raises: LeftOff, when the server has ceased to wait: by now it may have something of its own there.
    """
    progress.tell(f"removing {what}")
    with contextlib.suppress(FileNotFoundError):
        try:
            remove(what)
        except (OSError, Problem) as error:
            log.warning("%s has no record, and cannot be removed: %s", what, error)
            return []
    return [what]
