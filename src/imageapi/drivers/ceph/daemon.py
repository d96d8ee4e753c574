"""The daemon way: qemu-storage-daemon opens the image, and a loop device stands on the file it shows."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from imageapi.config import Site
from imageapi.drivers import exported, locks, storage_daemon
from imageapi.drivers.ceph import keys, monitors, options
from imageapi.drivers.deadline import Deadline
from imageapi.drivers.qmp import QmpError
from imageapi.drivers.storage_daemon import Source
from imageapi.errors import Conflict, Invalid, Problem, TimedOut, Unsupported
from imageapi.records import Key
from imageapi.spec import Rbd

DEADLINE = exported.DEADLINE

CONF = "ceph.conf"
"""The file beside the export: librados' configuration."""

OPENED = "image"
"""The file beside the export that notes which image it is."""

REFUSED = "see what the user may write, and the pool's quota"
"""Where to look when the cluster refuses writes."""


def acquire(key: Key, definition: Rbd, site: Site) -> str:
    """Attach the image and return its block device. Leaves nothing when it fails.

    Raises: errors.Problem in the user's terms; OSError from the loop device.
    """
    deadline = Deadline(DEADLINE)
    release(key, definition, site)
    wanted = source(key, definition, site)
    with _explained(definition):
        device = exported.attach(site, key, wanted, deadline, partitions=definition.readPartitions)
    with contextlib.ExitStack() as undo:
        undo.callback(release, key, definition, site)
        if not definition.options.force:
            _check_alone(key, site, deadline)
        undo.pop_all()
    return device


def _check_alone(key: Key, site: Site, deadline: Deadline) -> None:
    """See that this is the image's only attachment here, or that none of them can write, whatever the monitors are
    called. Each has noted its own before it looks for others: so of two that come at once the one that looks later sees
    the other. They look one at a time, and one that gives way takes its note away before the next one looks: so only
    one of the two does. The note of one that was killed is there until it is released.

    Raises: errors.Conflict; TimeoutError.
    """
    with _alone(site, deadline):
        other = _rival(key, site)
        if other is not None:
            os.unlink(storage_daemon.private_path(site, key, OPENED))
    if other is not None:
        raise Conflict(
            f"the image is attached already, as {other}, by an address of the same monitors, and one of the two could "
            "write to it: make both read-only, or set options.force",
            path="$.image",
        )


@contextlib.contextmanager
def _alone(site: Site, deadline: Deadline) -> Iterator[None]:
    """What is done within nobody else does meanwhile. Raises: TimeoutError."""
    directory = locks.locked_directory(site.helpers_dir, deadline)
    try:
        yield
    finally:
        if directory is not None:
            os.close(directory)


class Opened(msgspec.Struct):
    """What is noted of an image that is open: its names in the cluster, and the addresses of the monitors."""

    image: list[str]
    addresses: list[str]
    read_only: bool


def _rival(key: Key, site: Site) -> Key | None:
    """Another attachment of the same image, if either can write."""
    own = _opened(key, site)
    others = ((other, _opened(other, site)) for other in storage_daemon.exports(site) if other != key)
    return next((other for other, found in others if own and found and _clash(own, found)), None)


def _clash(one: Opened, other: Opened) -> bool:
    same = one.image == other.image and not set(one.addresses).isdisjoint(other.addresses)
    return same and not (one.read_only and other.read_only)


def _opened(key: Key, site: Site) -> Opened | None:
    with (
        contextlib.suppress(OSError, msgspec.MsgspecError),
        open(storage_daemon.private_path(site, key, OPENED), "rb") as note,
    ):
        return msgspec.json.decode(note.read(), type=Opened)
    return None


def release(key: Key, definition: Rbd, site: Site) -> None:
    """Flush, and take away the loop device, the file and, with its last image, the daemon. Idempotent.

    Raises: errors.Conflict while the device is in use; errors.TimedOut; errors.Problem when writes were lost.
    """
    with _explained(definition):
        read_only = options.read_only(definition)
        exported.detach(site, key, Deadline(DEADLINE), read_only=read_only, hint=REFUSED)


def mend(key: Key, definition: Rbd, site: Site) -> tuple[str, str | None]:
    """Have the image's device work again; the device, and what is wrong all the same.

    Raises: errors.Conflict when it never can be; errors.Problem in the user's terms.
    """
    read_only = options.read_only(definition)
    with _explained(definition):
        deadline = Deadline(exported.MEND_DEADLINE)
        return exported.mend(site, key, lambda: source(key, definition, site), deadline, read_only=read_only)


# ------------------------------------------------------------------------------------------ what is opened


def source(key: Key, definition: Rbd, site: Site) -> Source:
    """What the daemon is to open.

    Raises: errors.Unsupported for an option this way cannot honour, errors.Invalid, errors.TimedOut.
    """
    chosen = definition.options
    lines = options.daemon_lines(chosen)
    if chosen.secret is not None:
        keys.decoded(chosen.secret)
    asked = monitors.parse(definition.monitors, options.default_port(chosen))
    addresses = monitors.resolve(asked)
    seconds = min(monitors.PROBE_TIMEOUT, options.connect_timeout(chosen))
    answering = monitors.reachable(asked, seconds, addresses)
    lines.append("mon host = " + ",".join(map(str, answering)))
    conf = "\n".join(["[global]", *lines, ""])
    blockdev = _blockdev(definition, storage_daemon.private_path(site, key, CONF))
    files = {CONF: conf, OPENED: _note(definition, addresses)}
    return Source(_group(definition), blockdev, chosen.secret, files, options.read_only(definition))


