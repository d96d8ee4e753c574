"""The first process of a container, from its clone to its exec.

It is in namespaces of its own and makes its root in them; nothing it does outlives it, so that one whose supervisor
dies meanwhile has only to end, which it does at the gate. Once the image is its root, no descriptor of the host's is
left but the log, the tie to the supervisor, and what a step hands over: no symbolic link of the image's leads out.
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
from imageapi.runtime.protocol import Start
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
    """What the first process has of its supervisor.

    `tie`: its end of the pair whose other end, `supervisors_tie`, holds the gate and waits for the exec.
    `groups`: the hierarchies' directories in which it makes a group called `group` and enters it.
    `host`: the tree for layout.HOST, for systemd. `ignored`: the signals the supervisor does not take.
    """

    root: int
    tie: socket.socket
    supervisors_tie: socket.socket
    directory: int
    logs: int
    group: str
    groups: Sequence[int]
    host: int | None
    uuid: str
    ignored: Sequence[int]
    adjust_oom: bool


def run(order: Start, given: Inheritance) -> NoReturn:
    """Become the container's command, or end and say why over the tie. Never returns, whatever happens."""
    try:
        given.supervisors_tie.close()  # or the gate would not open when the supervisor dies
        _become(order, given)
    except errors.Problem as problem:
        _report(given.tie, problem)
    except OSError as error:
        _report(given.tie, errors.from_oserror(error, "starting the container"))
    except BaseException as bug:
        _report(given.tie, errors.Problem(f"the start met a bug: {bug!r}"))
        raise
    finally:
        os._exit(NOT_EXECUTED)


def _report(tie: socket.socket, problem: errors.Problem) -> None:
    tie.send(msgspec.json.encode(problem.to_dict()))


def _become(order: Start, given: Inheritance) -> NoReturn:
    log = logs.open_log(order.logfile, given.logs)
    output.attach(given.directory, order.id)
    _enter_groups(given)
    mount_setattr(given.root, "", propagation=MS_PRIVATE, recursive=True)
    _say(log, "making all mounts private")
    if given.adjust_oom:
        _write("/proc/self/oom_score_adj", "0")
    _change_root(given.root)
    process.close_all_but(given.tie.fileno(), log, *(() if given.host is None else (given.host,)))
    if order.hostname:
        namespaces.sethostname(order.hostname)
    _say(log, "preparing image")
    os.umask(0)
    for step in layout.plan(given.host):
        _carry_out(step, log)
    _forget_supervisor(given.ignored)
    _say(log, "executing init")
    os.close(log)
    _pass_gate(given.tie)
    _execute(order, layout.environment(systemd=order.systemd, uuid=given.uuid))


def _say(log: int, text: str) -> None:
    os.write(log, logs.line("init", text))


def _enter_groups(given: Inheritance) -> None:
    """Be in a group of one's own in every hierarchy, and see it as their root."""
    if given.host is None:
        return
    for directory in given.groups:
        cgroup.make(directory, given.group)
        cgroup.enter(directory, given.group)
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


def _forget_supervisor(ignored: Sequence[int]) -> None:
    """Take on what a process has that nobody has changed anything for."""
    stdin = os.open("/dev/null", os.O_RDONLY)
    os.dup2(stdin, 0)
    os.close(stdin)
    os.setsid()
    os.setgroups([])
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    for limit, (soft, hard) in LIMITS:
        _limit(limit, soft, hard)
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)


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
