"""The first process of a container, from its clone to its exec.

It is in namespaces of its own, and makes what it can before it knows what it is to become; then it waits for its
orders, takes a copy of the image where that is mounted, and makes it its root. Whatever of this waits for storage
makes nobody wait but this process. Nothing it does outlives it, so that one whose supervisor dies meanwhile has only
to end, which it does at the gate. Once the image is its root, no directory of the host's is open, and no symbolic
link of the image's leads out.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import msgspec

from imageapi import errors
from imageapi.linux import cgroup, memory, namespaces, process
from imageapi.linux.libc import AT_FDCWD, AT_RECURSIVE
from imageapi.linux.mount import (
    MNT_DETACH,
    MOVE_MOUNT_F_EMPTY_PATH,
    MS_PRIVATE,
    OPEN_TREE_CLOEXEC,
    OPEN_TREE_CLONE,
    mount_setattr,
    move_mount,
    open_tree,
    pivot_root,
    umount,
)
from imageapi.runtime import command, layout, logs, output
from imageapi.runtime.protocol import Start, encode, receive
from imageapi.runtime.steps import Step, Tree, take

NOT_EXECUTED = 127
"""The exit status of a first process that did not come to execute its command."""
PLACE = "/image"
"""The directory in the supervisor's root where a container's root is put on its way."""


class Inheritance(NamedTuple):
    """What the first process has of its supervisor: descriptors of the supervisor's directory, of the logs, and of the
    version 1 hierarchies in which it makes groups for systemd; its code, which is let go of at rest; and whether the
    kernel was told to spare or to prefer it when memory runs out. What else a process inherits the supervisor has given
    up itself (linux/process.renounce)."""

    directory: int
    logs: int
    groups: Sequence[int]
    code: Sequence[memory.Mapping]
    adjust_oom: bool


class Orders(msgspec.Struct, frozen=True):
    """What it is to become. With them come the descriptors of protocol.Start, and for systemd the tree layout.HOST."""

    start: Start
    uuid: str


_decode = msgspec.json.Decoder(Orders).decode
_EXAMPLE = encode(Orders(Start(id=0, attempt=0, root="", argv=["/"], logfile="", mark="", timeout=1.0), uuid=""))


def run(tie: socket.socket, given: Inheritance, name: str, group: str | None) -> NoReturn:
    """Become the command that is ordered over `tie`, or end and say why. `name` is that of its FIFO, `group` for
    systemd that of its cgroups. Never returns, whatever happens."""
    try:
        _settle(tie, given, name, group)
        steps = layout.PLAIN if group is None else layout.SYSTEMD
        trees, home = _make_trees(steps)
        _rehearse()
        memory.rest_until_readable(tie.fileno(), given.code)
        orders, descriptors = receive(tie)
        if orders:
            order = _decode(orders)
            log = logs.Log(order.start.logfile, given.logs)
            os.close(given.logs)
            root = _open_root(order.start, log, home, *descriptors[:2])
            _enter(root, order.start, steps, trees, logs.Writer(log, "init"), *descriptors[2:])
            if log.trouble:
                tie.send(b"%d" % log.trouble)
            _pass_gate(tie)
            _execute(order)
    except errors.Problem as problem:
        _report(tie, problem)
    except OSError as error:
        _report(tie, errors.from_oserror(error, "starting the container"))
    except MemoryError:
        _report(tie, errors.no_memory("starting the container"))
    except BaseException as bug:
        _report(tie, errors.Problem(f"the start met a bug: {bug!r}"))
        raise
    finally:
        os._exit(NOT_EXECUTED)


def trouble_in(said: bytes | None) -> int:
    """The errno for which lines of the log are lost, if that is what a first process says: there is more to come."""
    return int(said) if said and said.isdigit() else 0


def _report(tie: socket.socket, problem: errors.Problem) -> None:
    """Say why the command is not executed. A supervisor that is gone needs no answer."""
    with contextlib.suppress(OSError):
        tie.send(msgspec.json.encode(problem.to_dict()))


# ------------------------------------------------------------------------------------------------- before orders


def _settle(tie: socket.socket, given: Inheritance, name: str, group: str | None) -> None:
    """Have nothing of the supervisor's but what a start needs, and a session, groups and limits of one's own."""
    output.attach(given.directory, name)
    process.close_all_but(tie.fileno(), given.logs, *(() if group is None else given.groups))
    process.name("imageapi-child")
    os.setsid()
    if given.adjust_oom:
        process.reset_oom_score()
    process.limit(resource.RLIMIT_NOFILE, *process.DESCRIPTORS)
    if group is not None:
        _enter_groups(given.groups, group)


def _enter_groups(hierarchies: Sequence[int], name: str) -> None:
    """Be in a group of one's own in every hierarchy, and see it as their root."""
    for directory in hierarchies:
        cgroup.make(directory, name)
        cgroup.enter(directory, name)
        os.close(directory)
    namespaces.unshare(namespaces.CLONE_NEWCGROUP)