def _note(definition: Rbd, addresses: Sequence[tuple[str, int]]) -> str:
    image = [definition.pool, definition.options.namespace or "", definition.image, definition.snapshot or ""]
    ips = sorted({ip for ip, _ in addresses})
    return msgspec.json.encode(Opened(image, ips, options.read_only(definition))).decode()


def _blockdev(definition: Rbd, conf: str) -> dict[str, Any]:
    chosen = definition.options
    fields: dict[str, Any] = {
        "driver": "rbd",
        "pool": definition.pool,
        "namespace": chosen.namespace or "",
        "image": definition.image,
        "snapshot": definition.snapshot or "",
        "user": options.user(chosen),
        "conf": conf,
    }
    fields = {name: value for name, value in fields.items() if value}
    if chosen.secret is None:
        fields["auth-client-required"] = ["none"]
    return {**fields, "discard": "ignore" if chosen.notrim else "unmap"}


def _group(definition: Rbd) -> str:
    """One cluster seen by one user with one key. The hash of a key says nothing of it: a key is 128 random bits."""
    chosen = definition.options
    secret = chosen.secret.reveal() if chosen.secret else ""
    parts = (*sorted(definition.monitors), options.user(chosen), secret)
    from hashlib import sha256  # it loads libcrypto, which nothing else that is forked from the zygote needs

    return sha256("\0".join(parts).encode()).hexdigest()[:12]


# ----------------------------------------------------------------------------------- QEMU's words, and ours


@contextlib.contextmanager
def _explained(definition: Rbd) -> Iterator[None]:
    """What the storage daemon raises becomes a problem in the user's terms."""
    try:
        yield
    except QmpError as error:
        raise explain(str(error), definition) from None
    except TimeoutError:
        raise _silent(definition) from None
    except ConnectionError as error:
        raise exported.ended(str(error)) from None


def explain(words: str, definition: Rbd) -> Problem:
    """What QEMU's message means to whoever asked for the image."""
    for pattern, problem in MEANINGS.items():
        if re.search(pattern, words):
            return problem(definition, words)
    return Problem("the storage daemon could not do it", step="attach or detach the image", detail=words)


def _no_image(definition: Rbd, _: str) -> Problem:
    space = f"{definition.pool}/{definition.options.namespace}" if definition.options.namespace else definition.pool
    if definition.snapshot:
        sentence = f"'{space}' has no image '{definition.image}' with a snapshot '{definition.snapshot}'"
        return Invalid(f"{sentence}: see 'rbd snap ls {space}/{definition.image}'", path="$.snapshot")
    return Invalid(f"'{space}' has no image '{definition.image}': see 'rbd ls {space}'", path="$.image")


def _no_pool(definition: Rbd, _: str) -> Problem:
    return Invalid(f"the cluster has no pool '{definition.pool}': see 'ceph osd pool ls'", path="$.pool")


def _no_namespace(definition: Rbd, _: str) -> Problem:
    name, pool = definition.options.namespace, definition.pool
    return Invalid(
        f"pool '{pool}' has no namespace '{name}': see 'rbd namespace ls {pool}'", path="$.options.namespace"
    )


def _refused(definition: Rbd, _: str) -> Problem:
    user = options.user(definition.options)
    return Invalid(
        f"the monitors refuse client.{user}: there is no such user, or the secret is not its key; "
        f"compare it with 'ceph auth get client.{user}'",
        path="$.options.secret",
    )


def _no_key(definition: Rbd, _: str) -> Problem:
    return Invalid("the cluster wants a key: give options.name and options.secret", path="$.options.secret")


def _no_caps(definition: Rbd, words: str) -> Problem:
    user = options.user(definition.options)
    verb = "read" if options.read_only(definition) else "write"
    return Invalid(
        f"client.{user} may not {verb} image '{definition.image}' of pool '{definition.pool}': grant it with "
        f"ceph auth caps client.{user} mon 'profile rbd' osd '{osd_caps(definition)}'",
        path="$.options.name",
        detail=words,
    )


def osd_caps(definition: Rbd) -> str:
    """The OSD capabilities that attaching takes. librbd watches an image's header even when it only reads, which the
    read-only profile does not allow by itself."""
    namespace = definition.options.namespace
    where = f"pool={definition.pool}" + (f" namespace={namespace}" if namespace else "")
    if options.read_only(definition):
        return f"profile rbd-read-only {where}, allow rw {where} object_prefix rbd_header."
    return f"profile rbd {where}"


def _no_module(definition: Rbd, words: str) -> Problem:
    return Unsupported(f"this host's storage daemon cannot do it: install {storage_daemon.PACKAGES}", detail=words)


def _unreached(definition: Rbd, _: str) -> Problem:
    return _silent(definition)


MEANINGS = {
    r"error connecting: Permission denied": _refused,
    r"error connecting: Operation not supported": _no_key,
    r"error connecting: Connection timed out": _unreached,
    r"error opening pool .*: No such file": _no_pool,
    r"namespace .* does not exist": _no_namespace,
    r"error reading header .*: No such file": _no_image,
    r"Operation not permitted|Permission denied": _no_caps,
    r"Unknown driver|does not accept value|Invalid parameter": _no_module,
}
"""QEMU's words for what went wrong (QEMU's block/rbd.c, with strerror(3) behind the colon). The first that fits."""


def _silent(definition: Rbd) -> TimedOut:
    return TimedOut(
        f"the cluster does not answer in time (monitors {', '.join(definition.monitors)}): its monitors were reached, "
        f"so see that they have a quorum and the OSDs of pool '{definition.pool}' are up",
    )
