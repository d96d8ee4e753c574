"""The first process of a container, from its clone to its exec.

It is in namespaces of its own, waits for its orders and makes its root; nothing it does outlives it, so that one whose
supervisor dies meanwhile has only to end, which it does at the gate. Once the image is its root, no descriptor of the
host's is left but the log, the tie to the supervisor, and what a step hands over: no symbolic link of the image's
leads out.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import msgspec

from imageapi import errors
from imageapi.linux import cgroup, namespaces, process
from imageapi.linux.libc import AT_FDCWD
from imageapi.linux.mount import (
    MNT_DETACH,
    MOVE_MOUNT_F_EMPTY_PATH,
    MS_PRIVATE,
    mount_setattr,
    move_mount,
    pivot_root,
    umount,
)
from imageapi.runtime import command, layout, logs, output
from imageapi.runtime.protocol import MESSAGE, Start
from imageapi.runtime.steps import Step

NOT_EXECUTED = 127
"""The exit status of a first process that did not come to execute its command."""
PLACE = "/image"
"""The directory in the supervisor's root where a container's root is put on its way."""

_UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
LIMITS: tuple[tuple[int, tuple[int, int]], ...] = (
    (resource.RLIMIT_NOFILE, (1024, 524288)),
    (resource.RLIMIT_STACK, (8 << 20, resource.RLIM_INFINITY)),
    (resource.RLIMIT_CORE, (0, resource.RLIM_INFINITY)),
    (resource.RLIMIT_NICE, (0, 0)),
    (resource.RLIMIT_RTPRIO, (0, 0)),
    *((limit, _UNLIMITED) for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA)),
    *((limit, _UNLIMITED) for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_NPROC)),
)
"""What a container starts with, whatever the server was started with: systemd's own defaults for a service, and no
limit on locked memory, which RDMA needs."""


class Inheritance(NamedTuple):
    """What the first process has of its supervisor: descriptors of the supervisor's directory, of the logs, and of the
    version 1 hierarchies in which it makes groups for systemd; the signals the supervisor does not take; and whether
    the kernel was told to spare or to prefer it when memory runs out."""

    directory: int
    logs: int
    groups: Sequence[int]
    ignored: Sequence[int]
    adjust_oom: bool


class Orders(msgspec.Struct, frozen=True):
    """What it is to become. With them come the root's tree, and for systemd that for layout.HOST. `group` is the name
    of its cgroups."""

    start: Start
    uuid: str
    group: str


_decode = msgspec.json.Decoder(Orders).decode


def run(tie: socket.socket, given: Inheritance) -> NoReturn:
    """Become the command that is ordered over `tie`, or end and say why. Never returns, whatever happens."""
    try:
        process.close_all_but(tie.fileno(), given.directory, given.logs, *given.groups)
        process.name("imageapi-child")
        _forget_supervisor(given)
        orders, descriptors, _, _ = socket.recv_fds(tie, MESSAGE, 2, socket.MSG_CMSG_CLOEXEC)
        if orders:
            _become(_decode(orders), tie, given, *descriptors)
    except errors.Problem as problem:
        _report(tie, problem)
    except OSError as error:
        _report(tie, errors.from_oserror(error, "starting the container"))
    except BaseException as bug:
        _report(tie, errors.Problem(f"the start met a bug: {bug!r}"))
        raise
    finally:
        os._exit(NOT_EXECUTED)


def _report(tie: socket.socket, problem: errors.Problem) -> None:
    tie.send(msgspec.json.encode(problem.to_dict()))


def _become(orders: Orders, tie: socket.socket, given: Inheritance, root: int, host: int | None = None) -> NoReturn:
    order = orders.start
    log = logs.open_log(order.logfile, given.logs)
    output.attach(given.directory, order.id)
    if host is not None:
        _enter_groups(given.groups, orders.group)
    mount_setattr(root, "", propagation=MS_PRIVATE, recursive=True)
    _say(log, "making all mounts private")
    _change_root(root)
    process.close_all_but(tie.fileno(), log, *(() if host is None else (host,)))
    if order.hostname:
        namespaces.sethostname(order.hostname)
    _say(log, "preparing image")
    for step in layout.plan(host):
        _carry_out(step, log)
    _open_null()
    os.umask(0o022)
    _say(log, "executing init")
    os.close(log)
    _pass_gate(tie)
    _execute(order, layout.environment(systemd=order.systemd, uuid=orders.uuid))


def _say(log: int, text: str) -> None:
    os.write(log, logs.line("init", text))


def _enter_groups(hierarchies: Sequence[int], name: str) -> None:
    """Be in a group of one's own in every hierarchy, and see it as their root."""
    for directory in hierarchies:
        cgroup.make(directory, name)
        cgroup.enter(directory, name)
    namespaces.unshare(namespaces.CLONE_NEWCGROUP)


def _change_root(root: int) -> None:
    move_mount(root, "", AT_FDCWD, PLACE, MOVE_MOUNT_F_EMPTY_PATH)
    os.fchdir(root)
    pivot_root(".", ".")
    umount(".", MNT_DETACH)
    os.chdir("/")


def _carry_out(step: Step, log: int) -> None:
    """Do one step, and then say that it is done."""
    told = step.describe()
    try:
        step.execute()
    except OSError as error:
        raise errors.from_oserror(error, told or f"preparing {step}") from None
    if told:
        _say(log, told)


def _forget_supervisor(given: Inheritance) -> None:
    """Take on what a process has that nobody has changed anything for; but the umask, for now, gives nodes the modes
    they are made with."""
    os.umask(0)
    os.setsid()
    os.setgroups([])
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    if given.adjust_oom:
        _write("/proc/self/oom_score_adj", "0")
    for limit, (soft, hard) in LIMITS:
        _limit(limit, soft, hard)
    for number in given.ignored:
        process.reset_signal(number)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _open_null() -> None:
    """No input: the container's own null device."""
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _limit(limit: int, soft: int, hard: int) -> None:
    """Set a limit; what may not be raised (CAP_SYS_RESOURCE) stays as it is."""
    try:
        resource.setrlimit(limit, (soft, hard))
    except ValueError:
        _, most = resource.getrlimit(limit)
        within = [value if value != resource.RLIM_INFINITY and value < most else most for value in (soft, hard)]
        resource.setrlimit(limit, (within[0], within[1]))


def _pass_gate(tie: socket.socket) -> None:
    """Wait until our pid is on disk. A supervisor that dies before opens nothing, and there is nothing to do."""
    if not tie.recv(1):
        os._exit(NOT_EXECUTED)


def _execute(order: Start, environment: dict[str, str]) -> NoReturn:
    try:
        os.execve(order.argv[0], order.argv, environment | order.environment)
    except OSError as error:
        raise command.explain(os.open("/", os.O_PATH | os.O_DIRECTORY), order.argv, error) from None


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
