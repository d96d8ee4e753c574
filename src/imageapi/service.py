"""What runs in the event loop: all wiring on one page."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import uvloop

from imageapi import __version__
from imageapi.api.app import app
from imageapi.api.listen import Listeners
from imageapi.config import Config, Site
from imageapi.engine import ceilings, rundir
from imageapi.engine.engine import Engine
from imageapi.engine.pool import Pool
from imageapi.engine.tasks import unless
from imageapi.engine.watch import Watch
from imageapi.errors import Problem
from imageapi.linux import memory
from imageapi.linux.systemd import Service, with_grace

log = logging.getLogger("imageapi")

BEATS = 3
"""How often systemd's watchdog is answered in the time that it allows."""
TOLD_AGAIN = 0.1
"""Seconds until systemd, which did not listen, is told again."""
LEEWAY = 15.0
"""Seconds that an end may take beyond the two that are chosen for it."""


class Given(NamedTuple):
    """What the process has made, or was given, before its event loop. `control` is the zygote's socket, `inotify` an
    instance that the workers share (-1: none), and `reread` says what a start with an environment file would choose
    now; see server."""

    control: socket.socket
    inotify: int
    systemd: Service
    reread: Callable[[str], Config]


def run(config: Config, site: Site, given: Given) -> None:
    """Serve until a signal says that it is enough.

    Raises: errors.Problem; OSError.
    """
    uvloop.run(_serve(config, site, given))


def shut_down(config: Config, site: Site, given: Given) -> None:
    """Stop all containers and release all storage.

    Raises: errors.Problem, when something is left; OSError.
    """
    uvloop.run(_shut_down(config, site, given.control))


async def _serve(config: Config, site: Site, given: Given) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    voice = _Voice(given.systemd, loop)
    end = partial(_end, config, voice, stop)
    pool = Pool(given.control, on_lost=end)
    watch = Watch(given.inotify)
    engine = Engine(config, site, pool, rundir.boot_id())
    listeners = Listeners(config, given.systemd.listeners)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, _reload, config, voice, given.reread)

    def rest() -> None:
        memory.forget_code()
        voice.say(f"STATUS={engine.summary()}")

    try:
        if await unless(stop, engine.start(watch)):
            ceilings.warn()
            _settle()
            log.info("imageapi-server %s listens on %s", __version__, ", ".join(listeners.names))
            voice.ready(f"STATUS={engine.summary()}")
            await listeners.serve(app(engine, config), stop, rest, in_vain=lambda: pool.lost)
    finally:
        listeners.close()
        await engine.stop()
        watch.close()
    if pool.lost:
        raise Problem("the process that its workers are forked from has ended; start it again: it goes on where it was")


async def _shut_down(config: Config, site: Site, control: socket.socket) -> None:
    engine = Engine(config, site, Pool(control, on_lost=lambda: None), rundir.boot_id())
    try:
        await engine.start()
        left = await engine.shut_down()
    finally:
        await engine.stop()
    if left:
        raise Problem(f"not all is released: {'; '.join(left)}")


def _end(config: Config, voice: _Voice, stop: asyncio.Event) -> None:
    if not stop.is_set():
        seconds = config.graceful_timeout + config.cleanup_timeout + LEEWAY
        voice.say("STOPPING=1", "STATUS=ends what is under way; containers run on", with_grace(seconds))
        stop.set()


def _reload(config: Config, voice: _Voice, reread: Callable[[str], Config]) -> None:
    """Take the log level of the environment file. For all else a start anew is as good, which no container notices."""
    voice.reloading()
    if config.environment_file is None:
        log.warning("SIGHUP: there is no --environment-file to read")
    else:
        try:
            level = reread(config.environment_file).log_level
        except (OSError, ValueError, SystemExit) as error:
            log.error("%s is not taken: %s", config.environment_file, error)
        else:
            logging.getLogger().setLevel(level)
            log.warning("the log level is %s now", logging.getLevelName(level))
    voice.ready()


class _Voice:
    """What systemd hears of us: when we are ready, and, where it asked for that, that our loop turns."""

    def __init__(self, systemd: Service, loop: asyncio.AbstractEventLoop) -> None:
        self._systemd = systemd
        self._loop = loop
        self._starting = True
        if systemd.watchdog:
            self._beat()

    def say(self, *words: str) -> None:
        """Something that may go unheard."""
        self._systemd.tell(*words)

    def reloading(self) -> None:
        self._systemd.reloading()

    def ready(self, *words: str) -> None:
        """It waits for this, so it is told until it hears."""
        self._starting = False
        if not self._systemd.tell("READY=1", f"MAINPID={os.getpid()}", *words):
            self._loop.call_later(TOLD_AGAIN, partial(self.ready, *words))

    def _beat(self) -> None:
        """A start takes as long as the storage of the last server's objects needs to answer."""
        pause = self._systemd.watchdog / BEATS
        self.say("WATCHDOG=1", *((with_grace(self._systemd.watchdog),) if self._starting else ()))
        self._loop.call_later(pause, self._beat)


def _settle() -> None:
    """What is there now stays: the collector of garbage need not look at it again, and what was needed only to start
    is let go."""
    gc.collect()
    gc.freeze()
    memory.forget_code()
