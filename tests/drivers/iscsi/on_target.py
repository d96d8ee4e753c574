"""What the tests of the iscsi driver ask for, and the target that they ask."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from drivers.exporting import refused
from imageapi import errors
from imageapi.config import Site
from imageapi.drivers.attach.iscsi import Driver
from imageapi.records import AnyRecord, Record
from imageapi.spec import Attachment, Chap, Iscsi, Secret
from lab import partitions
from lab.iscsi import PORT, Account, Server

DRIVER = Driver()
INITIATOR = "iqn.2026-01.test:node1"
OPEN, GUARDED, MUTUAL, CLOSED = (f"iqn.2026-01.test:{name}" for name in ("open", "guarded", "mutual", "closed"))
"""Targets: for all; with CHAP; with mutual CHAP; for another initiator."""
ACCOUNT, TARGET_ACCOUNT = Account("node", "only-for-nodes"), Account("storage", "proof-of-target")
IMAGE, SCRATCH, PROTECTED, PARTED, FAR = 1, 2, 3, 4, 300
"""The LUNs of each target: a squashfs and an empty disk; and of the open one: a disk that the target lets nobody write,
one whose second partition is the image, and the image again."""
SCRATCH_SIZE = 8 << 20


class Lab(NamedTuple):
    """The server, and the image on its disks."""

    server: Server
    image: bytes

    @property
    def scratch(self) -> Path:
        """The file under the open target's empty disk."""
        return Path(self.server.directory, "scratch-1")


def fill(server: Server, image: Path) -> None:
    """Make the targets."""
    numbers = {
        OPEN: server.add_target(OPEN),
        GUARDED: server.add_target(GUARDED, account=ACCOUNT),
        MUTUAL: server.add_target(MUTUAL, account=Account("node2", ACCOUNT.secret), mutual=TARGET_ACCOUNT),
        CLOSED: server.add_target(CLOSED, initiator="iqn.2026-01.test:somebody-else"),
    }
    shutil.copyfile(image, f"{server.directory}/image")
    for number in numbers.values():
        scratch = f"{server.directory}/scratch-{number}"
        subprocess.run(["truncate", "--size", str(SCRATCH_SIZE), scratch], check=True)
        server.add_disk(number, IMAGE, f"{server.directory}/image")
        server.add_disk(number, SCRATCH, scratch)
    server.add_disk(numbers[OPEN], PROTECTED, f"{server.directory}/image", read_only=True)
    Path(server.directory, "parted").write_bytes(partitions.gpt(bytes(4096), image.read_bytes()))
    server.add_disk(numbers[OPEN], PARTED, f"{server.directory}/parted")
    server.add_disk(numbers[OPEN], FAR, f"{server.directory}/image")


def definition(lab: Lab, **fields: Any) -> Iscsi:
    """An attachment of the image on the open target, read-only; `fields` say otherwise."""
    chosen = {"initiator": INITIATOR, "target": OPEN, "host": lab.server.host, "port": PORT, "lun": IMAGE, "ro": True}
    return Iscsi(**{**chosen, "scheduler": "none", **fields})


def chap(**fields: Any) -> Chap:
    """What the guarded target wants; `fields` say otherwise."""
    return Chap(**{"user": ACCOUNT.user, "secret": Secret(ACCOUNT.secret), **fields})


def mutual(**fields: Any) -> Chap:
    """What the mutual target wants, and shows."""
    proof = {"user": "node2", "mutual_user": TARGET_ACCOUNT.user, "mutual_secret": Secret(TARGET_ACCOUNT.secret)}
    return chap(**{**proof, **fields})


def record(what: Iscsi, number: int = 0) -> AnyRecord:
    return Record[Attachment](id=number, token=number, spec=Attachment(kind="iscsi", iscsi=what))


def problem(site: Site, what: Iscsi) -> errors.Problem:
    """Why `what` cannot be attached; it must leave nothing, and tell no secret."""
    refusal = refused(site, record(what))
    secrets = [what.chap.secret, what.chap.mutual_secret] if what.chap else []
    assert all(secret is None or secret.reveal() not in str(refusal.to_dict()) for secret in secrets)
    return refusal
