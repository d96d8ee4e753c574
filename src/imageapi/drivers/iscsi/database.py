"""open-iscsi's records, for as long as one of its commands runs: an interface, and a target with its secrets.

`iscsiadm` takes a secret as an argument only, which everybody on the host can read. So the record that it would write
is written here, readable by root alone, and goes when the session stands: iscsid and the kernel have all they need. An
interface is a name and our initiator's name; its name is our mark, by which a session is known for ours.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from imageapi.config import Site
from imageapi.drivers.iscsi.portals import Portal
from imageapi.errors import Unsupported
from imageapi.records import Key
from imageapi.spec import Iscsi

PLACES = ("/var/lib/iscsi", "/etc/iscsi")
"""Where distributions keep the records; the first that is there has them."""

RECOVERY_SECONDS = 120
"""After which I/O to a target that is away fails; open-iscsi's default."""
FEWEST_COMMANDS = 16
"""The kernel refuses a session with fewer (ISCSI_TOTAL_CMDS_MIN)."""
LOGIN_SECONDS = 5
LOGOUT_SECONDS = 5


def mark(site: Site, key: Key) -> str:
    """The interface's name for the sessions of `key`; it is a file's name too."""
    return f"{prefix(site)}{key.collection}-{key.id}"


def prefix(site: Site) -> str:
    """What every such name of this server begins with."""
    return f"imageapi-{site.instance}-"


@contextlib.contextmanager
def interface(name: str, initiator: str | None = None) -> Iterator[None]:
    """An interface record, while an `iscsiadm` needs it; to end a session it need not name the initiator."""
    path = f"{_place()}/ifaces/{name}"
    _write(path, _lines(_interface(name, initiator)))
    try:
        yield
    finally:
        _remove(path)


@contextlib.contextmanager
def node(name: str, definition: Iscsi, portal: Portal) -> Iterator[None]:
    """The record of a target at a portal through the interface `name`, secrets included, while it is logged in to."""
    path = f"{_place()}/nodes/{definition.target}/{portal.ip},{portal.port},{portal.group}/{name}"
    with interface(name, definition.initiator):
        _write(path, _lines(fields(name, definition, portal)))
        try:
            yield
        finally:
            _remove(path)


def left(name: str) -> bool:
    """Whether a death has left something of the two."""
    return os.path.exists(f"{_place()}/ifaces/{name}") or bool(_targets(name))


def forget(name: str) -> None:
    """Remove what is left."""
    for path in _targets(name):
        _remove(path)
    _remove(f"{_place()}/ifaces/{name}")


def marked(beginning: str) -> list[str]:
    """The names of the interfaces that begin so."""
    with contextlib.suppress(FileNotFoundError):
        return [name for name in os.listdir(f"{_place()}/ifaces") if name.startswith(beginning)]
    return []


def fields(name: str, definition: Iscsi, portal: Portal) -> dict[str, str | int]:
    """What is not open-iscsi's default (iscsid.conf). The one LUN that was asked for is looked for by us."""
    return {
        "node.name": definition.target,
        "node.tpgt": portal.group,
        "node.startup": "manual",
        **_interface(name, definition.initiator),
        "node.session.scan": "manual",
        "node.session.cmds_max": max(definition.max_comands, FEWEST_COMMANDS),
        "node.session.queue_depth": definition.queue_depth,
        "node.session.initial_login_retry_max": 1,
        "node.session.timeo.replacement_timeout": RECOVERY_SECONDS,
        "node.conn[0].timeo.login_timeout": LOGIN_SECONDS,
        "node.conn[0].timeo.logout_timeout": LOGOUT_SECONDS,
        **_authentication(definition),
        "node.conn[0].address": portal.ip,
        "node.conn[0].port": portal.port,
    }


def _interface(name: str, initiator: str | None) -> dict[str, str | int]:
    named: dict[str, str | int] = {"iface.iscsi_ifacename": name, "iface.transport_name": "tcp"}
    return named if initiator is None else {**named, "iface.initiatorname": initiator}


def _authentication(definition: Iscsi) -> dict[str, str | int]:
    chap = definition.chap
    if chap is None:
        return {"node.session.auth.authmethod": "None"}
    ours: dict[str, str | int] = {
        "node.session.auth.authmethod": "CHAP",
        "node.session.auth.username": chap.user,
        "node.session.auth.password": chap.secret.reveal(),
    }
    if chap.mutual_secret is None:
        return ours
    theirs = {"username_in": chap.mutual_user or "", "password_in": chap.mutual_secret.reveal()}
    return {**ours, **{f"node.session.auth.{field}": value for field, value in theirs.items()}}


# ---------------------------------------------------------------------------------------------------- files


def _place() -> str:
    return next((place for place in PLACES if os.path.isdir(place)), PLACES[-1])


def _lines(values: dict[str, str | int]) -> str:
    return "".join(f"{name} = {value}\n" for name, value in values.items())


def _write(path: str, text: str) -> None:
    """Others may remove a directory that was empty a moment ago, so it is made again.

    Raises: errors.Unsupported where nothing can be written.
    """
    try:
        while not _try_to_write(path, text):
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    except OSError as error:
        raise Unsupported(
            f"open-iscsi keeps its records in {_place()}, which cannot be written: mount a tmpfs on its ifaces "
            "and nodes",
            detail=str(error),
        ) from None


def _try_to_write(path: str, text: str) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return False
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return True


def _targets(name: str) -> list[str]:
    found = []
    for directory, _, names in os.walk(f"{_place()}/nodes"):
        found += [f"{directory}/{name}"] if name in names else []
    return found


def _remove(path: str) -> None:
    """The file, and the directories below `nodes` that are empty without it."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    directory = os.path.dirname(path)
    with contextlib.suppress(OSError):
        while os.path.dirname(directory).startswith(f"{_place()}/nodes"):
            os.rmdir(directory)
            directory = os.path.dirname(directory)