def _make_trees(steps: Sequence[Step]) -> tuple[dict[str, int], int]:
    """Make what owes nothing to the image, where the supervisor's root has the same mountpoints, and take it from
    there: the trees by their places. Stdin is the null device in one of them. With them comes the mount namespace that
    we are in, to be found again."""
    os.umask(0)
    for step in filter(layout.is_ahead, steps):
        _carry_out(step)
    os.umask(0o022)
    home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    trees = {place: take(place) for place in layout.TREES}
    null = os.open("null", os.O_RDONLY | os.O_CLOEXEC, dir_fd=trees["/dev"])
    os.dup2(null, 0)
    os.close(null)
    return trees, home


def _rehearse() -> None:
    """Do once what comes after the orders. A page that is written to for the first time since the clone is copied by
    the kernel then, at a microsecond each: a hundred of them are copied before somebody waits for it."""
    _decode(_EXAMPLE)
    logs.lines("init", [step.describe() for step in layout.PLAIN])
    command.rehearse()


def _carry_out(step: Step) -> None:
    try:
        step.execute()
    except OSError as error:
        raise errors.from_oserror(error, step.describe() or f"preparing {step}") from None


# -------------------------------------------------------------------------------------------------- after orders


def _open_root(order: Start, log: logs.Log, home: int, namespace: int, directory: int) -> int:
    """A copy of what is mounted at the root's place, in which the command can be executed. Only who is in a mount
    namespace can copy what is mounted there (open_tree(2)).

    Raises: errors.Invalid, when the command cannot, with the reason; OSError.
    """
    told = logs.Writer(log, f"container({order.id})")
    told.add(*order.told, "validating image")
    told.flush()
    namespaces.setns(namespace, namespaces.CLONE_NEWNS)
    root = open_tree(directory, order.root, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE)
    told.add("validating init")
    told.flush()
    command.validate(root, order.argv)
    namespaces.setns(home, namespaces.CLONE_NEWNS)
    for descriptor in (namespace, directory, home):
        os.close(descriptor)  # the image is not to find them in /proc/self/fd
    return root


def _enter(
    root: int, order: Start, steps: Sequence[Step], trees: Mapping[str, int], log: logs.Writer, host: int | None = None
) -> None:
    """Make the image the root, and all that a container finds in it. What is done is in the log before the next step
    is begun, which may wait for storage or fail."""
    mount_setattr(root, "", clear=order.cleared, propagation=MS_PRIVATE, recursive=True)
    log.add("making all mounts private", "preparing image")
    log.flush()
    _change_root(root)
    if order.hostname:
        namespaces.sethostname(order.hostname)
    for step in steps:
        _do(step, trees, log)
    if host is not None:
        _carry_out(Tree(layout.HOST, host))
    log.add("executing init")
    log.flush()


def _do(step: Step, trees: Mapping[str, int], log: logs.Writer) -> None:
    """Do a step, or put the tree in its place that it begins; what is in a tree has been done."""
    if step.path in trees or not layout.is_ahead(step):
        log.flush()
        _carry_out(Tree(step.path, trees[step.path]) if step.path in trees else step)
    if told := step.describe():
        log.add(told)


def _change_root(root: int) -> None:
    move_mount(root, "", AT_FDCWD, PLACE, MOVE_MOUNT_F_EMPTY_PATH)
    os.fchdir(root)
    os.close(root)
    pivot_root(".", ".")
    umount(".", MNT_DETACH)


def _pass_gate(tie: socket.socket) -> None:
    """Wait until our pid is on disk. A supervisor that dies before opens nothing, and there is nothing to do."""
    if not tie.recv(1):
        os._exit(NOT_EXECUTED)


def _execute(orders: Orders) -> NoReturn:
    order = orders.start
    environment = layout.environment(systemd=order.systemd, uuid=orders.uuid)
    try:
        os.fchmod(1, output.EXECUTED)
        os.execve(order.argv[0], order.argv, environment | order.environment)
    except OSError as error:
        os.fchmod(1, output.UNEXECUTED)
        raise command.explain(os.open("/", os.O_PATH | os.O_DIRECTORY), order.argv, error) from None
