"""A container's life: made, started, stopped, ended, discarded.

The supervisor runs it and outlives this process; here is what it means. A container is started at most once at a time,
each start has a number (`attempt`) that is on disk before it is made, and every end is matched to its start by it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from datetime import UTC, datetime

from imageapi.config import Config
from imageapi.drivers.base import driver
from imageapi.engine.graph import describe, standing
from imageapi.engine.jobs import Jobs
from imageapi.engine.ledger import Ledger
from imageapi.engine.pool import Job, Pool
from imageapi.engine.stopping import Stopper
from imageapi.engine.tasks import Tasks
from imageapi.errors import Conflict, Problem, TimedOut
from imageapi.records import AnyRecord, Key, Phase, Run
from imageapi.runtime import command, logs
from imageapi.runtime.client import Supervisor
from imageapi.runtime.protocol import Ended, Start
from imageapi.spec import Attach, Bind, Container

log = logging.getLogger(__name__)

HALTED = (128 + 1, 128 + 2)
"""How a pid namespace ends whose first process called reboot(2): by SIGHUP to restart, by SIGINT to halt."""


def now() -> str:
    """The time as the API writes it: RFC 3339, in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Containers:
    """The containers of one engine."""

    def __init__(self, ledger: Ledger, jobs: Jobs, tasks: Tasks, pool: Pool, config: Config) -> None:
        self._ledger = ledger
        self._graph = ledger.graph
        self._jobs = jobs
        self._tasks = tasks
        self._pool = pool
        self._config = config
        self._starting: dict[Key, asyncio.Task[None]] = {}
        self._early: dict[Key, Ended] = {}
        self._ends: dict[Key, asyncio.Event] = {}
        self._supervisor = Supervisor(ledger.site, start=pool.start_supervisor, on_ended=self._on_ended)
        self._stopper = Stopper(self._supervisor, config.stop_timeout)

    def close(self) -> None:
        """Leave the supervisor, which goes on."""
        self._supervisor.close()
