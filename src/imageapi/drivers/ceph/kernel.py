"""The kernel way: the rbd driver maps the image. The key waits in the kernel's keyring under our mark, so the device's
options name the mark, and that is how a device is known for ours."""

from __future__ import annotations

import errno
import os
import subprocess

from imageapi.config import Site
from imageapi.drivers import block
from imageapi.drivers.ceph import keys, monitors, options
from imageapi.errors import Invalid, Problem, TimedOut, Unsupported
from imageapi.linux import keyring, krbd, process
from imageapi.records import Key
from imageapi.spec import Rbd, Secret

NO_KEY = Secret("AQAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==")
"""Stands for a key where none is given, so that such a device carries our mark too. A cluster without cephx does not
look at it, one with cephx refuses it."""


def available(root: str = krbd.BUS) -> bool:
    """Whether the kernel has the driver, once its module has been asked for."""
    modules = f"/lib/modules/{os.uname().release}"
    if not krbd.available(root) and process.find_program("modprobe") and os.path.isdir(modules):
        subprocess.run(["modprobe", "rbd"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    return krbd.available(root)


def acquire(key: Key, definition: Rbd, site: Site, root: str = krbd.BUS) -> str:
    """Map the image and return its block device.

    Raises: errors.Problem in the user's terms.
    """
    release(key, site, root)
    text = command(key, definition, site)
    with keyring.key("ceph", site.mark(key), keys.decoded(definition.options.secret or NO_KEY)):
        try:
            krbd.map_image(text, root)
        except OSError as error:
            raise explain(error, definition) from None
    device = find(key, site, root)
    if device is None:
        raise Problem("the kernel mapped the image and does not list it", step="map the image")
    return device.file


def command(key: Key, definition: Rbd, site: Site) -> str:
    """What the kernel is told. Names are resolved here: the kernel knows addresses only.

    Raises: errors.Invalid, errors.TimedOut.
    """
    chosen = definition.options
    asked = monitors.parse(definition.monitors, options.default_port(chosen))
    monitors.reachable(asked, min(monitors.PROBE_TIMEOUT, options.connect_timeout(chosen)))
    addresses = [str(monitors.Monitor(*address)) for address in monitors.resolve(asked)]
    words = [*options.kernel_words(definition), f"key={site.mark(key)}"]
    image = krbd.Image("", definition.pool, chosen.namespace or "", definition.image, definition.snapshot)
    try:
        return krbd.line(addresses, words, image)
    except ValueError as error:
        raise Invalid(f"the kernel cannot be told this: {error}") from None


def release(key: Key, site: Site, root: str = krbd.BUS) -> None:
    """Unmap the image. Idempotent.

    Raises: errors.Conflict while the device is open.
    """
    device = find(key, site, root) if krbd.available(root) else None
    if device is None:
        return
    try:
        krbd.unmap(device.id, root=root)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise block.busy(device.file) from None
        if error.errno != errno.ENOENT:
            raise


def observe(key: Key, site: Site, root: str = krbd.BUS) -> str | None:
    """The block device, if it is mapped."""
    device = find(key, site, root) if krbd.available(root) else None
    return None if device is None else device.file


def find(key: Key, site: Site, root: str = krbd.BUS) -> krbd.Device | None:
    """The device that carries the mark of `key`."""
    mark = site.mark(key)
    return next((device for device in krbd.devices(root) if device.options.get("key") == mark), None)


def explain(error: OSError, definition: Rbd) -> Problem:
    """What the driver's errno means to whoever asked for the image (net/ceph, drivers/block/rbd.c)."""
    user, pool, image = options.user(definition.options), definition.pool, definition.image
    name = errno.errorcode.get(error.errno or 0, "")
    match error.errno:
        case errno.EACCES:
            return Invalid(
                f"the monitors refuse client.{user}: there is no such user, or the secret is not its key; "
                f"compare it with 'ceph auth get client.{user}'",
                path="$.options.secret",
                errno=name,
            )
        case errno.EPERM | errno.EROFS:
            return Invalid(
                f"client.{user} may not do this with image '{image}' of pool '{pool}': grant it 'profile rbd' "
                f"(or attach with 'ro' if it has 'profile rbd-read-only pool={pool}')",
                path="$.options.name",
                errno=name,
            )
        case errno.ENOENT:
            snapshot = f" or the image no snapshot '{definition.snapshot}'" if definition.snapshot else ""
            return Invalid(
                f"the cluster has no pool '{pool}', or the pool no image '{image}'{snapshot}: see 'rbd ls {pool}'",
                path="$.image",
                errno=name,
            )
        case errno.ETIMEDOUT:
            return TimedOut(
                f"the cluster does not answer in time (monitors {', '.join(definition.monitors)}): see that they "
                f"have a quorum and the OSDs of pool '{pool}' are up",
                errno=name,
            )
        case errno.EINVAL | errno.ENXIO | errno.EOPNOTSUPP:
            return Unsupported(
                f"this kernel's rbd driver takes an option or a feature of image '{image}' not: see the kernel's log, "
                f"and 'rbd info {pool}/{image}'",
                errno=name,
            )
        case _:
            return Problem(f"the kernel could not map image '{image}'", step="map the image", errno=name)
