"""Memory as a file system (tmpfs(5)), as the upper of an overlay or to bind into; what is in it goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from imageapi.config import Site
from imageapi.drivers import mounts
from imageapi.drivers.mounts import MountDriver
from imageapi.linux import mount
from imageapi.linux.mountinfo import Mount
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Tmpfs

_STAGING = mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOSUID


class Driver(MountDriver):
    """The kind `tmpfs`."""

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        definition: Tmpfs = record.definition
        with ExitStack() as undo:
            path = mounts.make_directory(undo, site.mountpoint(record.token))
            options = f"size={definition.size.lower()},mode=0755"
            mount.mount(site.mark(record.key), path, "tmpfs", mount.MS_NODEV | mount.MS_NOSUID, options)
            undo.callback(mount.umount, path)
            detail = {**mounts.made(record, site), "staging": _STAGING}
            undo.pop_all()
        return Facts(mountpoint=path, detail=detail)

    def release(self, record: AnyRecord, site: Site) -> None:
        mounts.release(record, site)
        mounts.check_gone(f"the tmpfs {record.key}", site.mark(record.key), record.facts.detail.get("dev"))

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        return mounts.observe(record, site, lambda found: _facts(record, site, found))


def _facts(record: AnyRecord, site: Site, found: Mount) -> Facts:
    return Facts(mountpoint=site.mountpoint(record.token), detail={"dev": found.dev})
