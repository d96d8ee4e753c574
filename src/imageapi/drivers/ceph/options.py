"""Every option of an rbd attachment, and what each of the two ways makes of it.

The kernel takes its own words. The daemon way takes lines of a Ceph configuration (librados and librbd read them), or
honours an option elsewhere. What a way cannot honour is refused with the reason, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from imageapi.drivers.ceph.monitors import LEGACY_PORT, MSGR2_PORT
from imageapi.errors import Invalid, Unsupported
from imageapi.spec import Rbd, RbdOptions, Secret


class Option(NamedTuple):
    """`kernel`: the word for the kernel, None if it is not its business. `daemon`: configuration lines, None if the
    daemon way cannot honour it; `why` is the reason, or how it is honoured when the lines do not say it."""

    kernel: str | None
    daemon: tuple[str, ...] | None
    why: str = ""


OPTIONS: dict[str, Option] = {
    "name": Option("name={value}", (), "the user of blockdev-add"),
    "secret": Option(None, (), "through the kernel's keyring, or over the daemon's socket: never in a command"),
    "namespace": Option("_pool_ns={value}", (), "the namespace of blockdev-add"),
    "ro": Option("ro", (), "a read-only node, export and loop device"),
    "rw": Option("rw", (), "a writable node, export and loop device"),
    "fsid": Option("fsid={value}", None, "librados does not compare it with the cluster's"),
    "ip": Option("ip={value}", None, "librados chooses the address of its end itself"),
    "share": Option("share", (), "allows a shared client, does not demand one"),
    "noshare": Option("noshare", (), "every image has a client of its own"),
    "crc": Option("crc", ("ms crc data = true",)),
    "nocrc": Option("nocrc", ("ms crc data = false",)),
    "ceph_requires_signatures": Option("cephx_require_signatures", ("cephx require signatures = true",)),
    "noceph_requires_signatures": Option("nocephx_require_signatures", ("cephx require signatures = false",)),
    "tcp_nodelay": Option("tcp_nodelay", ("ms tcp nodelay = true",)),
    "notcp_nodelay": Option("notcp_nodelay", ("ms tcp nodelay = false",)),
    "cephx_sign_messages": Option("cephx_sign_messages", ("cephx sign messages = true",)),
    "nocephx_sign_messages": Option("nocephx_sign_messages", ("cephx sign messages = false",)),
    "mount_timeout": Option(None, (), "both ways are told `connect_timeout`, which is never longer than our own"),
    "osdkeepalive": Option("osdkeepalive={value}", None, "librados has heartbeats of its own"),
    "osd_idle_ttl": Option("osd_idle_ttl={value}", None, "librados does not close idle sessions"),
    "force": Option(None, (), "allows a second attachment of the image: decided before a way is taken"),
    "queue_depth": Option("queue_depth={value}", None, "a loop device has no such limit"),
    "lock_on_read": Option("lock_on_read", None, "librbd takes no lock for reads"),
    "exclusive": Option("exclusive", None, "librbd hands the lock over when asked"),
    "lock_timeout": Option("lock_timeout={value}", None, "librbd waits for the lock as long as it takes"),
    "notrim": Option("notrim", (), "the node ignores discards"),
    "abort_on_full": Option("abort_on_full", None, "librbd waits for room"),
    "alloc_size": Option("alloc_size={value}", None, "a loop device has its own discard granularity"),
    "ms_mode": Option("ms_mode={value}", (), "`MS_MODES`"),
    "rxbounce": Option("rxbounce", (), "librados always receives into buffers of its own"),
    "read_from_replica": Option("read_from_replica={value}", ("rbd read from replica policy = {value}",)),
    "crush_location": Option("crush_location={value}", ("crush location = {value}",)),
    "compression_hint": Option("compression_hint={value}", ("rbd compression hint = {value}",)),
    "udev": Option(None, (), "nothing here waits for udev, and nothing keeps it away"),
    "noudev": Option(None, (), "nothing here waits for udev"),
}

PAIRS = (
    ("ro", "rw"),
    ("share", "noshare"),
    ("crc", "nocrc"),
    ("ceph_requires_signatures", "noceph_requires_signatures"),
    ("tcp_nodelay", "notcp_nodelay"),
    ("cephx_sign_messages", "nocephx_sign_messages"),
    ("udev", "noudev"),
)
"""Options of which only one can be meant."""

MS_MODES = {"crc": "crc", "secure": "secure", "prefer-crc": "crc secure", "prefer-secure": "secure crc"}
"""The kernel's modes of the second messenger, and librados' words for them."""

_FSID = re.compile("[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}")

CONNECT_TIMEOUT = 15
"""Seconds for a cluster to let a client in and show the image, unless `mount_timeout` is less. The service gives a
create 25 s, and the answer must still name the monitors."""


def given(options: RbdOptions) -> Iterator[tuple[str, Any]]:
    """The options that were set, with their values. An empty string is no value, a false flag is not set."""
    for name in options.__struct_fields__:
        value = getattr(options, name)
        if value not in (None, False, ""):
            yield name, value


def check(definition: Rbd) -> None:
    """Refuse options that contradict each other or the snapshot.

    Raises: errors.Invalid.
    """
    chosen = dict(given(definition.options))
    for one, other in PAIRS:
        if one in chosen and other in chosen:
            raise Invalid(f"'{one}' and '{other}' contradict each other: leave one out", path=f"$.options.{other}")
    if "fsid" in chosen:
        _check_fsid(chosen["fsid"])
    if definition.snapshot and "rw" in chosen:
        raise Invalid("a snapshot can only be read: leave 'rw' out", path="$.options.rw")


def _check_fsid(text: str) -> None:
    if not _FSID.fullmatch(text):
        raise Invalid(f"'{text}' is no cluster's number: 'ceph fsid' prints it", path="$.options.fsid")


def read_only(definition: Rbd) -> bool:
    """Whether nothing can be written through the attachment."""
    return definition.options.ro or bool(definition.snapshot)


def user(options: RbdOptions) -> str:
    """The Ceph user, without `client.`; as for every client of Ceph, `admin` unless named."""
    return options.name or "admin"


def connect_timeout(options: RbdOptions) -> int:
    """Seconds for connecting; 0 asks for no limit of the user's, and leaves ours."""
    return min(options.mount_timeout or CONNECT_TIMEOUT, CONNECT_TIMEOUT)


