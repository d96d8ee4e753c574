"""A server, asked before the kernel is: whether it is there, and what it speaks. The kernel takes minutes to say that a
server is silent, and has one errno for many reasons."""

from __future__ import annotations

import errno
import socket
from typing import NamedTuple

from imageapi.drivers.nfs import rpc
from imageapi.drivers.nfs.options import Chosen
from imageapi.errors import Invalid, TimedOut
from imageapi.spec import Nfs

PATIENCE = 5.0
"""Seconds for all addresses of a server to answer; an idle one takes milliseconds."""


class Reached(NamedTuple):
    """A server that answered: its address and port, and the address of this host that it sees."""

    address: str
    port: int
    own_address: str


def bare(host: str) -> str:
    """`host` without the brackets that an IPv6 address may have.

    Raises: errors.Invalid for what is no host.
    """
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not name or any(letter.isspace() or letter in "/,[]" for letter in name):
        raise Invalid(f"'{host}' is no host: give a name or an address; a port goes into option 'port'", path="$.host")
    return name


def source(definition: Nfs) -> str:
    """What is mounted, as the kernel takes it and shows it: `host:/path`, `[address]:/path`."""
    host = bare(definition.host)
    return f"[{host}]:{definition.path}" if ":" in host else f"{host}:{definition.path}"


def reach(definition: Nfs, chosen: Chosen) -> Reached:
    """Ask the server whether it speaks the version at all.

    Raises: errors.Problem with what is to be seen to.
    """
    addresses = _resolved(definition.host, chosen.family)
    if chosen.transport.startswith("rdma"):
        return Reached(addresses[0], chosen.port, "")
    failures: dict[str, OSError] = {}
    for address in addresses:
        try:
            own = _ask(address, chosen.port, rpc.NFS, int(definition.version[0]), PATIENCE / len(addresses))
        except OSError as error:
            failures[address] = error
        else:
            _check_mount_service(definition, chosen, address)
            return Reached(address, chosen.port, own)
    raise _complaint(definition, chosen.port, failures)


def answers(address: str, port: int, version: int, seconds: float = PATIENCE) -> bool:
    """Whether the server is there now."""
    try:
        _ask(address, port, rpc.NFS, version, seconds)
    except OSError:
        return False
    return True


def _resolved(host: str, family: socket.AddressFamily) -> list[str]:
    try:
        # As bytes: for a str Python loads its IDNA codec, several milliseconds in every new worker.
        found = socket.getaddrinfo(bare(host).encode(), None, family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        sentence = (
            f"the name of the server '{host}' is not known here ({error.strerror}); correct it, or see to the DNS"
        )
        raise Invalid(sentence, path="$.host") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _ask(address: str, port: int, program: int, version: int, seconds: float) -> str:
    """Raises: rpc.Absent, rpc.OtherVersions, OSError. Returns: this host's address towards it."""
    with rpc.Channel(address, port, seconds) as channel:
        rpc.ping(channel, program, version)
        return channel.own_address


def _check_mount_service(definition: Nfs, chosen: Chosen, address: str) -> None:
    """Version 3 asks rpcbind of the server where its mount service is.

    Raises: errors.Invalid, errors.TimedOut.
    """
    if definition.version != "3" or "mountport" in chosen.own:
        return
    try:
        rpc.Channel(address, rpc.PORTMAPPER_PORT, PATIENCE).close()
    except OSError as error:
        sentence = (
            f"rpcbind of server {definition.host} (port {rpc.PORTMAPPER_PORT}) does not answer, and version 3 asks it "
            "where the mount service is: start it or open the port, give option 'mountport', or take version 4"
        )
        problem = Invalid if isinstance(error, ConnectionRefusedError) else TimedOut
        raise problem(sentence, path="$.version", errno=_name(error)) from None


def _complaint(definition: Nfs, port: int, failures: dict[str, OSError]) -> Invalid | TimedOut:
    """What it means that no address has answered as it should: the one that came furthest tells most."""
    address, error = max(failures.items(), key=lambda each: _distance(each[1]))
    server = f"server {definition.host}" if definition.host == address else f"server {definition.host} ({address})"
    match error:
        case rpc.OtherVersions():
            sentence = f"{server} speaks NFS {error}, not version {definition.version}; give one that it speaks"
            return Invalid(sentence, path="$.version")
        case rpc.Absent():
            sentence = f"what answers at port {port} of {server} is no NFS server: {error}; give option 'port'"
            return Invalid(sentence, path="$.host")
        case ConnectionRefusedError():
            sentence = f"{server} has no NFS service at port {port}: start it there, or give option 'port'"
            return Invalid(sentence, path="$.host", errno=_name(error))
    sentence = (
        f"{server} does not answer at port {port}: see that it runs, that the address is right, and that no firewall "
        "is between"
    )
    return TimedOut(sentence, path="$.host", errno=_name(error))


def _distance(error: OSError) -> int:
    kinds = (ConnectionRefusedError, rpc.Absent, rpc.OtherVersions)
    return next((at for at, kind in enumerate(kinds, 1) if isinstance(error, kind)), 0)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "")


def has_lock_monitor() -> bool:
    """Whether rpc.statd runs on this host: without it the locks of version 3 fail when the first is taken."""
    try:
        with rpc.Channel("127.0.0.1", rpc.PORTMAPPER_PORT, PATIENCE) as channel:
            return rpc.port_of(channel, rpc.STATUS_MONITOR, 1, socket.IPPROTO_UDP) != 0
    except OSError:
        return False
