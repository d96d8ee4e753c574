"""The daemon way: qemu-storage-daemon logs in with libiscsi, and a loop device stands on the file it shows.

An image has a daemon of its own. QEMU's export answers one request after another, and while the target is away it
waits in that request, with everything else the daemon has; a daemon takes little beside the program's own pages.
"""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Iterator
from typing import Any

from imageapi.config import Site
from imageapi.drivers import exported, storage_daemon
from imageapi.drivers.deadline import Deadline
from imageapi.drivers.iscsi import pdu, portals
from imageapi.drivers.iscsi.portals import Portal
from imageapi.drivers.qmp import QmpError
from imageapi.drivers.storage_daemon import Source
from imageapi.errors import Invalid, Problem, TimedOut, Unsupported
from imageapi.records import Key
from imageapi.spec import Iscsi, Secret

REFUSED = "see the target's log, and whether it has room"
"""Where to look when the target refuses writes."""

PORTAL = "portal"
"""The file beside the export that names the portal at which the daemon has its session."""


def acquire(key: Key, definition: Iscsi, site: Site) -> str:
    """Attach the logical unit and return its block device. Leaves nothing when it fails.

    Raises: errors.Problem in the user's terms; OSError from the loop device.
    """
    deadline = Deadline(exported.DEADLINE)
    release(key, definition, site)
    wanted = source(key, definition, portals.reach(definition, deadline)[0])
    with _explained(definition):
        return exported.attach(
            site, key, wanted, deadline, scheduler=definition.scheduler, partitions=definition.readPartitions
        )


def release(key: Key, definition: Iscsi, site: Site) -> None:
    """Flush, and take away the loop device, the file and the daemon. Idempotent.

    Raises: errors.Conflict while the device is in use; errors.TimedOut; errors.Problem when writes were lost.
    """
    deadline = Deadline(exported.DEADLINE)
    if not definition.ro and storage_daemon.standing(site, key):
        _check_target(key, definition, site)
    with _explained(definition):
        exported.detach(site, key, deadline, read_only=definition.ro, hint=REFUSED, caches=False)


def _check_target(key: Key, definition: Iscsi, site: Site) -> None:
    """A flush to a target that is away would wait for it in the kernel, where nothing can end it: so see first. That
    another portal answers is no help: QEMU stays with the one it has.

    Raises: errors.TimedOut.
    """
    portal = _portal_of(key, site)
    if portals.answers(definition, portal):
        return
    raise TimedOut(
        f"target {definition.target} does not answer at {portal or definition.host}, and may not have all that was "
        "written: it is detached when the target is back; to give up what is not there, "
        f"'kill -9 {storage_daemon.process_of(site, key)}' ({storage_daemon.PROGRAM}; it may heed nothing else)",
        path="$.host",
    )


def _portal_of(key: Key, site: Site) -> Portal | None:
    """Where the daemon has its session; None where the release that attached the unit did not note it."""
    with (
        contextlib.suppress(OSError, ValueError),
        open(storage_daemon.private_path(site, key, PORTAL), encoding="ascii") as note,
    ):
        return portals.parse(note.read())
    return None


def mend(key: Key, definition: Iscsi, site: Site) -> tuple[str, str | None]:
    """Have the logical unit's device work again; the device, and what is wrong all the same.

    Raises: errors.Conflict when it never can be; errors.Problem in the user's terms.
    """
    deadline = Deadline(exported.MEND_DEADLINE)

    def wanted() -> Source:
        return source(key, definition, portals.reach(definition, deadline)[0])

    with _explained(definition):
        return exported.mend(site, key, wanted, deadline, read_only=definition.ro)


def source(key: Key, definition: Iscsi, portal: Portal) -> Source:
    """What the daemon is to open."""
    blockdev: dict[str, Any] = {
        "driver": "iscsi",
        "transport": "tcp",
        "portal": str(portal),
        "target": definition.target,
        "lun": pdu.lun_word(definition.lun),
        "initiator-name": definition.initiator,
    }
    secret = None
    if definition.chap is not None:
        blockdev["user"] = definition.chap.user
        secret = Secret(base64.b64encode(definition.chap.secret.reveal().encode()).decode())
    return Source(
        f"{key.collection}-{key.id}", blockdev, secret, {PORTAL: str(portal)}, definition.ro, "password-secret"
    )


# ----------------------------------------------------------------------------------- QEMU's words, and ours


@contextlib.contextmanager
def _explained(definition: Iscsi) -> Iterator[None]:
    """What the storage daemon raises becomes a problem in the user's terms."""
    try:
        yield
    except QmpError as error:
        raise explain(str(error), definition) from None
    except TimeoutError:
        raise TimedOut(
            f"target {definition.target} on {definition.host} does not answer in time: it let us in a moment ago, so "
            "see its log and its disks",
            path="$.host",
        ) from None
    except ConnectionError as error:
        raise exported.ended(str(error)) from None


def explain(words: str, definition: Iscsi) -> Problem:
    """What QEMU's message means, after a login of our own has shown that all is well (QEMU's block/iscsi.c)."""
    if "Status: Auth" in words:
        return Unsupported(
            f"target {definition.target} demands mutual CHAP of its initiators, which {storage_daemon.PROGRAM} cannot "
            "do: do not demand it there, or load the module iscsi_tcp, run iscsid and start the server with "
            "--iscsi-backend kernel",
            path="$.chap",
            detail=words,
        )
    if "write protected" in words:
        return Invalid(f"LUN {definition.lun} of the target is write-protected: set ro", path="$.ro")
    if re.search(r"Unknown driver|does not accept value|Invalid parameter", words):
        return Unsupported(f"this host's storage daemon cannot do it: install {storage_daemon.PACKAGES}", detail=words)
    return Problem(
        f"the storage daemon could not open LUN {definition.lun} of target {definition.target}: see the target's log",
        step="attach or detach the image",
        detail=words,
    )
