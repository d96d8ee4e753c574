"""What the kernel's rbd driver means when it refuses: its errno, and what it writes to the kernel's log.

The sentences of the log are those of drivers/block/rbd.c and net/ceph. Others may map images at the same time, so only
sentences that name this image say anything of it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import NamedTuple

from imageapi.drivers.ceph import options
from imageapi.errors import Conflict, Invalid, Problem, TimedOut, Unsupported
from imageapi.linux.kmsg import Tail
from imageapi.spec import Rbd

FEATURES = {
    1 << bit: name
    for bit, name in enumerate(
        (
            *("layering", "striping", "exclusive-lock", "object-map", "fast-diff", "deep-flatten", "journaling"),
            *("data-pool", "operations", "migrating", "non-primary"),
        )
    )
}
"""drivers/block/rbd.c, librbd: the bits of an image's features, by the names that `rbd feature` takes."""


_GREETING = re.compile(r"session established$|: client\d+ fsid ")


class Said(NamedTuple):
    """What the kernel's log said while the image was being mapped."""

    text: str

    def __contains__(self, sentence: object) -> bool:
        return str(sentence) in self.text


def said(log: Tail) -> Said:
    """All but what it says of every client that comes."""
    sentences = log.about("rbd: ", "libceph: ").split("; ")
    return Said("; ".join(each for each in sentences if not _GREETING.search(each)))


def whole_name(definition: Rbd) -> str:
    """`pool/namespace/image@snapshot`, as Ceph's tools take it."""
    parts = [definition.pool, definition.options.namespace or "", definition.image]
    snapshot = f"@{definition.snapshot}" if definition.snapshot else ""
    return "/".join(part for part in parts if part) + snapshot


def explain(error: OSError, definition: Rbd, log: Said) -> Problem:
    """The answer to whoever asked for the image."""
    problem = _meaning(error.errno or 0, definition, log)
    problem.fields.setdefault("errno", errno.errorcode.get(error.errno or 0, ""))
    if log.text and not isinstance(problem, Invalid):
        problem.fields.setdefault("detail", log.text)
    return problem


def _meaning(number: int, definition: Rbd, log: Said) -> Problem:
    match number:
        case errno.EACCES:
            return _refused(definition)
        case errno.EPERM:
            return _not_permitted(definition)
        case errno.ENOENT:
            return _missing(definition, log)
        case errno.ETIMEDOUT if "failed to acquire exclusive lock" in log:
            return _locked(definition)
        case errno.ETIMEDOUT:
            return _silent(definition)
        case errno.EROFS | errno.EBUSY:
            return _locked(definition)
        case errno.ESHUTDOWN:
            return _blocklisted()
        case errno.ENXIO | errno.EOPNOTSUPP | errno.EINVAL:
            return _unsupported(definition, log)
        case _:
            return Problem(f"the kernel could not map image '{whole_name(definition)}'", step="map the image")


def _refused(definition: Rbd) -> Problem:
    user = options.user(definition.options)
    if not definition.options.secret:
        return Invalid(
            f"the cluster wants a key of client.{user}: give as 'secret' what 'ceph auth get-key client.{user}' prints",
            path="$.options.secret",
        )
    return Invalid(
        f"the monitors refuse client.{user}: there is no such user, the secret is not its key, or it may do nothing "
        f"there; compare it with 'ceph auth get client.{user}'",
        path="$.options.secret",
    )


def _not_permitted(definition: Rbd) -> Problem:
    user, pool = options.user(definition.options), definition.pool
    wanted = f"'profile rbd-read-only pool={pool}'" if options.read_only(definition) else f"'profile rbd pool={pool}'"
    less = "" if options.read_only(definition) else ", or attach with 'ro' if it is only to read"
    return Invalid(
        f"client.{user} may not do this with image '{whole_name(definition)}': give its caps of the OSDs {wanted} "
        f"('ceph auth caps'){less}",
        path="$.options.name",
    )


def _missing(definition: Rbd, log: Said) -> Problem:
    """ENOENT is said of all three; only the log says of which."""
    pool = definition.pool
    where = "/".join(part for part in (pool, definition.options.namespace or "") if part)
    image = f"{where}/{definition.image}"
    if f"pool {pool} does not exist" in log:
        return Invalid(f"the cluster has no pool '{pool}': see 'ceph osd pool ls'", path="$.pool")
    if definition.snapshot and f"snap {image}@{definition.snapshot} does not exist" in log:
        return Invalid(
            f"image '{image}' has no snapshot '{definition.snapshot}': see 'rbd snap ls {image}'", path="$.snapshot"
        )
    if f"image {image} does not exist" in log:
        return Invalid(f"there is no image '{definition.image}' in '{where}': see 'rbd ls {where}'", path="$.image")
    return Invalid(f"the cluster has no '{whole_name(definition)}': see 'rbd ls {where}'", path="$.image")


def _silent(definition: Rbd) -> Problem:
    unsigned = ""
    if definition.options.nocephx_sign_messages:
        unsigned = ", and that the cluster takes messages that are not signed ('nocephx_sign_messages')"
    return TimedOut(
        f"the cluster does not answer in time (monitors {', '.join(definition.monitors)}): see with 'ceph -s' that "
        f"they have a quorum and the OSDs of pool '{definition.pool}' are up, that this host reaches both{unsigned}",
        path="$.monitors",
    )


def _locked(definition: Rbd) -> Problem:
    name = whole_name(definition)
    return Conflict(
        f"another client holds the exclusive lock of image '{name}' and does not give it up: see 'rbd lock ls {name}' "
        "and 'rbd status', end that one, or leave out 'exclusive' and 'lock_on_read'",
        path="$.options",
    )


def _blocklisted() -> Problem:
    return Conflict("the cluster has shut this host out: see 'ceph osd blocklist ls' and 'ceph osd blocklist rm'")


def _unsupported(definition: Rbd, log: Said) -> Problem:
    name = whole_name(definition)
    if "exclusive-lock feature is not enabled" in log:
        option = "exclusive" if definition.options.exclusive else "lock_on_read"
        return Invalid(
            f"'{option}' needs an image with a lock: 'rbd feature enable {name} exclusive-lock', or leave it out",
            path=f"$.options.{option}",
        )
    found = re.search(rf"image {re.escape(definition.image)}: image uses unsupported features: (0x[0-9a-f]+)", log.text)
    if found:
        features = " ".join(_named(int(found[1], 16)))
        return Unsupported(
            f"this kernel's rbd driver lacks what image '{name}' uses: {features}; disable it where that can be done "
            f"('rbd feature disable {name} {features}'), or start the server with --rbd-backend daemon",
            path="$.image",
        )
    words = f"; it says: {log.text}" if log.text else ""
    if "Unknown parameter" in log:
        return Unsupported(
            f"this kernel's rbd driver does not know an option of '{name}': leave it out, or start the server with "
            f"--rbd-backend daemon{words}",
            path="$.options",
        )
    return Invalid(f"the kernel's rbd driver refuses what is asked of '{name}': correct it{words}", path="$.options")


def _named(bits: int) -> Iterator[str]:
    return (FEATURES.get(1 << bit, f"feature {1 << bit:#x}") for bit in range(64) if bits >> bit & 1)
