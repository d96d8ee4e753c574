"""A logical unit of an iSCSI target as a block device, by the kernel's initiator or by qemu-storage-daemon and a loop
device.

`--iscsi-backend` decides, and `auto` takes the kernel's initiator where there is one. What was attached is found again
by its mark whichever way was taken, so a release needs no more than the record.
"""

from __future__ import annotations

from collections.abc import Callable

from imageapi.config import Site
from imageapi.drivers import exported, storage_daemon
from imageapi.drivers.exported import ExportedDriver
from imageapi.drivers.iscsi import daemon, kernel
from imageapi.errors import Invalid, Unsupported
from imageapi.records import AnyRecord, Facts, Key
from imageapi.spec import Chap, Iscsi


class Driver(ExportedDriver):
    """The kind `iscsi`."""

    kernel = kernel
    daemon = daemon

    def attach(self, record: AnyRecord, site: Site) -> str:
        definition: Iscsi = record.definition
        check(definition)
        return choose(site)(record.key, definition, site)

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        device = kernel.observe(record.key, site) or exported.observe(record.key, site)
        return exported.observed(site, record.key, device)

    def read_only(self, definition: Iscsi) -> bool:
        return definition.ro

    def identities(self, definition: Iscsi) -> frozenset[object]:
        """The logical unit, by whatever portal it is reached: a target's name is the same everywhere (RFC 7143, 4.2.7),
        in whichever case it is written."""
        return frozenset({(definition.target.lower(), definition.lun)})

    def forced(self, definition: Iscsi) -> bool:
        return definition.options is not None and definition.options.force

    def store(self, definition: Iscsi) -> str:
        return f"iscsi:{definition.host}:{definition.port}"


def choose(site: Site) -> Callable[[Key, Iscsi, Site], str]:
    """The way logical units are attached here.

    Raises: errors.Unsupported naming what to install or load.
    """
    if site.iscsi_backend != "daemon" and kernel.available():
        return kernel.acquire
    if site.iscsi_backend == "kernel":
        raise Unsupported(
            "the kernel's initiator cannot be used: load the module iscsi_tcp and install open-iscsi, or do without "
            "--iscsi-backend kernel"
        )
    missing = storage_daemon.missing()
    if missing:
        first = "" if site.iscsi_backend == "daemon" else "there is no module iscsi_tcp or no open-iscsi here, and "
        raise Unsupported(f"{first}the storage daemon cannot be used: {missing}")
    return daemon.acquire


def check(definition: Iscsi) -> None:
    """Refuse what contradicts itself, and what is no name: names become parts of paths and lines of open-iscsi's.

    Raises: errors.Invalid.
    """
    for field in ("initiator", "target"):
        _check_name(getattr(definition, field), f"$.{field}")
    if definition.chap is not None:
        _check_chap(definition.chap)


LONGEST = 223
"""Bytes of the name of a target or initiator (RFC 7143, 4.2.7.1)."""


def _check_name(name: str, path: str) -> None:
    if name in (".", "..") or len(name.encode()) > LONGEST or not all(_is_part_of_a_name(each) for each in name):
        raise Invalid(
            f"{name!r} is no iSCSI name: it has no blank and no '/', and {LONGEST} bytes at the most, as "
            "iqn.2026-01.com.example:disk",
            path=path,
        )


def _is_part_of_a_name(char: str) -> bool:
    return char.isprintable() and char not in " /"


def _check_chap(chap: Chap) -> None:
    told = {
        "user": chap.user,
        "secret": chap.secret.reveal(),
        "mutual_user": chap.mutual_user or "",
        "mutual_secret": chap.mutual_secret.reveal() if chap.mutual_secret else "",
    }
    for field, value in told.items():
        if value != value.strip() or not value.isprintable():
            raise Invalid(
                f"{field} begins or ends with a blank, or holds a character that cannot be printed: correct it",
                path=f"$.chap.{field}",
            )
    if bool(chap.mutual_user) != (chap.mutual_secret is not None):
        absent = "mutual_secret" if chap.mutual_user else "mutual_user"
        raise Invalid(f"mutual CHAP takes a name and a secret: give {absent} too", path=f"$.chap.{absent}")
    if chap.mutual_secret == chap.secret:
        raise Invalid(
            "the target's secret is the same as the initiator's, so that it could send our own proof back (RFC 7143, "
            "9.2.1): choose two",
            path="$.chap.mutual_secret",
        )
