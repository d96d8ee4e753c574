"""The kernel way: the rbd driver maps the image. The key waits in the kernel's keyring under our mark, so the device's
options name the mark; with it and the image, that is how a device is known for ours.

The kernel waits for OSDs without end, and where only a fatal signal ends it: so it is asked aside. A mapping is killed
when it takes too long. An unmapping never is: it would leave the image locked in the cluster, by this host's client,
which lives on with its other images.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Sequence

from imageapi.config import Site
from imageapi.drivers import aside, block, holders
from imageapi.drivers.ceph import keys, monitors, options, refusals
from imageapi.drivers.deadline import Deadline
from imageapi.errors import Conflict, Invalid, Problem, TimedOut
from imageapi.linux import keyring, kmsg, krbd, process
from imageapi.records import Key
from imageapi.spec import Rbd, Secret

NO_KEY = Secret("AQAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==")
"""Stands for a key where none is given, so that such a device carries our mark too. A cluster without cephx does not
look at it, one with cephx refuses it."""

SHOWING = 5.0
"""Seconds beyond those for connecting until the image must have been shown, which the kernel itself does not limit. The
service gives a create 25 in all, and the answer must still say what was waited for."""
UNDER_WAY = 5.0
"""Seconds that a release waits for a mapping whose worker has died, before it says so."""
UNMAPPING, STILL_UNMAPPING = 10.0, 1.0
"""Seconds that an unmapping is waited for, and one that an earlier release began. It takes milliseconds, unless the
OSDs are away."""


def available(root: str = krbd.BUS) -> bool:
    """Whether the kernel has the driver, once its module has been asked for."""
    modules = f"/lib/modules/{os.uname().release}"
    if not krbd.available(root) and process.find_program("modprobe") and os.path.isdir(modules):
        import subprocess

        subprocess.run(["modprobe", "rbd"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    return krbd.available(root)


def acquire(key: Key, definition: Rbd, site: Site, root: str = krbd.BUS) -> str:
    """Map the image and return its block device.

    Raises: errors.Problem in the user's terms.
    """
    deadline = Deadline(options.connect_timeout(definition.options) + SHOWING)
    release(key, definition, site, root)
    text = command(key, definition, site)
    secret = keys.decoded(definition.options.secret or NO_KEY)
    try:
        with kmsg.Tail() as log:
            try:
                mark = site.mark(key)
                aside.call(_making(key, site), deadline.left(), lambda: _map(text, mark, secret, root), expendable=True)
            except (aside.Refused, TimeoutError) as error:
                raise refusals.explain(error, definition, refusals.said(log)) from None
        return _checked(find(key, definition, site, root), definition, root)
    except (OSError, Problem):
        release(key, definition, site, root)
        raise


def _making(key: Key, site: Site) -> aside.Place:
    """What is locked while a mapping is under way. Every key here is an attachment's."""
    return aside.Place(site.helpers_dir, 2 * key.id)


def _unmaking(key: Key, site: Site) -> aside.Place:
    """The same of an unmapping."""
    return aside.Place(site.helpers_dir, 2 * key.id + 1)


def _map(text: str, mark: str, secret: bytes, root: str) -> None:
    """In the child: a process keyring is a process's own, and goes with it. So there is nothing to undo, and nothing
    that could fail once the image is mapped."""
    keyring.add_key("ceph", mark, secret)
    krbd.map_image(text, root)


def _checked(device: krbd.Device | None, definition: Rbd, root: str) -> str:
    """The block device, once what the kernel does not look at is as it should be: that the cluster is the one meant,
    and that nobody else writes to the image.

    Raises: errors.Invalid, errors.Conflict.
    """
    if device is None:
        raise Problem("the kernel mapped the image and does not list it", step="map the image")
    fsid = definition.options.fsid
    if fsid and uuid.UUID(fsid) != uuid.UUID(device.cluster):
        raise Invalid(
            f"the monitors are those of cluster {device.cluster}, not of {fsid}: correct 'fsid' or 'monitors'",
            path="$.options.fsid",
        )
    other = None if definition.options.force else _rival(device, krbd.devices(root))
    if other is not None:
        raise Conflict(
            f"the image is mapped here already, as {other.file}, and one of the two could write to it: unmap that "
            "one, map both read-only, or set options.force",
            path="$.image",
        )
    return device.file


