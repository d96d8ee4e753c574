"""What the server and the supervisor say to each other: JSON, one message a packet of a SOCK_SEQPACKET socket.

The server sends a `Call` and gets a `Reply` of the same number; a `Reply` numbered 0 is news that nobody asked for.
The first call is `Hello`; where the answer is of another version or release, the second is `Upgrade`, and nothing else
is said. These two, `Welcome` and `Failed` are understood by all versions: they may be given more fields, with defaults.
With a `Start` come two descriptors: of the mount namespace that the server works in, and of the directory there
in which the root is mounted.
"""

from __future__ import annotations

import socket
from array import array
from typing import Any

import msgspec

from imageapi import __version__
from imageapi.config import LOG_LIMIT

VERSION = 3
"""Of all other messages."""
RELEASE = __version__
"""Of the package: one supervisor's code is as new as its server's."""
MESSAGE = 192 << 10
"""The largest packet in bytes; a socket's buffer, 208 KiB by default, must hold it."""
PAGE = 500
"""How many lives an answer holds."""
SOCKET = "socket"
LOG = "log"
"""The names in the supervisor's directory of its socket, and of what it says of its own bugs."""


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The base of all; its tag is the name of the class."""


class Hello(Message, frozen=True):
    """Answered by Welcome, whatever the version. A container's log that has grown to `log_limit` bytes is put aside
    from now on."""

    version: int = VERSION
    log_limit: int = LOG_LIMIT


class Upgrade(Message, frozen=True):
    """Execute the program `argv`, in the host's mount namespace, with two more arguments: the descriptors of the
    supervisor's lock and of its listening socket. There is no answer, but the end of the connection; it is refused
    while a container is being started.
    """

    argv: list[str]
    environment: dict[str, str]


class Start(Message, frozen=True, kw_only=True):
    """Execute `argv` in a copy of what is mounted at `root`, a name in the directory that comes with it: answered by
    Started when it has been executed.

    `cleared` are attributes of the mounts there (mount_setattr(2)) that the copy is not to have. `logfile` is a name in
    the site's logs directory, which is told the lines `told` first; `mark` is the container's own (Site.mark). Without
    a `hostname` the host's is kept. `timeout`: seconds until what storage does not deliver, root or program, is given
    up.
    """

    id: int
    attempt: int
    root: str
    argv: list[str]
    logfile: str
    mark: str
    cleared: int = 0
    told: list[str] = []
    systemd: bool = False
    hostname: str | None = None
    environment: dict[str, str] = {}
    timeout: float = 20.0


class Signal(Message, frozen=True):
    """Send a signal to the first process: Done."""

    id: int
    attempt: int
    signal: int


class Kill(Message, frozen=True):
    """SIGKILL for the first process, and so for all: Done, when it is sent."""

    id: int
    attempt: int


class Forget(Message, frozen=True):
    """Drop what is kept of a life that has ended: Done, also when nothing is kept."""

    id: int
    attempt: int


class List(Message, frozen=True):
    """The lives of containers with ids greater than `above`: answered by Lives."""

    above: int = -1


class Quit(Message, frozen=True):
    """End, and leave nothing in the kernel: Done; refused while a container lives."""


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """One start of a container. `start_time` is when its command had been executed, in clock ticks since the boot, or
    when another supervisor found that it had: its process is older, and is not known by that. `exit_code` is 0 to 255
    or 128 + signal; None while it runs, or when nobody knows. `finished_at` is RFC 3339 in UTC. Of a list: `starting`,
    when it has not executed its command, and may fail to, or its supervisor died before, and it has ended without; and
    `log_trouble` as in Started; None while nobody knows: its supervisor died, and it has printed nothing since."""

    id: int
    attempt: int
    pid: int
    start_time: int
    running: bool = True
    exit_code: int | None = None
    finished_at: str | None = None
    starting: bool = False
    log_trouble: int | None = 0


class Welcome(Message, frozen=True):
    """`pid` is the supervisor's."""

    version: int
    pid: int
    release: str = ""


class Started(Message, frozen=True):
    """`pid` is the host's number of the first process; `start_time` as in Life. `log_trouble` is the errno for which
    lines of its log are lost, or 0."""

    id: int
    attempt: int
    pid: int
    start_time: int
    log_trouble: int = 0


class Lives(Message, frozen=True):
    """A page of them, in order of id; `more` says that it is not the last."""

    lives: list[Life]
    more: bool = False


class Done(Message, frozen=True):
    """It is done."""


class Failed(Message, frozen=True):
    """`problem` is that of errors.Problem.to_dict."""

    problem: dict[str, Any]


class Ended(Message, frozen=True):
    """News: a first process has ended, all its output is in the log, and its end is on disk."""

    id: int
    attempt: int
    exit_code: int | None
    finished_at: str


class LogTrouble(Message, frozen=True):
    """News: what a container prints is not in its log any more, for this errno; or, with 0, is so again."""

    id: int
    attempt: int
    errno: int


Request = Hello | Upgrade | Start | Signal | Kill | Forget | List | Quit
Answer = Welcome | Started | Lives | Done | Failed | Ended | LogTrouble


class Call(msgspec.Struct, frozen=True):
    number: int
    body: Request


class Reply(msgspec.Struct, frozen=True):
    number: int
    body: Answer


_INT = array("i").itemsize
encode = msgspec.json.Encoder().encode
decode_call = msgspec.json.Decoder(Call).decode
decode_reply = msgspec.json.Decoder(Reply).decode


def receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and the descriptors that came with it, three at most, which close on exec; b"" when the other end is
    gone. Not by socket.recv_fds, which does not pass its flags on.

    Raises: BlockingIOError.
    """
    data, control, _, _ = channel.recvmsg(MESSAGE, socket.CMSG_SPACE(3 * _INT), socket.MSG_CMSG_CLOEXEC)
    packed = b"".join(data for _, kind, data in control if kind == socket.SCM_RIGHTS)
    return data, list(array("i", packed))
