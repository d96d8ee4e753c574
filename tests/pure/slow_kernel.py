"""A pool whose jobs wait and fail as a test says, and an engine on it: the real graph, records and plans."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from imageapi.config import Config
from imageapi.engine.engine import Engine
from imageapi.engine.pool import Chain, Job, Pool
from imageapi.engine.worker import Descriptor
from imageapi.errors import TimedOut
from imageapi.records import Facts, Key
from imageapi.runtime.protocol import Start, Started

Step = tuple[str, Key]


class SlowKernel(Pool):
    """Does each job at once, unless `hold` was called for it, and fails it when `failures` has something for it."""

    def __init__(self) -> None:
        self.failures: dict[Step, Exception] = {}
        self.standing: set[Key] = set()
        self._gates: dict[Step, asyncio.Event] = {}
        self._begun: defaultdict[Step, asyncio.Event] = defaultdict(asyncio.Event)
        self._doing: set[asyncio.Task[None]] = set()

    def hold(self, verb: str, key: Key) -> None:
        """Let this job wait until `let_go`."""
        self._gates[verb, key] = asyncio.Event()

    def let_go(self, verb: str, key: Key) -> None:
        self._gates.pop((verb, key)).set()

    async def begun(self, verb: str, key: Key) -> None:
        """Wait until the job has begun."""
        await self._begun[verb, key].wait()

    def submit(self, chain: Chain) -> None:
        doing = asyncio.create_task(self._do(chain))
        self._doing.add(doing)
        doing.add_done_callback(self._doing.discard)

    def give_up(self, chain: Chain) -> None:
        chain.cancel_from(1)

    async def _do(self, chain: Chain) -> None:
        while chain.jobs:
            job = chain.jobs[0]
            step = job.name, _subject(job)
            self._begun[step].set()
            if (gate := self._gates.get(step)) is not None:
                await gate.wait()
            chain.jobs.popleft()
            if (failure := self.failures.get(step)) is not None:
                chain.fail(job, failure)
            else:
                job.result.set_result(self._perform(*step))
            await asyncio.sleep(0)

    def _perform(self, verb: str, key: Key) -> Facts | Descriptor | None:
        if verb == "open_root":
            return Descriptor(os.open("/", os.O_PATH))
        if verb == "acquire":
            self.standing.add(key)
        elif verb == "release":
            self.standing.discard(key)
        return Facts(mountpoint=f"/mounts/{key.id}") if key in self.standing else None


def _subject(job: Job) -> Key:
    assert job.about is not None
    return job.about.key


class Supervisor:
    """One that fails the first `failures` calls of each verb as if it hung, and then does nothing but note them."""

    def __init__(self, engine: Engine, failures: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._failures = failures
        containers: Any = engine._containers
        containers._supervisor = containers._stopper._supervisor = self

    async def start(self, order: Start, root: int) -> Started:
        self._call("start", order.id, order.attempt)
        return Started(order.id, order.attempt, os.getpid(), 0)

    async def kill(self, container: int, attempt: int) -> None:
        self._call("kill", container, attempt)

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
