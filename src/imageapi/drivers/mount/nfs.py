"""An export of an NFS server, by the kernel's client and mount(2): mount.nfs is not needed. The source of such a mount
is `host:/path`, so it bears no mark: its place under the run directory says whose it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from imageapi.config import Site
from imageapi.drivers import mounts
from imageapi.drivers.mounts import MountDriver
from imageapi.drivers.nfs import client, options, server
from imageapi.drivers.nfs.options import Chosen
from imageapi.errors import Invalid, Unsupported
from imageapi.linux import mount
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Nfs


class Driver(MountDriver):
    """The kind `nfs`. Device nodes in the export mean nothing (nodev)."""

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        definition: Nfs = record.definition
        chosen = options.choose(definition)
        _check_path(definition)
        client.check_kernel(definition.version)
        _check_locks(definition, chosen)
        words = client.words(definition, chosen, server.reach(definition, chosen))
        path = site.mountpoint(record.token)
        os.mkdir(path, 0o755)
        with ExitStack() as undo:
            undo.callback(client.release, record, site)
            client.mount_export(definition, chosen.flags | mount.MS_NODEV | mount.MS_NOSUID, words, path)
            staging = 0 if chosen.flags & mount.MS_NOSUID else mount.MOUNT_ATTR_NOSUID
            detail = {**mounts.made(record, site), "staging": staging}
            undo.pop_all()
        return Facts(mountpoint=path, detail=detail)

    def release(self, record: AnyRecord, site: Site) -> None:
        client.release(record, site)

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        path = site.mountpoint(record.token)
        return mounts.observe(record, site, lambda found: Facts(mountpoint=path, detail={"dev": found.dev}))

    def read_only(self, definition: Nfs) -> bool:
        return options.read_only(definition)

    def store(self, definition: Nfs) -> str:
        return f"nfs:{definition.host}"


def _check_path(definition: Nfs) -> None:
    if not definition.path.startswith("/"):
        raise Invalid(f"'{definition.path}' is relative, to nothing; give the export's absolute path", path="$.path")


def _check_locks(definition: Nfs, chosen: Chosen) -> None:
    """Version 3 keeps locks by a service of its own. Whoever can only read needs none, and is given none.

    Raises: errors.Unsupported where the first lock would fail.
    """
    read_only = bool(chosen.flags & mount.MS_RDONLY) and "lock" not in chosen.own
    if definition.version != "3" or read_only or options.keeps_locks_here(chosen) or server.has_lock_monitor():
        return
    raise Unsupported(
        "locks of version 3 need rpc.statd on this host, which does not run: start it ('systemctl start rpc-statd'), "
        "give option 'nolock' (locks then hold on this host alone), or take version 4",
        path="$.version",
    )
