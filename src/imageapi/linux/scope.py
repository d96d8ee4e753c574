"""The transient scope: where systemd runs the host, what must outlive our service is put into a unit of its own.

systemd ends with a service all that is in its control group, and does not like to start one again whose group has
others below it. A scope is a unit of processes that were there before; this one has its group to itself
(systemd.scope(5), Delegate= in systemd.resource-control(5)). It is made by the bus call StartTransientUnit
(org.freedesktop.systemd1(5)) with its first process, and goes with its last; whoever comes in between enters its group.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Iterator
from typing import Any

from imageapi.linux import mountinfo
from imageapi.linux.killable import call
from imageapi.linux.systemd import booted

SLICE = "imageapi.slice"
"""Its drop-ins are where an administrator gives all containers of a host a share, or a limit."""
STOPPED_BEFORE = ("imageapi-containers.service",)
"""The unit that ends containers in peace when the host goes down: the scope goes after it."""
STOPPED_AFTER = ("network.target", "network-online.target", "remote-fs-pre.target", "dbus.service")
"""What the processes need to the end: it goes after the scope."""
PRIVATE_BUS = b"unix:path=/run/systemd/private"
"""Where systemd itself listens, for root, as it does for systemctl(1): there may be no message bus."""
PATIENCE = 3.0
"""Seconds that systemd may take."""
LOOK = 0.005
"""Seconds between two looks."""
STOP_TIMEOUT = 30.0
"""Seconds from SIGTERM to SIGKILL at the end of a host that does not stop containers in peace."""
NO_LIMIT = 2**64 - 1


def join(name: str, pid: int) -> None:
    """Have the process in the scope `name`, with all its threads; its children to come are in it, too. Nothing is done
    where systemd does not run the host.

    Raises: OSError; TimeoutError.
    """
    if not booted():
        return
    deadline = time.monotonic() + PATIENCE
    while not (_is_in(name, pid) or _enter(name, pid)):
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"systemd has not made it within {PATIENCE:g}s", name)
        with contextlib.suppress(FileExistsError):  # it is just going, or just coming
            call(lambda: _start(name, pid), PATIENCE, name)
        time.sleep(LOOK)


def _is_in(name: str, pid: int) -> bool:
    with open(f"/proc/{pid}/cgroup") as file:
        return f"/{name}" in file.read()


def _enter(name: str, pid: int) -> bool:
    """Enter the scope's group in every hierarchy; False when there is none."""
    entered = False
    for directory in _groups(name):
        try:
            with open(f"{directory}/cgroup.procs", "w") as file:
                file.write(str(pid))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
        else:
            entered = True
    return entered


def _groups(name: str) -> Iterator[str]:
    for mount in mountinfo.read():
        if mount.fstype in ("cgroup", "cgroup2") and mount.root == "/":
            directory = f"{mount.mountpoint}/{SLICE}/{name}"
            if os.path.isdir(directory):
                yield directory


# ------------------------------------------------------------------------------------------------ the bus call


class _BusError(ctypes.Structure):
    """sd_bus_error of sd-bus-protocol.h."""

    _fields_ = (("name", ctypes.c_char_p), ("message", ctypes.c_char_p), ("need_free", ctypes.c_int))


def _start(name: str, pid: int) -> None:
    """Make the scope, with the process in it. In a process that is over afterwards: the library is large.

    Raises: OSError.
    """
    library = ctypes.CDLL("libsystemd.so.0")
    bus = ctypes.c_void_p()
    _check(library.sd_bus_new(ctypes.byref(bus)))
    _check(library.sd_bus_set_address(bus, PRIVATE_BUS))
    _check(library.sd_bus_start(bus))
    properties = _properties(pid)
    _check(
        library.sd_bus_call_method(
            *(bus, b"org.freedesktop.systemd1", b"/org/freedesktop/systemd1", b"org.freedesktop.systemd1.Manager"),
            *(b"StartTransientUnit", ctypes.byref(_BusError()), None, b"ssa(sv)a(sa(sv))", name.encode(), b"fail"),
            *(ctypes.c_uint(len(properties)), *(word for one in properties for word in one), ctypes.c_uint(0)),
        )
    )


def _properties(pid: int) -> list[tuple[Any, ...]]:
    """Each as sd_bus_message_append(3) takes it: its name, its type, its value."""
    return [
        (b"Description", b"s", b"Containers and storage helpers of ImageAPI"),
        (b"Slice", b"s", SLICE.encode()),
        (b"PIDs", b"au", ctypes.c_uint(1), ctypes.c_uint(pid)),
        (b"Delegate", b"b", ctypes.c_int(1)),
        (b"TasksMax", b"t", ctypes.c_uint64(NO_LIMIT)),
        (b"TimeoutStopUSec", b"t", ctypes.c_uint64(int(STOP_TIMEOUT * 1e6))),
        (b"CollectMode", b"s", b"inactive-or-failed"),
        (b"Before", b"as", ctypes.c_uint(len(STOPPED_BEFORE)), *(unit.encode() for unit in STOPPED_BEFORE)),
        (b"After", b"as", ctypes.c_uint(len(STOPPED_AFTER)), *(unit.encode() for unit in STOPPED_AFTER)),
    ]


def _check(result: int) -> None:
    """sd-bus returns a negative errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
