"""The options of an NFS mount (nfs(5), "MOUNT OPTIONS"): which the kernel is given, with which versions, and what it is
given unasked. Those that speak to mount.nfs, which is not used here, are refused with what to do instead."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from typing import NamedTuple

from imageapi.drivers import mount_options
from imageapi.drivers.mount_options import DEVICES, Given, Option
from imageapi.errors import Invalid
from imageapi.linux import mount
from imageapi.spec import Nfs

PORT = 2049
"""Where a server is looked for, unless `port` is given; with version 3, too, so that rpcbind need not be asked."""

_FLAG = Option()
_SECONDS = Option(range(2**31))
_BYTES = Option(range(1024, 2**31))
_PORT_NUMBER = Option(range(1, 65536))
_TRANSPORTS = ("tcp", "tcp6", "rdma", "rdma6", "udp", "udp6")
_FLAVOURS = re.compile(r"(none|sys|krb5[ip]?)(:(none|sys|krb5[ip]?))*")

_FOR_VERSION = Option(refused="give the version in 'version'")
_FOR_MOUNT_NFS = Option(refused="a mount is tried once, and the answer says how it went; leave it out")
_RESOLVED_HERE = Option(refused="give the address in 'host'")

OPTIONS: dict[str, Option] = {
    **dict.fromkeys(("soft", "softerr", "hard", "softreval", "nosoftreval"), _FLAG),
    **dict.fromkeys(("ac", "noac", "cto", "nocto", "sharecache", "nosharecache", "fsc", "nofsc"), _FLAG),
    **dict.fromkeys(("rdirplus", "nordirplus", "resvport", "noresvport", "alignwrite", "noalignwrite"), _FLAG),
    **dict.fromkeys(("tcp", "udp", "rdma", "intr", "nointr"), _FLAG),
    **dict.fromkeys(("acregmin", "acregmax", "acdirmin", "acdirmax", "actimeo"), _SECONDS),
    **dict.fromkeys(("rsize", "wsize"), _BYTES),
    "timeo": Option(range(1, 2**31)),
    "retrans": _SECONDS,
    "nconnect": Option(range(1, 17)),
    "port": _PORT_NUMBER,
    "proto": Option(_TRANSPORTS),
    "sec": Option(_FLAVOURS, "sys, none, krb5, krb5i or krb5p, or several of them with ':' between"),
    "xprtsec": Option(("none", "tls", "mtls")),
    "lookupcache": Option(("all", "none", "pos", "positive")),
    "write": Option(("lazy", "eager", "wait")),
    # version 3
    **dict.fromkeys(("lock", "nolock", "acl", "noacl"), _FLAG),
    "local_lock": Option(("all", "flock", "posix", "none")),
    "mountport": _PORT_NUMBER,
    "mountproto": Option(tuple(each for each in _TRANSPORTS if not each.startswith("rdma"))),
    "mountvers": Option(range(3, 4)),
    "namlen": Option(range(1, 256)),
    # versions 4
    **dict.fromkeys(("migration", "nomigration", "trunkdiscovery", "notrunkdiscovery"), _FLAG),
    "clientaddr": Option(re.compile(r"[0-9A-Fa-f:.]+(%[\w.-]+)?"), "an IPv4 or IPv6 address of this host"),
    "max_connect": Option(range(1, 17)),
    # what is said elsewhere, or not at all
    **dict.fromkeys(("vers", "nfsvers", "minorversion", "v3", "v4", "v4.0", "v4.1", "v4.2"), _FOR_VERSION),
    **dict.fromkeys(("bg", "fg", "retry"), _FOR_MOUNT_NFS),
    **dict.fromkeys(("addr", "mountaddr", "mounthost"), _RESOLVED_HERE),
    "sloppy": Option(refused="an option that is not known is always refused here; leave it out"),
    "dev": DEVICES,
}

_THREE = ("3",)
_FOUR = ("4", "4.0", "4.1", "4.2")
_SESSIONS = ("4", "4.1", "4.2")
VERSIONS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("lock", "nolock", "acl", "noacl", "local_lock", "namlen"), _THREE),
    **dict.fromkeys(("mountport", "mountproto", "mountvers", "udp"), _THREE),
    **dict.fromkeys(("migration", "nomigration", "clientaddr"), _FOUR),
    **dict.fromkeys(("trunkdiscovery", "notrunkdiscovery", "max_connect"), _SESSIONS),
}
"""The versions that know an option which not all know."""

_FORGOTTEN = ("intr", "nointr")
"""Taken, since many definitions hold them, and not passed on: the kernel has ignored them since 2.6.25."""
_ONE_OF = (("hard", "soft", "softerr"), ("tcp", "udp", "rdma", "proto"))


class Chosen(NamedTuple):
    """Options that were checked: the MS_ flags of mount(2), and NFS's own by name."""

    flags: int
    own: dict[str, str | None]

    @property
    def transport(self) -> str:
        """`tcp`, `udp` or `rdma`, perhaps with a 6 behind it."""
        return self.own.get("proto") or next((name for name in ("udp", "rdma") if name in self.own), "tcp")

    @property
    def family(self) -> socket.AddressFamily:
        """Of the server's address: a transport that is named as `proto` is also of one family."""
        if "proto" not in self.own:
            return socket.AF_UNSPEC
        return socket.AF_INET6 if self.transport.endswith("6") else socket.AF_INET

    @property
    def port(self) -> int:
        return int(self.own.get("port") or PORT)

    def words(self) -> list[str]:
        """NFS's own as mount(2) takes them."""
        return [name if value is None else f"{name}={value}" for name, value in self.own.items()]


def choose(definition: Nfs) -> Chosen:
    """What the definition asks for.

    Raises: errors.Invalid naming the option.
    """
    flags, given = mount_options.read(definition.options, OPTIONS, "NFS", "$.options")
    _check_versions(given, definition.version)
    _check_alternatives(given)
    _check_writing(definition)
    return Chosen(
        flags | mount.MS_RDONLY * definition.ro,
        {each.name: each.value for each in given if each.name not in _FORGOTTEN},
    )


def read_only(definition: Nfs) -> bool:
    """Whether nothing can be written through the mount."""
    return definition.ro or bool(mount.split_options(definition.options)[0] & mount.MS_RDONLY)


def shares_cache(definition: Nfs) -> bool:
    """Whether other mounts of the export may be the same file system of the kernel's."""
    return any("sharecache" in mount.at_commas(item) for item in definition.options)


def keeps_locks_here(chosen: Chosen) -> bool:
    """Whether the options say that all locks of a version 3 mount are this host's own business."""
    return "nolock" in chosen.own or chosen.own.get("local_lock") == "all"


def _check_versions(given: Sequence[Given], version: str) -> None:
    for each in given:
        versions = VERSIONS.get(each.name)
        if versions is not None and version not in versions:
            sentence = f"option '{each}' belongs to version {' and '.join(versions)}, not {version}; leave it out"
            raise Invalid(sentence, path=each.path)


def _check_alternatives(given: Sequence[Given]) -> None:
    for names in _ONE_OF:
        chosen = [each for each in given if each.name in names]
        if len({str(each) for each in chosen}) > 1:
            raise Invalid(f"options '{chosen[0]}' and '{chosen[-1]}': give one of them", path=chosen[-1].path)


def _check_writing(definition: Nfs) -> None:
    if not definition.ro:
        return
    for at, item in enumerate(definition.options):
        if "rw" in mount.at_commas(item):
            raise Invalid("option 'rw' contradicts 'ro': leave one of them out", path=f"$.options[{at}]")