def _rival(device: krbd.Device, mapped: Sequence[krbd.Device]) -> krbd.Device | None:
    """Another device of the same image, whatever its monitors are called and whoever mapped it, if either can write."""
    same = (each for each in mapped if each.id != device.id and each.data == device.data)
    return next((each for each in same if not (each.read_only and device.read_only)), None)


def command(key: Key, definition: Rbd, site: Site) -> str:
    """What the kernel is told. Names are resolved here: the kernel knows addresses only.

    Raises: errors.Invalid, errors.TimedOut.
    """
    chosen = definition.options
    asked = monitors.parse(definition.monitors, options.default_port(chosen))
    found = monitors.reachable(asked, min(monitors.PROBE_TIMEOUT, options.connect_timeout(chosen)))
    addresses, more = spoken_to(found, chosen.ms_mode)
    words = [*options.kernel_words(definition), *more, f"key={site.mark(key)}"]
    image = krbd.Image("", definition.pool, chosen.namespace or "", definition.image, definition.snapshot)
    try:
        return krbd.line(addresses, words, image)
    except ValueError as error:
        raise Invalid(f"the kernel cannot be told this: {error}") from None


def spoken_to(found: Sequence[monitors.Address], mode: str | None) -> tuple[list[str], list[str]]:
    """The monitors that speak the messenger of `mode`, and the words for the kernel that follow from what they speak:
    it has the first messenger unless told, and does not look what a port speaks.

    Raises: errors.Invalid.
    """
    wanted = "v2" if mode in options.MS_MODES else "v1"
    suitable = [str(monitors.Monitor(each.ip, each.port)) for each in found if each.messenger == wanted]
    if suitable:
        return suitable, []
    if mode is None:
        return [str(monitors.Monitor(each.ip, each.port)) for each in found], ["ms_mode=prefer-crc"]
    port = monitors.MSGR2_PORT if wanted == "v2" else monitors.LEGACY_PORT
    raise Invalid(
        f"ms_mode '{mode}' is not what the monitors speak at these ports: leave the port out, or give the one for it "
        f"({port} unless changed)",
        path="$.options.ms_mode",
    )


def release(key: Key, definition: Rbd, site: Site, root: str = krbd.BUS) -> None:
    """Unmap the image. Idempotent.

    Raises: errors.Conflict while the device is open; errors.TimedOut while it is still being mapped or unmapped.
    """
    late = "the kernel has not come back from mapping the image; it is unmapped when it does"
    aside.settled(_making(key, site), UNDER_WAY, late)
    aside.settled(_unmaking(key, site), STILL_UNMAPPING, waits_for_osds(definition))
    device = find(key, definition, site, root)
    if device is not None and not holders.until(lambda: _unmapped(key, definition, device.id, site, root)):
        raise block.busy(device.file)


def waits_for_osds(definition: Rbd) -> str:
    """What keeps an unmapping: the image's lock and watch are the OSDs' to take back."""
    return (
        f"the OSDs of pool '{definition.pool}' do not answer, which have to be told that image '{definition.image}' is "
        "let go: see 'ceph osd stat' and 'ceph health detail'; it is unmapped when they are back"
    )


def _unmapped(key: Key, definition: Rbd, number: int, site: Site, root: str) -> bool:
    try:
        unmap(key, number, site, root)
    except TimeoutError:
        raise TimedOut(waits_for_osds(definition), path="$.monitors") from None
    except aside.Refused as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno != errno.ENOENT:
            raise
    return True


def unmap(key: Key, number: int, site: Site, root: str = krbd.BUS) -> None:
    """Unmap the device `number`, which carries the mark of `key`.

    Raises: OSError; TimeoutError, with the kernel still at it.
    """
    aside.call(_unmaking(key, site), UNMAPPING, lambda: krbd.unmap(number, root=root), expendable=False)


def observe(key: Key, definition: Rbd, site: Site, root: str = krbd.BUS) -> str | None:
    """The block device, if it is mapped."""
    device = find(key, definition, site, root)
    return None if device is None else device.file


def find(key: Key, definition: Rbd, site: Site, root: str = krbd.BUS) -> krbd.Device | None:
    """The device that carries the mark of `key` and is the image asked for."""
    if not krbd.available(root):
        return None
    image = (definition.pool, definition.options.namespace or "", definition.image, definition.snapshot or None)
    found = (each for each in krbd.devices(root) if each.options.get("key") == site.mark(key))
    return next((each for each in found if each.image[1:] == image), None)
