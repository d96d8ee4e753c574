"""A pool whose jobs wait and fail as a test says, and an engine on it: the real graph, records and plans."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from imageapi.config import Config
from imageapi.engine.engine import Engine
from imageapi.engine.jobs import RELEASES
from imageapi.engine.pool import Chain, Job, Pool
from imageapi.errors import NotFound, Problem, TimedOut
from imageapi.records import Facts, Key
from imageapi.runtime.protocol import Start, Started

Step = tuple[str, Key]


class SlowKernel(Pool):
    """Does each job at once, unless `hold` was called for it, and fails it when `failures` has something for it."""

    def __init__(self) -> None:
        self.lost = False
        self.failures: dict[Step, Exception] = {}
        self.standing: set[Key] = set()
        self.released: list[Key] = []
        self.mended: list[Facts] = []
        """What comes of each mending, in their order."""
        self._chains: list[Chain] = []
        self._gates: dict[Step, asyncio.Event] = {}
        self._begun: Counter[Step] = Counter()
        self._doing: set[asyncio.Task[None]] = set()

    def hold(self, verb: str, key: Key) -> None:
        """Let this job wait until `let_go`."""
        self._gates[verb, key] = asyncio.Event()

    def let_go(self, verb: str, key: Key) -> None:
        self._gates.pop((verb, key)).set()

    async def begun(self, verb: str, key: Key, times: int = 1) -> None:
        """Wait until the job has begun, for so many objects of the key."""
        while self._begun[verb, key] < times:
            await asyncio.sleep(0)

    def count(self, verb: str, key: Key) -> int:
        """How often the job has begun."""
        return self._begun[verb, key]

    def run_on(self) -> None:
        """Have all that is not held done at once, and heard of at once, as when the event loop was busy meanwhile."""
        for chain in self._chains:
            while chain.jobs and _step(chain.jobs[0]) not in self._gates:
                self._settle(chain)

    def submit(self, chain: Chain) -> None:
        self._chains.append(chain)
        doing = asyncio.create_task(self._do(chain))
        self._doing.add(doing)
        doing.add_done_callback(self._doing.discard)

    def give_up(self, chain: Chain) -> None:
        chain.cancel_from(1)

    async def _do(self, chain: Chain) -> None:
        while chain.jobs:
            job = chain.jobs[0]
            self._begun[_step(job)] += 1
            if (gate := self._gates.get(_step(job))) is not None:
                await gate.wait()
            if chain.jobs and chain.jobs[0] is job:
                self._settle(chain)
            await asyncio.sleep(0)

    def _settle(self, chain: Chain) -> None:
        job = chain.jobs.popleft()
        if (failure := self.failures.get(_step(job))) is not None:
            chain.fail(job, failure)
        else:
            job.result.set_result(self._perform(*_step(job)))

    def _perform(self, verb: str, key: Key) -> Any:
        if verb == "mend":
            return self.mended.pop(0), None
        if verb == "acquire":
            self.standing.add(key)
        elif verb == "release":
            self.standing.discard(key)
            self.released.append(key)
        return Facts(mountpoint=f"/mounts/{key.id}") if key in self.standing else None


SYNC: Step = "sync", Key("mount", -1)
"""That what a container wrote reaches its store: whose it is, is not told."""


def _step(job: Job) -> Step:
    name = "release" if job.name in RELEASES else job.name
    return SYNC if job.about is None else (name, job.about.key)


class Supervisor:
    """One that fails the first `failures` calls of each verb as if it hung, and then does nothing but note them. Once
    it has `lost` its containers it can kill none; while it is `unheard` nobody can ask it to."""

    def __init__(self, engine: Engine, failures: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.lost = False
        self.unheard: Problem | None = None
        self._failures = failures
        containers: Any = engine._containers
        containers._supervisor = containers._stopper._supervisor = containers._starts._supervisor = self

    async def start(self, order: Start, directory: str) -> Started:
        self._call("start", order.id, order.attempt)
        return Started(order.id, order.attempt, os.getpid(), 0)

    async def kill(self, container: int, attempt: int) -> None:
        if self.unheard is not None:
            raise self.unheard
        self._call("kill", container, attempt)
        if self.lost:
            raise NotFound(f"container {container} has no start {attempt}")

    async def undo(self, container: int, attempt: int, timeout: float) -> None:
        self._call("undo", container, attempt)

    async def forget(self, container: int, attempt: int) -> None:
        await asyncio.sleep(0.01)
        self._call("forget", container, attempt)

    def _call(self, *call: Any) -> None:
        self.calls.append(call)
        if sum(other[0] == call[0] for other in self.calls) <= self._failures:
            raise TimedOut(f"no answer to {call}")


def engine_on(kernel: SlowKernel, directory: Path, timeout: float = 5.0) -> Engine:
    """An engine whose records are under `directory`; its steps may take `timeout` seconds."""
    (directory / "logs").mkdir()
    config = Config(run_dir=str(directory), operation_timeout=timeout, cleanup_timeout=timeout)
    return Engine(config, config.site("test"), kernel, "boot")


def everything(engine: Engine) -> list[Key]:
    """The objects that are shown."""
    return [picture.record.key for collection in ("attach", "mount") for picture in engine.pictures(collection)]


Scenario = Callable[[Engine, SlowKernel], Coroutine[Any, Any, None]]


def act(scenario: Scenario, directory: Path, timeout: float = 5.0) -> None:
    """Play a scenario on an engine of its own; it may take ten seconds."""

    async def play() -> None:
        kernel = SlowKernel()
        await asyncio.wait_for(scenario(engine_on(kernel, directory, timeout), kernel), 10)

    asyncio.run(play())


async def gone(engine: Engine, kernel: SlowKernel) -> None:
    """Wait until nothing is left of anything."""
    while kernel.standing or everything(engine) or engine._graph.all():
        await asyncio.sleep(0)