def default_port(options: RbdOptions) -> int:
    """The port of a monitor given without one: a mode of the second messenger means the second messenger's."""
    return MSGR2_PORT if options.ms_mode in MS_MODES else LEGACY_PORT


def kernel_words(definition: Rbd) -> list[str]:
    """The options for the kernel, but for the key's name."""
    chosen = {"name": user(definition.options), **dict(given(definition.options))}
    if read_only(definition):
        chosen["ro"] = True
    words = [_word(name, value) for name, value in chosen.items() if OPTIONS[name].kernel]
    return [*words, f"mount_timeout={connect_timeout(definition.options)}"]


def _word(name: str, value: Any) -> str:
    if isinstance(value, str) and any(char.isspace() or char == "," for char in value):
        raise Invalid(f"'{name}' holds a blank or a comma, which the kernel cannot take", path=f"$.options.{name}")
    return str(OPTIONS[name].kernel).format(value=value)


def daemon_lines(options: RbdOptions) -> list[str]:
    """The lines of the configuration for librados and librbd.

    Raises: errors.Unsupported for what this way cannot honour.
    """
    lines = [f"client mount timeout = {connect_timeout(options)}"]
    for name, value in given(options):
        lines += [line.format(value=_in_cephs_words(name, value)) for line in _daemon_option(name)]
    if options.ms_mode:
        lines += _messenger_lines(options.ms_mode)
    return lines


def _daemon_option(name: str) -> tuple[str, ...]:
    option = OPTIONS[name]
    if option.daemon is None:
        raise Unsupported(
            f"'{name}' needs the kernel's rbd driver, and images are attached with qemu-storage-daemon here: "
            f"{option.why}; leave it out, or load the rbd module and start the server with --rbd-backend kernel",
            path=f"$.options.{name}",
        )
    return option.daemon


def _messenger_lines(mode: str) -> list[str]:
    if mode not in MS_MODES:
        raise Unsupported(
            f"ms_mode '{mode}' needs the kernel's rbd driver: librados speaks the second messenger to every OSD that "
            "has it; leave it out, or start the server with --rbd-backend kernel",
            path="$.options.ms_mode",
        )
    return [f"{setting} = {MS_MODES[mode]}" for setting in ("ms client mode", "ms mon client mode")]


def _in_cephs_words(name: str, value: Any) -> Any:
    """The kernel's way of writing a value, as a Ceph configuration writes it."""
    if isinstance(value, Secret):
        raise TypeError("a secret has no place in a configuration")
    if name == "read_from_replica" and value == "no":
        return "default"
    if name == "crush_location":
        return _crush_location(value)
    return value


def _crush_location(text: str) -> str:
    """`rack:r1|host:h1` becomes `rack=r1 host=h1`.

    Raises: errors.Invalid.
    """
    pairs = [place.split(":") for place in text.split("|")]
    if not all(len(pair) == 2 and all(_is_crush_name(part) for part in pair) for pair in pairs):
        raise Invalid(f"'{text}' is no CRUSH location: write type:name|type:name", path="$.options.crush_location")
    return " ".join(f"{kind}={name}" for kind, name in pairs)


def _is_crush_name(text: str) -> bool:
    return bool(text) and all(char.isalnum() or char in "-_." for char in text)
