"""The slim process that workers and the supervisor are forked from.

The server never forks: it has threads, listeners and locks. It starts this process before it has any of them, and asks
it over a socket. A worker is one process that does one job at a time and may hang in it; it holds nothing of the
server's, and dies with the zygote, which ends when the server's end of the socket is gone. The supervisor is forked
twice, so that it belongs to nobody and lives on.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

from imageapi.config import Site
from imageapi.drivers.base import driver
from imageapi.engine import worker
from imageapi.linux import memory, process
from imageapi.runtime import claim, supervisor

WORKER = b"worker"
SUPERVISOR = b"supervisor"
LOAD = b"load "
COMMON = (("attach", "loopback"), ("mount", "attach"), ("mount", "overlay"))
"""The kinds that hardly a node does without: the server shares what they have in memory, too."""


def launch(site: Site, keep: Iterable[int] = ()) -> socket.socket:
    """Fork the zygote, which keeps the descriptors `keep` and closes all others; the server's end of its socket.
    To be called while the process has a single thread."""
    for kind in COMMON:
        driver(*kind)
    _freeze()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _fork(lambda: _serve(theirs, site, keep))
    theirs.close()
    return ours


def _fork(child: Callable[[], object]) -> int:
    """Fork; the child runs `child` and ends. Returns its pid, in the parent."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        child()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _serve(control: socket.socket, site: Site, keep: Iterable[int]) -> None:
    """The zygote's life: one request a message, until the server's end is gone."""
    os.setsid()
    process.name("imageapi-zygote")
    process.close_all_but(control.fileno(), *keep)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        memory.rest_until_readable(control.fileno())
        request, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not request:
            return
        if request == SUPERVISOR:
            _fork_supervisor(site)
        elif request.startswith(LOAD):
            _load(request.removeprefix(LOAD).decode())
        for descriptor in descriptors:
            _fork_worker(control, socket.socket(fileno=descriptor), site)


def loading(collection: str, kind: str) -> bytes:
    """The request to have a driver ready in all workers to come: one that a node does not use costs it no memory."""
    return LOAD + f"{collection}/{kind}".encode()


def _load(name: str) -> None:
    try:
        driver(*name.split("/"))
    except Exception:  # a worker that needs it meets the same, and says so
        traceback.print_exc()
    _freeze()


def _freeze() -> None:
    """What has been imported stays shared by all that is forked, as far as nobody writes to it: the collector of
    garbage, which would, leaves it alone from now on."""
    gc.collect()
    gc.freeze()


def _fork_worker(control: socket.socket, channel: socket.socket, site: Site) -> None:
    def live() -> None:
        process.die_with_parent(signal.SIGKILL)
        process.name("imageapi-worker")
        control.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        worker.serve(channel, site)

    with channel:
        try:
            _fork(live)
        except OSError as error:
            with contextlib.suppress(OSError):
                channel.send(worker.failure(error, "starting a worker process"))


def _fork_supervisor(site: Site) -> None:
    def detach() -> None:
        os.setsid()
        _fork(live)

    def live() -> NoReturn:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        process.name(claim.NAME)
        supervisor.run(site)

    with contextlib.suppress(OSError):  # no process is left; the server asks again, until it gives up
        _fork(detach)
