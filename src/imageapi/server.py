"""`imageapi-server`: the options, and all wiring on one page.

The order matters. The zygote is forked while this process is small and has one thread; what only the server needs is
imported after that, so that its memory is not the workers' and the supervisor's too.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn

from imageapi import __version__
from imageapi.config import Config, Site, parse
from imageapi.engine import rundir, zygote
from imageapi.errors import Problem
from imageapi.linux import memory

log = logging.getLogger("imageapi")

OLDEST_KERNEL = (5, 14)
"""RHEL 9's. Older ones lack what roots are built with (mount_setattr, 5.12) and how containers are killed."""


def main() -> NoReturn:
    """The whole life of the process. It leaves by os._exit: a thread that hangs must not keep it."""
    config = parse(sys.argv[1:], os.environ)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        _check_host()
        _raise_descriptor_limit()
        site, workers_lock = rundir.prepare(config)
        control = zygote.launch(site, keep=[workers_lock])
        os.close(workers_lock)
        _run(_serve(config, site, control))
    except (Problem, OSError) as problem:
        print(f"imageapi-server: {problem}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _check_host() -> None:
    """Raises: Problem, when nothing could work here."""
    if os.geteuid() != 0:
        raise Problem("it mounts, attaches and makes namespaces, and so must run as root")
    release = os.uname().release
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    if version < OLDEST_KERNEL:
        raise Problem(f"kernel {release} is too old; it needs {'.'.join(map(str, OLDEST_KERNEL))} or newer")


def _raise_descriptor_limit() -> None:
    """Each container costs the supervisor a few descriptors; containers themselves get the usual limits."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run(service: Coroutine[Any, Any, None]) -> None:
    import uvloop

    uvloop.run(service)


async def _serve(config: Config, site: Site, control: socket.socket) -> None:
    from imageapi.api.app import app
    from imageapi.api.listen import Listeners
    from imageapi.engine.engine import Engine
    from imageapi.engine.pool import Pool

    stop = asyncio.Event()
    pool = Pool(control, on_lost=stop.set)
    engine = Engine(config, site, pool, rundir.boot_id())
    listeners = Listeners(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await _unless(stop, engine.start())
        _settle()
        log.info("imageapi-server %s listens on %s", __version__, ", ".join(listeners.names))
        await listeners.serve(app(engine, config), stop)
    finally:
        listeners.close()
        await engine.stop()
    if pool.lost:
        raise Problem("the process that its workers are forked from has ended; start it again: it goes on where it was")


def _settle() -> None:
    """What is there now stays: the collector of garbage need not look at it again, and what was needed only to start
    is let go."""
    gc.collect()
    gc.freeze()
    memory.forget_code()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, but leave off when `stop` comes first."""
    working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if working.done():
        working.result()
    working.cancel()


if __name__ == "__main__":
    main()
