"""An engine without a kernel: the real graph and the real plan, whose steps succeed at once or as a test says."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from imageapi.engine.engine import Engine
from imageapi.engine.graph import Graph, Picture
from imageapi.engine.plan import Plan, plan
from imageapi.errors import Invalid, NotFound, Unsupported
from imageapi.records import AnyRecord, Facts, Key, Phase, Run
from imageapi.spec import Finding, Object, Progress
from pure.nests import answers


class MemoryEngine(Engine):
    """The five verbs of the engine, on records alone. `gate`, where one is set, is waited for by every create;
    `cancelled` is set when one was cancelled at it; `failure` is raised by every verb that changes."""

    def __init__(self) -> None:
        self._graph = Graph()
        self.gate: asyncio.Event | None = None
        self.arrived = asyncio.Event()
        self.cancelled = threading.Event()
        self.failure: Exception | None = None
        self.forced: list[bool] = []

    def picture(self, key: Key) -> Picture:
        return self._graph.picture(key)

    def pictures(self, collection: str) -> list[Picture]:
        return self._graph.pictures(collection)

    def named(self, name: str) -> Key:
        key = self._graph.named(name)
        if key is None:
            raise NotFound(f"there is no container named '{name}'")
        return key

    def progress(self) -> list[Progress]:
        return [Progress(collection="mount", kind="uri", step="waiting", since="2026-01-01T00:00:00Z")]

    async def check(self) -> list[Finding]:
        return [Finding(collection="mount", id=3, problem="it is gone", remedy="make it again")]

    async def create(self, thing: Object) -> Picture:
        self._fail()
        try:
            self.arrived.set()
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        planned = plan(thing, self._graph, self._token, answers)
        assert isinstance(planned, Plan)
        for record in planned.steps:
            self._make(record)
        planned.root.pinned = True
        return self.picture(planned.root.key)

    def _token(self) -> int:
        return len(self._graph.all()) + 1

    def _make(self, record: AnyRecord) -> None:
        record.phase = Phase.LIVE
        if record.key.collection == "container":
            record.run = Run(logfile=f"/run/logs/{record.id}.log", created_at="2026-01-01T00:00:00Z")
        elif record.key.collection == "mount":
            record.facts = Facts(mountpoint=f"/run/mounts/mount_{record.id}")
            if record.kind == "overlay":
                record.facts.upperdir = f"/run/mounts/upper_{record.id}"
                record.facts.workdir = f"/run/mounts/work_{record.id}"
        else:
            record.facts = Facts(device_file=f"/dev/loop{record.id}")
        self._graph.add(record)

    async def delete(self, key: Key, *, force: bool) -> Picture:
        self._fail()
        self.forced.append(force)
        last = self.picture(key)
        self._graph.remove(key)
        return last

    async def request_state(self, key: Key, state: str) -> Picture:
        self._fail()
        record: Any = self.picture(key).record
        if state == "paused":
            raise Unsupported("'paused' is not there yet")
        if state not in ("running", "exited"):
            raise Invalid(f"'{state}' cannot be asked for")
        record.run.state = {"exited": "stopping"}.get(state, state)
        return self.picture(key)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure
