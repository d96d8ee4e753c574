"""The portals of a target: which of them answer, and what the target shows there.

`host` is one name or address; a name with several addresses is tried in their order until one lets us in. The target
itself names its other portals (SendTargets), for whoever can use more than one.
"""

from __future__ import annotations

import contextlib
import errno
import re
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from imageapi.drivers.deadline import Deadline
from imageapi.drivers.iscsi import login
from imageapi.drivers.iscsi.login import DISK, REDIRECTIONS, Login, NotIscsi, NotProven, Refused
from imageapi.errors import Invalid, Problem, TimedOut
from imageapi.spec import Iscsi

CONNECT_TIMEOUT = 4.0
"""Seconds for one portal to take a connection; one on an idle network takes milliseconds."""
PROBE_TIMEOUT = 1.0
"""Seconds for the portals that a target names beside the one that let us in, all at once."""
_NAMED = 8
"""How many LUNs a sentence names."""
_ADDRESS = re.compile(r"(?:\[(?P<six>[^\]]+)\]|(?P<host>[^\[\]:]+))(?::(?P<port>\d{1,5}))?(?:,(?P<group>\d+))?")


class Portal(NamedTuple):
    """An address and TCP port at which a target listens, and the number of the target's group that it is in."""

    ip: str
    port: int
    group: int = 1

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


def parse(text: str, default_port: int = 3260) -> Portal:
    """A target's own name for a portal: `10.0.0.1:3260,1` or `[::1]:3260,1`.

    Raises: ValueError.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no portal")
    return Portal(match["six"] or match["host"], int(match["port"] or default_port), int(match["group"] or 1))


def resolve(definition: Iscsi) -> list[Portal]:
    """The portals that `host` and `port` are, in the order to be tried.

    Raises: errors.Invalid when the name is not known.
    """
    host = definition.host.removeprefix("[").removesuffix("]")
    try:
        # As bytes: for a str Python loads its IDNA codec first, several milliseconds in every new worker.
        found = socket.getaddrinfo(host.encode(), definition.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise Invalid(
            f"'{definition.host}' is no address, and no name that is known here: see 'getent hosts'", path="$.host"
        ) from None
    return list(dict.fromkeys(Portal(str(address[0]), int(address[1])) for *_, address in found))


def reach(definition: Iscsi, deadline: Deadline, *, discover: bool = False) -> list[Portal]:
    """The portals at which the logical unit can be had: the first that let us in, and with `discover` those that
    the target names beside it. The time that is left is for all of them: one that is silent takes only its share.

    Raises: errors.Problem in the user's terms; errors.TimedOut when no portal answers.
    """
    silent: list[str] = []
    refusal: Problem | None = None
    found = resolve(definition)
    for left, portal in zip(range(len(found), 0, -1), found, strict=True):
        try:
            share = deadline.within(deadline.left() / left)
            return _visit(portal, definition, share, discover=discover)
        except OSError as error:
            silent.append(f"{portal} ({error.strerror or 'no answer in time'})")
        except _Later as later:
            refusal = later.problem
    if refusal is not None:
        raise refusal
    raise TimedOut(
        f"no iSCSI portal answers: {', '.join(silent)}; see that host and port are right, the target runs and this "
        "host may reach it",
        path="$.host",
    )


def open_to_us(found: Sequence[Portal]) -> list[Portal]:
    """Those of a target's portals that take a connection at once: it also names some that this host cannot reach."""
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(selectors.DefaultSelector())
        for portal in found:
            connection = stack.enter_context(socket.socket(_family(portal)))
            connection.setblocking(False)
            if connection.connect_ex(portal[:2]) in (0, errno.EINPROGRESS):
                waiting.register(connection, selectors.EVENT_WRITE, portal)
        taken = _connected(waiting)
    return [portal for portal in found if portal in taken]


def _connected(waiting: selectors.BaseSelector) -> set[Portal]:
    """The portals of those connections that stand within the time for it."""
    end, found = time.monotonic() + PROBE_TIMEOUT, set[Portal]()
    while waiting.get_map() and (left := end - time.monotonic()) > 0:
        for event, _ in waiting.select(left):
            connection = event.fileobj
            assert isinstance(connection, socket.socket)
            waiting.unregister(connection)
            if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                found.add(event.data)
    return found


class _Later(Exception):
    """A portal that cannot serve now: another may."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


def _visit(
    portal: Portal, definition: Iscsi, deadline: Deadline, *, discover: bool, sent: bool = False
) -> list[Portal]:
    """Log in at one portal, or where it sends us, once."""
    try:
        return _look(portal, definition, deadline, discover=discover)
    except Refused as error:
        if error.status in REDIRECTIONS and not sent:
            elsewhere = _redirection(error.address, definition, portal)
            return _visit(elsewhere, definition, deadline, discover=discover, sent=True)
        problem = login.explain(error, definition, str(portal))
        if error.status >> 8 == 3:
            raise _Later(problem) from None
        raise problem from None
    except (NotIscsi, NotProven) as error:
        raise login.explain(error, definition, str(portal)) from None


def _redirection(address: str, definition: Iscsi, portal: Portal) -> Portal:
    try:
        return parse(address, definition.port)
    except ValueError:
        raise login.explain(NotIscsi("it redirects to nowhere"), definition, str(portal)) from None


def _look(portal: Portal, definition: Iscsi, deadline: Deadline, *, discover: bool) -> list[Portal]:
    with _session(portal, definition, deadline) as session:
        check_unit(session, definition)
        portal = portal._replace(group=session.group)
    others = _named(portal, definition, deadline) if discover else []
    return list(dict.fromkeys([portal, *_usable(others, portal)]))


def _named(portal: Portal, definition: Iscsi, deadline: Deadline) -> list[str]:
    """The target's portals, as this one names them; none where it does not let us ask. Most let everybody, and have no
    account for this: so the target's own is tried second."""
    for who in dict.fromkeys((None, definition.chap)):
        asking = msgspec.structs.replace(definition, chap=who)
        try:
            with _session(portal, asking, deadline, discovery=True) as session:
                return session.portals()
        except (OSError, Refused, NotIscsi, NotProven):
            continue
    return []


@contextlib.contextmanager
def _session(portal: Portal, definition: Iscsi, deadline: Deadline, *, discovery: bool = False) -> Iterator[Login]:
    seconds = min(CONNECT_TIMEOUT, deadline.left())
    with socket.create_connection(portal[:2], seconds) as connection:
        session = Login(connection, definition, Deadline(seconds), discovery=discovery)
        session.log_in()
        yield session
        session.log_out()


def _usable(texts: list[str], portal: Portal) -> list[Portal]:
    """Those of the named portals that are addresses of the kind we have come by. Names may stand there as well (RFC
    7143, 13.8), which nobody is asked about."""
    found = []
    for text in texts:
        with contextlib.suppress(ValueError, OSError):
            named = parse(text)
            socket.inet_pton(_family(portal), named.ip)
            if named.port < 1 << 16 and named.ip not in ("0.0.0.0", "::"):
                found.append(named)
    return found


def _family(portal: Portal) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in portal.ip else socket.AF_INET


def check_unit(session: Login, definition: Iscsi) -> None:
    """Refuse a LUN that is not there, or is no disk. A target that does not say is believed.

    Raises: errors.Invalid.
    """
    unit = session.unit(definition.lun)
    if unit is None or unit.kind == DISK:
        return
    what = "has no LUN" if unit.kind is None else "has no disk at LUN"
    raise Invalid(f"target {definition.target} {what} {definition.lun}: {_disks(session)}", path="$.lun")


def _disks(session: Login) -> str:
    units = [lun for lun in (session.units() or []) if (unit := session.unit(lun)) and unit.kind == DISK]
    named = ", ".join(map(str, units[:_NAMED])) + (", …" if len(units) > _NAMED else "")
    return f"its disks are at LUN {named}" if units else "it shows this initiator no disk"


def answers(definition: Iscsi, portal: Portal | None = None) -> bool:
    """Whether the target speaks with us now, if only to refuse us; at one portal, or at any that it has for us. One
    that is stopped still takes connections."""
    deadline = Deadline(CONNECT_TIMEOUT)
    try:
        if portal is None:
            reach(definition, deadline)
        else:
            _visit(portal, definition, deadline, discover=False)
    except (OSError, TimedOut):
        return False
    except (Problem, _Later):
        return True
    return True
