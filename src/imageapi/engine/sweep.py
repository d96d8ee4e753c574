"""What stands in the kernel or under the run directory with our mark, and has no record: found at start, and removed.

A record is written before anything is made, so this finds something only when a record was lost or removed by hand.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Collection

from imageapi.config import Site
from imageapi.linux import loop, mount, mountinfo
from imageapi.linux.tree import remove_tree

log = logging.getLogger(__name__)

_OURS = re.compile(r"(mount|upper|work)_(\d{9})")


def sweep(site: Site, marks: Collection[str], tokens: Collection[int]) -> list[str]:
    """Remove what belongs to none of the records with these marks and tokens; what was removed, for the log.

    What cannot be removed is left, and logged by its error: the next start tries again.
    """
    return [*_sweep_mounts(site, tokens), *_sweep_loops(site, marks)]


def _sweep_mounts(site: Site, tokens: Collection[int]) -> list[str]:
    removed = []
    for name in sorted(os.listdir(site.mounts_dir)):
        match = _OURS.fullmatch(name)
        if match and int(match[2]) not in tokens:
            removed += _attempt(_clear_directory, f"{site.mounts_dir}/{name}")
    return removed


def _clear_directory(path: str) -> None:
    while mountinfo.at(path):
        mount.umount(path)
    if os.path.basename(path).startswith("mount_"):
        os.rmdir(path)
    else:
        remove_tree(path)


def _sweep_loops(site: Site, marks: Collection[str]) -> list[str]:
    removed = []
    for mark, device in loop.marked(site.mark_prefix).items():
        if mark not in marks:
            removed += _attempt(loop.detach, device)
    return removed


def _attempt(remove: Callable[[str], None], path: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        try:
            remove(path)
        except OSError as error:
            log.warning("%s has no record, and cannot be removed: %s", path, error)
            return []
    return [path]
