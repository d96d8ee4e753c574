"""Jobs that go out together: each has its own result, and what is given up is never begun."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from imageapi.config import Site
from imageapi.drivers import progress
from imageapi.engine import pool as pooling
from imageapi.engine import worker, zygote
from imageapi.engine.graph import Graph
from imageapi.engine.jobs import GivenUp, Jobs
from imageapi.engine.pool import PER_STORE, Chain, Job, Pool
from imageapi.errors import Exhausted, Invalid, Problem, TimedOut
from imageapi.linux import memory, packet
from imageapi.records import Record
from imageapi.spec import Mount

pytestmark = pytest.mark.pure


class Host:
    """What the jobs of a test do, each by the name it is given."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.failing: set[str] = set()
        self.gates: dict[str, threading.Event] = {}
        self.reached: dict[str, threading.Event] = {}
        self.steps: dict[str, list[threading.Event]] = {}

    def hold(self, name: str) -> None:
        self.gates[name], self.reached[name] = threading.Event(), threading.Event()

    def let_go(self) -> None:
        """Hold nothing any more."""
        for gate in (*self.gates.values(), *(leave for steps in self.steps.values() for leave in steps)):
            gate.set()

    def do(self, site: Site, name: str) -> object:
        self.begun.append(name)
        if name in self.gates:
            self.reached[name].set()
            assert self.gates[name].wait(10)
        if name in self.failing:
            raise Invalid(f"{name} fails")
        if name in self.steps:
            self.go_step_by_step(name)
        return name.upper()

    def go_step_by_step(self, name: str) -> None:
        """Say how far it is, then wait for leave to go on: until there is no further step."""
        for number, leave in enumerate(self.steps[name]):
            progress.tell(f"step {number}", number, len(self.steps[name]))
            assert leave.wait(10)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    found = Host()
    monkeypatch.setitem(worker.JOBS, "do", found.do)
    yield found
    found.let_go()


def _fork_threads(control: socket.socket, serving: list[threading.Thread]) -> None:
    """A zygote whose workers are threads of this process."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not request:
            return
        assert request == zygote.WORKER
        channel = socket.socket(fileno=descriptors[0])
        serving.append(threading.Thread(target=_serve, args=(channel,)))
        serving[-1].start()


def _serve(channel: socket.socket) -> None:
    with channel, contextlib.suppress(BrokenPipeError, ConnectionResetError, SystemExit):  # it ends with its server
        worker.serve(channel, Site())


Scenario = Callable[[Pool, Jobs], Coroutine[Any, Any, None]]


def act(scenario: Scenario, timeout: float = 5.0) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    serving: list[threading.Thread] = []
    forker = threading.Thread(target=_fork_threads, args=(theirs, serving))
    forker.start()

    async def play() -> None:
        pool = Pool(ours, on_lost=lambda: None)
        try:
            await asyncio.wait_for(scenario(pool, Jobs(pool, Graph(), timeout)), 10)
        finally:
            pool.close()

    umask = os.umask(0o022)
    try:
        asyncio.run(play())
    finally:
        os.umask(umask)
        for thread in (forker, *serving):
            thread.join(10)
        theirs.close()


def chain(*names: str) -> list[Job]:
    return [Job("do", name) for name in names]


def test_each_job_has_its_result(host: Host) -> None:
    async def scenario(pool: Pool, jobs: Jobs) -> None:
        with jobs.series("local", chain("a", "b", "c")) as series:
            assert [await series.outcome() for _ in range(3)] == ["A", "B", "C"]
        assert host.begun == ["a", "b", "c"]

    act(scenario)


def test_what_follows_a_failure_is_not_begun(host: Host) -> None:
    host.failing.add("b")

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        with jobs.series("local", chain("a", "b", "c")) as series:
            assert await series.outcome() == "A"
            with pytest.raises(Invalid, match="b fails"):
                await series.outcome()
            with pytest.raises(GivenUp):
                await series.outcome()
        assert await jobs.run("local", Job("do", "d")) == "D"
        assert host.begun == ["a", "b", "d"]

    act(scenario)


def test_what_is_given_up_is_never_begun(host: Host) -> None:
    host.hold("a")

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        first, second = chain("a", "b")
        with jobs.series("local", [first, second]) as series:
            await asyncio.to_thread(host.reached["a"].wait)
            series.stop()
            assert second.result.cancelled()
            host.gates["a"].set()
            assert await series.outcome() == "A"
            with pytest.raises(GivenUp):
                await series.outcome()
        assert host.begun == ["a"]

    act(scenario)


def test_a_job_that_does_not_come_back_is_a_504(host: Host) -> None:
    host.hold("a")

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        first, second = chain("a", "b")
        with pytest.raises(TimedOut), jobs.series("local", [first, second]) as series:
            await series.outcome()
        assert second.result.cancelled()
        assert not first.result.done()
        host.gates["a"].set()
        assert await first.result == "A"
        assert host.begun == ["a"]

    act(scenario, timeout=0.05)


def _fill(pool: Pool, host: Host) -> list[Job]:
    """Jobs that hang on all places of the store `dead`."""
    hanging = chain(*(f"hangs{number}" for number in range(PER_STORE)))
    for job in hanging:
        host.hold(job.arguments[0])
        pool.submit(Chain("dead", [job]))
    return hanging


def test_a_store_has_its_places(host: Host) -> None:
    """What hangs on one store leaves others alone; what waits for a place can be taken back."""

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        hanging = _fill(pool, host)
        waiting, kept = Chain("dead", chain("w")), Chain("dead", chain("k"))
        [job, other] = [*waiting.jobs, *kept.jobs]
        pool.submit(waiting)
        pool.submit(kept)
        assert await jobs.run("local", Job("do", "x")) == "X"
        pool.give_up(waiting)
        assert job.result.cancelled()
        host.let_go()
        assert await other.result == "K"
        assert len([await one.result for one in hanging]) == PER_STORE
        assert "w" not in host.begun

    act(scenario)


def test_nothing_is_kept_of_a_store_of_which_nothing_is_done(host: Host) -> None:
    """There may be one with each request: a path, or a host."""

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        hanging = _fill(pool, host)
        waiting = Chain("dead", chain("w"))
        pool.submit(waiting)
        for number in range(3):
            assert await jobs.run(f"store {number}", Job("do", "x")) == "X"
        pool.give_up(waiting)
        pool.give_up(waiting)
        host.let_go()
        assert len([await one.result for one in hanging]) == PER_STORE
        assert not pool._busy
        assert not pool._queues

    act(scenario)


def test_who_gets_no_place_in_time_is_told_so(host: Host) -> None:
    """It is late like one that hangs, and not given up by its own request: that would be made again for ever."""

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        hanging = _fill(pool, host)
        with pytest.raises(TimedOut, match="others wait for dead"):
            await jobs.run("dead", Job("do", "late"))
        host.let_go()
        assert len([await one.result for one in hanging]) == PER_STORE
        assert "late" not in host.begun

    act(scenario, timeout=0.05)


def test_what_a_worker_declines_is_given_up_and_has_not_failed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has done one job and not begun the next when it sees that we hung up: those who share that one ask again."""
    host.hold("looks")
    given_up = worker._given_up

    def slowly(channel: socket.socket) -> bool:
        if host.begun:
            host.reached["looks"].set()
            assert host.gates["looks"].wait(10)
        return given_up(channel)

    monkeypatch.setattr(worker, "_given_up", slowly)

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        with jobs.series("local", chain("a", "b")) as series:
            assert await series.outcome() == "A"
            await asyncio.to_thread(host.reached["looks"].wait)
            series.stop()
            host.gates["looks"].set()
            with pytest.raises(GivenUp):
                await series.outcome()
        assert host.begun == ["a"]

    act(scenario)


@pytest.mark.parametrize("size", [packet.INLINE - 100, packet.INLINE, 10_000_000])
def test_a_job_and_its_result_may_have_any_size(host: Host, size: int) -> None:
    async def scenario(pool: Pool, jobs: Jobs) -> None:
        assert await jobs.run("local", Job("do", "x" * size)) == "X" * size
        assert await jobs.run("local", Job("do", "y")) == "Y"

    act(scenario)


def test_a_job_that_moves_is_not_late(host: Host) -> None:
    """Each of its steps takes half of the time that one may take: together they take longer."""
    host.steps["long"] = [threading.Event() for _ in range(3)]
    limit = 1.0

    async def go_on(job: Job) -> None:
        for number, leave in enumerate(host.steps["long"]):
            while job.progress is None or job.progress.done != number:
                await asyncio.sleep(0.01)
            await asyncio.sleep(limit / 2)
            leave.set()

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        [job] = chain("long")
        leading = asyncio.create_task(go_on(job))
        assert await jobs.run("local", job) == "LONG"
        await leading
        assert job.progress == progress.Progress("step 2", 2, 3)

    act(scenario, timeout=limit)


def test_how_far_a_long_job_is_stands_in_the_log_now_and_then(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    record = Record(id=3, spec=Mount(kind="uri"), token=1)

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        job = Job("acquire", record)
        job.hear(progress.Progress("fetching from here", 1, 4))
        assert caplog.messages == [], "what is soon over is not worth a line"
        monkeypatch.setattr(pooling, "LOGGED_EVERY", -1.0)
        job.hear(progress.Progress("fetching from here", 2, 4))
        job.hear(progress.Progress("mounting"))
        said = ["acquire of mount 3: fetching from here, 2 bytes of 4", "acquire of mount 3: mounting"]
        assert caplog.messages == said

    act(scenario)


def test_a_job_that_stands_still_is_late_and_leaves_off_when_it_goes_on(host: Host) -> None:
    host.steps["slow"] = [threading.Event(), threading.Event()]

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        [job] = chain("slow")
        with pytest.raises(TimedOut, match=r"stood still for 0\.1s, step 0"):
            await jobs.run("local", job)
        host.let_go()
        with pytest.raises(Problem, match="nobody waits for it"):
            await job.result

    act(scenario, timeout=0.1)


@pytest.mark.parametrize(("kills", "said"), [((3, 4), Exhausted), ((3, 3), Problem)])
def test_a_worker_that_ended_over_its_job_ended_for_lack_of_memory_or_not(
    host: Host, monkeypatch: pytest.MonkeyPatch, kills: tuple[int, int], said: type[Problem]
) -> None:
    """The kernel counts whom it kills; who that was it tells only the parent, which is not us."""
    counted = iter(kills)
    monkeypatch.setattr(memory, "oom_kills", lambda: next(counted))
    monkeypatch.setitem(worker.JOBS, "end", lambda *_: sys.exit())

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        with pytest.raises(Problem) as ended:
            await jobs.run("local", Job("end", None))
        assert type(ended.value) is said
        assert await jobs.run("local", Job("do", "y")) == "Y"

    act(scenario)


def test_without_the_process_that_forks_them_there_is_no_worker_and_no_supervisor(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks before the server has ended is told why, and what to do."""
    monkeypatch.setitem(globals(), "_fork_threads", lambda control, _: control.close())

    async def scenario(pool: Pool, jobs: Jobs) -> None:
        while not pool.lost:
            await asyncio.sleep(0.001)
        with pytest.raises(Problem, match="ask the next one again"):
            await jobs.run("local", Job("do", "x"))
        with pytest.raises(Problem, match="ask the next one again"):
            pool.start_supervisor()

    act(scenario)
