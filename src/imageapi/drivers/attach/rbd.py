"""A Ceph RBD image as a block device, by the kernel's rbd driver or by qemu-storage-daemon and a loop device.

`--rbd-backend` decides, and `auto` takes the kernel's driver where there is one. What was attached is found again by
its mark whichever way was taken, so a release needs no more than the record, and a changed option harms nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from imageapi.config import Site
from imageapi.drivers import exported, storage_daemon
from imageapi.drivers.ceph import daemon, kernel, monitors, options
from imageapi.drivers.exported import ExportedDriver
from imageapi.errors import Unsupported
from imageapi.records import AnyRecord, Facts, Key
from imageapi.spec import Rbd


class Driver(ExportedDriver):
    """The kind `rbd`."""

    kernel = kernel
    daemon = daemon

    def attach(self, record: AnyRecord, site: Site) -> str:
        definition: Rbd = record.definition
        options.check(definition)
        return choose(site)(record.key, definition, site)

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        device = kernel.observe(record.key, record.definition, site) or exported.observe(record.key, site)
        return exported.observed(site, record.key, device)

    def read_only(self, definition: Rbd) -> bool:
        return options.read_only(definition)

    def identities(self, definition: Rbd) -> frozenset[object]:
        """The image, or its snapshot, at each of the monitors, which all are one cluster's: a snapshot cannot be
        written, so it is none of the image's users."""
        image = definition.pool, definition.options.namespace or "", definition.image, definition.snapshot or ""
        parsed = monitors.parse(definition.monitors, options.default_port(definition.options))
        return frozenset((monitor.host.lower(), *image) for monitor in parsed)

    def forced(self, definition: Rbd) -> bool:
        return definition.options.force

    def store(self, definition: Rbd) -> str:
        return monitors.store(definition.monitors)


def choose(site: Site) -> Callable[[Key, Rbd, Site], str]:
    """The way images are attached here.

    Raises: errors.Unsupported naming what to install or load.
    """
    if site.rbd_backend != "daemon" and kernel.available():
        return kernel.acquire
    if site.rbd_backend == "kernel":
        raise Unsupported("this kernel has no rbd driver: load the module rbd, or do without --rbd-backend kernel")
    missing = storage_daemon.missing()
    if missing:
        first = "" if site.rbd_backend == "daemon" else "this kernel has no rbd driver to load, and "
        raise Unsupported(f"{first}the storage daemon cannot be used: {missing}")
    return daemon.acquire
