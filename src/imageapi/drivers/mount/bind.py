"""A directory of the host, or of another mount, seen again: a tree is copied, finished while nobody sees it, and put
in its place in one step."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack

from imageapi.config import Site
from imageapi.drivers import mounts, paths
from imageapi.drivers.base import LOCAL_STORE
from imageapi.drivers.mounts import MountDriver
from imageapi.drivers.paths import open_path
from imageapi.errors import Invalid
from imageapi.linux import libc, mount, mountid, mountinfo
from imageapi.linux.mountinfo import Mount
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Bind


class Driver(MountDriver):
    """The kind `bind`. `ro` is so for everything below too."""

    def store(self, definition: Bind) -> str:
        return paths.store(definition.path) if definition.base == "root" else LOCAL_STORE

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        definition: Bind = record.definition
        with ExitStack() as undo, ExitStack() as opened:
            source = open_path(definition, inputs)
            opened.callback(os.close, source)
            _check_source(definition, source, site)
            tree = _copy(definition, source)
            opened.callback(os.close, tree)
            path = mounts.make_directory(undo, site.mountpoint(record.token))
            mount.move_mount(tree, "", libc.AT_FDCWD, path, mount.MOVE_MOUNT_F_EMPTY_PATH)
            undo.callback(self.release, record, site)
            staging = inputs[0].facts.detail.get("staging", 0) if inputs else 0
            made = mounts.made(record, site)
            detail = {**made, "depth": _depth(path, made.get("mount"), inputs), "staging": staging}
            undo.pop_all()
        return Facts(mountpoint=path, detail=detail)

    def release(self, record: AnyRecord, site: Site) -> None:
        mounts.release(record, site, with_inner=record.definition.recursive)

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        return mounts.observe(record, site, lambda found: _facts(record, site, found))


def _facts(record: AnyRecord, site: Site, found: Mount) -> Facts:
    detail = {"dev": found.dev, "depth": record.facts.detail.get("depth", 0)}
    return Facts(mountpoint=site.mountpoint(record.token), detail=detail)


def _depth(path: str, number: int | None, inputs: Sequence[AnyRecord]) -> int:
    """How many overlays lie on one another in what is bound; one, where it is an overlay that is not ours."""
    if not _is_overlay(path, number):
        return 0
    return max([1, *(int(each.facts.detail.get("depth", 0)) for each in inputs)])


def _is_overlay(path: str, number: int | None) -> bool:
    """Whether the mount at a path is one; where it has no `number`, the kernel's list of all mounts is read."""
    known = None if number is None else mountid.look(number)
    if known is not None:
        return known.magic == mountid.OVERLAYFS_SUPER_MAGIC
    found = mountinfo.at(path)
    return found is not None and found.fstype == "overlay"


def _check_source(definition: Bind, source: int, site: Site) -> None:
    path = definition.path
    if not stat.S_ISDIR(os.fstat(source).st_mode):
        raise Invalid(f"'{path}' is no directory, and only one can be bound; give the one it is in", path="$.path")
    here = os.readlink(f"/proc/self/fd/{source}").rstrip("/")
    if definition.recursive and f"{os.path.realpath(site.run_dir)}/".startswith(f"{here}/"):
        raise Invalid(
            f"'{path}' holds this server's own mounts, which a recursive bind would keep from ever being released; "
            "leave 'recursive' out, or bind a directory beside them",
            path="$.recursive",
        )


def _copy(definition: Bind, source: int) -> int:
    """A detached copy of the tree, which does not take part in what is mounted at its source later."""
    recursive = libc.AT_RECURSIVE if definition.recursive else 0
    flags = mount.OPEN_TREE_CLONE | mount.OPEN_TREE_CLOEXEC | libc.AT_EMPTY_PATH | recursive
    try:
        tree = mount.open_tree(source, "", flags)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Invalid(f"'{definition.path}' is on a mount that is unbindable", path="$.path", errno="EINVAL") from None
    try:
        read_only = mount.MOUNT_ATTR_RDONLY if definition.ro else 0
        mount.mount_setattr(tree, "", set=read_only, propagation=mount.MS_PRIVATE, recursive=True)
    except OSError:
        os.close(tree)
        raise
    return tree
