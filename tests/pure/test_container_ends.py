"""How containers come to their end, and what is said of it and of their logs, also by the next server."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from imageapi.engine import lives
from imageapi.engine.engine import Engine
from imageapi.engine.starts import Starts
from imageapi.errors import Problem, TimedOut
from imageapi.linux import pidfd
from imageapi.linux.libc import SYS_rt_sigtimedwait
from imageapi.records import AnyRecord, Key, Run
from imageapi.runtime import clock
from imageapi.runtime.protocol import Ended, Life, LogTrouble
from pure.nests import container, loopback, on, overlay
from pure.slow_kernel import SYNC, SlowKernel, Supervisor, act, engine_on, gone

pytestmark = pytest.mark.pure

BOX = Key("container", 0)
WRITABLE = on(loopback("/image", ro=False), "ext4")


async def started(engine: Engine, mount: Any = None) -> tuple[AnyRecord, Run, Supervisor]:
    """A container that runs: its process is this one."""
    record = (await engine.create(container(mount or overlay(on(loopback("/image")))))).record
    supervisor = Supervisor(engine, 0)
    await engine.request_state(BOX, "running")
    assert record.run is not None
    return record, record.run, supervisor


async def until_dead(run: Run) -> None:
    while run.state != "dead":
        await asyncio.sleep(0)


def test_a_delete_waits_for_what_was_written_and_says_so(tmp_path: Path) -> None:
    """The process is not blamed, which has ended."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await started(engine, WRITABLE)
        kernel.hold(*SYNC)
        deleting = asyncio.create_task(engine.delete(BOX, force=True))
        await asyncio.sleep(0)
        engine._containers._on_ended(Ended(0, 1, 137, clock.now()))
        with pytest.raises(TimedOut, match=r"has ended, but what it wrote to mount 0 \(attach\) is still being synced"):
            await deleting
        kernel.let_go(*SYNC)
        await gone(engine, kernel)

    act(scenario, tmp_path, timeout=0.1)


def test_why_it_died_is_told_also_when_what_it_wrote_is_lost(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        record, run, _ = await started(engine, WRITABLE)
        kernel.failures[SYNC] = Problem("input/output error")
        engine._containers._on_ended(Ended(0, 1, 3, clock.now()))
        await until_dead(run)
        assert "exited with status 3" in (record.problem or "")
        assert "may not have reached its store: input/output error" in (record.problem or "")

    act(scenario, tmp_path)


def test_when_it_ended_is_the_time_that_the_supervisor_tells(tmp_path: Path) -> None:
    """Also when that was before we knew that it had begun."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        at = clock.now()
        _, run, _ = await started(engine)
        engine._containers._on_ended(Ended(0, 1, 3, at))
        await until_dead(run)
        assert (run.started_at, run.finished_at) == (at, at)

    act(scenario, tmp_path)


def test_when_it_began_is_told_by_the_kernel_after_a_crash_over_its_start(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        record = (await engine.create(container(overlay(on(loopback("/image")))))).record
        began = pidfd.start_time(os.getpid()) or 0
        record.run = Run(created_at="2020-01-01T00:00:00.000000Z", attempt=1)
        assert engine._containers._adopt(record, Life(id=0, attempt=1, pid=os.getpid(), start_time=began))
        assert record.run.started_at is not None
        assert record.run.started_at[:18] in {lives.time_of(began + late)[:18] for late in (-100, 0, 100)}

    act(scenario, tmp_path)


# ------------------------------------------------------------------------------------------------------- its log


def test_trouble_with_a_log_is_told_and_taken_back(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        record, _, _ = await started(engine)
        for trouble in (errno.ENOSPC, errno.EROFS):
            engine._containers._on_log(LogTrouble(0, 1, trouble))
            assert (record.problem or "").startswith("lines of its log are lost: ")
        engine._containers._on_log(LogTrouble(0, 1, 0))
        assert record.problem is None

    act(scenario, tmp_path)


def test_what_is_wrong_besides_is_not_taken_for_trouble_with_the_log(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        record, _, _ = await started(engine)
        record.problem = "mount 1 (overlay), which it needs, is gone from the kernel"
        for trouble in (errno.ENOSPC, 0):
            engine._containers._on_log(LogTrouble(0, 1, trouble))
            assert record.problem == "mount 1 (overlay), which it needs, is gone from the kernel"

    act(scenario, tmp_path)


def test_a_server_hears_of_trouble_with_a_log_that_began_or_ended_before_it(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        record, run, _ = await started(engine)
        for trouble in (errno.ENOSPC, 0):
            life = Life(id=0, attempt=run.attempt, pid=os.getpid(), start_time=0, log_trouble=trouble)
            assert engine._containers._adopt(record, life)
            assert (record.problem is not None) == bool(trouble)

    act(scenario, tmp_path)


def test_a_supervisor_that_knows_nothing_of_a_log_takes_nothing_back(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        record, run, _ = await started(engine)
        engine._containers._on_log(LogTrouble(0, 1, errno.ENOSPC))
        life = Life(id=0, attempt=run.attempt, pid=os.getpid(), start_time=0, log_trouble=None)
        assert engine._containers._adopt(record, life)
        assert (record.problem or "").startswith("lines of its log are lost: ")

    act(scenario, tmp_path)


# ------------------------------------------------------------------------------------------------ the next server


def test_why_a_container_is_dead_is_known_to_the_next_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the reason may be one of something else, which would be found out again."""
    reason = "attach 0 (loopback), which it needs, does not work"

    async def refuse(self: Starts, *anything: Any) -> None:
        raise Problem(reason)

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        monkeypatch.setattr(Starts, "_execute", refuse)
        await engine.create(container(overlay(on(loopback("/image")))))
        with pytest.raises(Problem):
            await engine.request_state(BOX, "running")
        (tmp_path / "logs").rename(tmp_path / "old")
        after = engine_on(kernel, tmp_path)
        after._reconciler._load()
        assert after.picture(BOX).record.problem == f"it could not be started: {reason}"

    act(scenario, tmp_path)


# -------------------------------------------------------------------------------------------------------- a stop


def test_the_time_until_it_is_killed_counts_from_the_request(tmp_path: Path) -> None:
    """Whichever server goes on with it."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        record, run, supervisor = await started(engine)
        run.state, run.stop_requested = "stopping", True
        run.stop_asked = lives.since_boot() - engine._containers._stop_timeout
        life = Life(id=0, attempt=run.attempt, pid=os.getpid(), start_time=0)
        assert engine._containers._adopt(record, life)
        while ("kill", 0, run.attempt) not in supervisor.calls:
            await asyncio.sleep(0)
        assert not [call for call in supervisor.calls if call[0] == "signal"]

    act(scenario, tmp_path)


def test_a_process_of_which_nothing_can_be_learnt_is_killed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pid: int, number: int) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        monkeypatch.setattr(pidfd, "catches", fail)
        monkeypatch.setattr("imageapi.engine.containers.ASK_AGAIN", 0.001)
        engine._containers._stopper._timeout = 0.05
        _, run, supervisor = await started(engine)
        await engine.request_state(BOX, "exited")
        while ("kill", 0, run.attempt) not in supervisor.calls:
            await asyncio.sleep(0.001)

    act(scenario, tmp_path)


def test_a_thread_whose_memory_cannot_be_read_is_not_known_to_wait_for_a_signal(tmp_path: Path) -> None:
    (tmp_path / "syscall").write_text(f"{SYS_rt_sigtimedwait} 0x1000 0x0\n")
    (tmp_path / "mem").mkdir()
    assert not pidfd._awaits(str(tmp_path), signal.SIGTERM)
