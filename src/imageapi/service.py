"""What runs in the event loop: all wiring on one page."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Coroutine
from typing import Any

import uvloop

from imageapi import __version__
from imageapi.api.app import app
from imageapi.api.listen import Listeners
from imageapi.config import Config, Site
from imageapi.engine import rundir
from imageapi.engine.engine import Engine
from imageapi.engine.pool import Pool
from imageapi.engine.watch import Watch
from imageapi.errors import Problem
from imageapi.linux import memory

log = logging.getLogger("imageapi")


def run(config: Config, site: Site, control: socket.socket, inotify: int) -> None:
    """Serve until a signal says that it is enough. `control` is the zygote's socket, `inotify` an instance that the
    workers share (-1: none).

    Raises: errors.Problem; OSError.
    """
    uvloop.run(_serve(config, site, control, inotify))


async def _serve(config: Config, site: Site, control: socket.socket, inotify: int) -> None:
    stop = asyncio.Event()
    pool = Pool(control, on_lost=stop.set)
    watch = Watch(inotify)
    engine = Engine(config, site, pool, rundir.boot_id())
    listeners = Listeners(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await _unless(stop, engine.start(watch))
        _settle()
        log.info("imageapi-server %s listens on %s", __version__, ", ".join(listeners.names))
        await listeners.serve(app(engine, config), stop, memory.forget_code)
    finally:
        listeners.close()
        await engine.stop()
        watch.close()
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
