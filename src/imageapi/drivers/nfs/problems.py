"""What the kernel's refusals of an NFS mount mean to whoever asked for it (fs/nfs, net/sunrpc)."""

from __future__ import annotations

import errno
from functools import partial

from imageapi.drivers import mount_options
from imageapi.drivers.nfs import server
from imageapi.errors import Exhausted, Invalid, Problem, TimedOut, Unsupported
from imageapi.linux import killable, mount
from imageapi.spec import Nfs

EXPLAIN_SECONDS = 3.0
"""Seconds for the kernel to say what it has against the options, for which it may ask the server once more."""


def explain(error: OSError, definition: Nfs, fs_type: str, data: str) -> Problem:
    """The answer to the errno with which mount(2) failed; `fs_type` and `data` are what it was given."""
    name, host, path = errno.errorcode.get(error.errno or 0, ""), definition.host, definition.path
    match error.errno:
        case errno.ENOENT | errno.ESTALE:
            sentence = f"server {host} has no '{path}', or does not export it to this host: see 'exportfs -v' there"
            return Invalid(sentence, path="$.path", errno=name)
        case errno.EACCES:
            sentence = (
                f"server {host} does not let this host mount '{path}': see that the export names this host's address, "
                "and its 'sec' ('exportfs -v' there)"
            )
            return Invalid(sentence, path="$.path", errno=name)
        case errno.EPERM:
            sentence = (
                f"server {host} refuses how this host shows who it is: give option 'sec' as the export has it "
                "('exportfs -v' there), and leave 'noresvport' out"
            )
            return Invalid(sentence, path="$.options", errno=name)
        case errno.ENOTDIR:
            sentence = (
                f"'{path}' on server {host} is no directory: give the one it is in; an image in it is a 'loopback'"
            )
            return Invalid(sentence, path="$.path", errno=name)
        case errno.E2BIG:
            return mount_options.too_long("$.options")
        case errno.ENAMETOOLONG:
            return Invalid(f"'{path}' is longer than NFS allows", path="$.path", errno=name)
        case _:
            return _of_transport(error, definition, fs_type, data)


def _of_transport(error: OSError, definition: Nfs, fs_type: str, data: str) -> Problem:
    name, host, version = errno.errorcode.get(error.errno or 0, ""), definition.host, definition.version
    match error.errno:
        case errno.EPROTONOSUPPORT:
            sentence = f"server {host}, or this kernel, does not speak NFS {version}: give '4', or an older one"
            return Invalid(sentence, path="$.version", errno=name)
        case errno.EOPNOTSUPP | errno.ECONNREFUSED:
            sentence = (
                f"server {host} runs no mount service for NFS {version}: start rpc.mountd there, or take version 4"
            )
            return Invalid(sentence, path="$.version", errno=name)
        case errno.EADDRINUSE | errno.EADDRNOTAVAIL:
            sentence = "this host has no port below 1024 left for another mount: give option 'noresvport'"
            return Exhausted(sentence, path="$.options", errno=name)
        case errno.EINVAL | errno.ESRCH:
            return _refused_options(error, definition, fs_type, data)
        case errno.ETIMEDOUT | errno.EIO | None:
            sentence = (
                f"server {host} is there, but does not mount '{definition.path}': see that rpc.mountd runs, and its log"
            )
            return TimedOut(sentence, path="$.host", errno=name, detail=str(error))
        case _:
            return Problem(f"the kernel does not mount from server {host}: {error.strerror} ({name})", errno=name)


_SERVICES = {"sec": ("krb5", "rpc.gssd, with a key of this host in /etc/krb5.keytab"), "xprtsec": ("tls", "tlshd")}
"""Options, the part of their values that needs a service of this host, and that service."""


def _refused_options(error: OSError, definition: Nfs, fs_type: str, data: str) -> Problem:
    name = errno.errorcode.get(error.errno or 0, "")
    asked = {option: value if equals else None for option, equals, value in (o.partition("=") for o in data.split(","))}
    for option, (part, service) in _SERVICES.items():
        if part in (asked.get(option) or ""):
            sentence = f"option '{option}={asked[option]}' needs {service}: see that it runs on this host"
            return Unsupported(sentence, path=_place(definition, option), errno=name)
    words = _explained(fs_type, server.source(definition), asked) or "it gives no reason"
    named = next((option for option in asked if option in words), "")
    path = _place(definition, named) if named else "$.options"
    return Unsupported(f"this kernel refuses the options: {words}; leave that one out", path=path, errno=name)


def _explained(fs_type: str, source: str, asked: dict[str, str | None]) -> str:
    """What the kernel says of it; "" when it says nothing, or waits for the server to say it."""
    question = partial(mount.explain, fs_type, source, asked)
    answer = killable.ask({"words": question}, EXPLAIN_SECONDS)["words"]
    return answer if isinstance(answer, str) else ""


def _place(definition: Nfs, option: str) -> str:
    """The JSON path of an option that was asked for."""
    places = (at for at, item in enumerate(definition.options) if option in item)
    return next((f"$.options[{at}]" for at in places), "$.options")


def refused_writing(error: OSError, definition: Nfs) -> Problem:
    """The answer to a write that came back after the program that made it had gone on. The kernel tells it once."""
    name, host = errno.errorcode.get(error.errno or 0, ""), definition.host
    return Problem(
        f"server {host} has refused some of what was written through this mount, which is lost: {error.strerror}; "
        "delete again to let it go",
        step="writing to the server",
        errno=name,
    )
