"""What is lost with its storage helper, and mended: what is said of it meanwhile."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imageapi.engine import endings, mending
from imageapi.engine.engine import Engine
from imageapi.errors import Conflict, Invalid, Problem, TimedOut
from imageapi.linux import pidfd
from imageapi.records import AnyRecord, Facts, Helper, Key, Phase, Run
from imageapi.runtime.clock import now
from imageapi.runtime.protocol import Ended
from pure.nests import container, loopback, on, overlay
from pure.slow_kernel import SlowKernel, Supervisor, act, gone

pytestmark = pytest.mark.pure

IMAGE = Key("attach", 0)
MOUNT = Key("mount", 0)
GONE, HERE = Helper(pid=1, start_time=-1), Helper(os.getpid(), pidfd.start_time(os.getpid()) or 0)
"""A storage helper that has ended, and one that lives."""


async def lost(engine: Engine) -> AnyRecord:
    """An image whose storage helper has ended."""
    await engine.create(on(loopback("/image")))
    record = engine._graph.get(IMAGE)
    record.facts = Facts(device_file="/dev/loop0", helper=GONE)
    assert engine._mender.is_lost(record)
    return record


async def says(record: AnyRecord, text: str | None) -> None:
    """Wait until the object has this problem."""
    while record.problem != text:
        await asyncio.sleep(0)


@pytest.mark.parametrize("reason", [TimedOut("its store is away"), Conflict("it is another image now")])
def test_why_something_is_not_mended_is_said_until_it_is(tmp_path: Path, reason: Problem) -> None:
    """However often somebody finds out that its helper has ended."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.failures["mend", IMAGE] = reason
        record = await lost(engine)
        await says(record, reason.message)
        assert engine._mender.is_lost(record)
        assert record.problem == reason.message
        await engine.delete(MOUNT, force=False)
        await gone(engine, kernel)

    act(scenario, tmp_path)


def test_a_helper_that_ends_when_it_has_just_been_replaced_is_replaced_again(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.mended += [Facts(helper=GONE), Facts(helper=HERE)]
        record = await lost(engine)
        await says(record, None)
        assert record.facts.helper == HERE
        engine._mender.close()

    act(scenario, tmp_path)


def test_what_waits_for_something_else_is_not_said_to_be_in_the_making(tmp_path: Path) -> None:
    """An image that is just being mended goes when that has come back."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(on(loopback("/image")))
        kernel.mended.append(Facts())
        kernel.hold("mend", IMAGE)
        with pytest.raises(TimedOut):
            await engine._jobs.drive("mend", engine._graph.get(IMAGE))
        await engine.delete(MOUNT, force=False)
        assert "not come back from what was asked of it before" in (engine.picture(IMAGE).record.problem or "")
        kernel.let_go("mend", IMAGE)
        await gone(engine, kernel)

    act(scenario, tmp_path, timeout=0.05)


def test_who_gives_up_what_was_written_is_told_of_whom_else_that_concerns(tmp_path: Path) -> None:
    """A helper may serve several images."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        first, second = [await engine.create(loopback(name, ro=False)) for name in ("/one", "/two")]
        for made in (first, second):
            engine._graph.get(made.record.key).facts = Facts(device_file="/dev/loop0", helper=HERE)
        told = engine._jobs.giving_up(engine._graph.get(first.record.key))
        assert f"'kill -9 {HERE.pid}' (its storage helper, and that of attach 1" in told

    act(scenario, tmp_path)


@pytest.mark.parametrize("bereft", [True, False])
def test_an_end_for_lack_of_the_image_says_so_also_when_that_is_mended_by_then(bereft: bool) -> None:
    run = Run(logfile="/log", created_at="2026-01-01T00:00:00Z")
    assert "SIGBUS: a page of a file could not be had" in endings.complaint(run, 128 + signal.SIGBUS, bereft=bereft)


def test_a_release_that_hangs_is_not_begun_again_when_its_store_is_found_silent(tmp_path: Path) -> None:
    """Else each try would take another of the store's places, and all would go on at once in the end."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        made = await engine.create(loopback("/image", ro=False))
        engine._graph.get(IMAGE).facts = Facts(device_file="/dev/loop0", helper=HERE)
        kernel.hold("release", IMAGE)
        with pytest.raises(TimedOut):
            await engine.delete(made.record.key, force=False)
        await kernel.begun("sever", IMAGE)
        while "not come back" not in (engine.picture(IMAGE).record.problem or ""):
            await asyncio.sleep(0.01)
        assert kernel.count("release", IMAGE) == 1
        kernel.let_go("release", IMAGE)
        await gone(engine, kernel)

    act(scenario, tmp_path, timeout=0.05)


@pytest.mark.parametrize("deleted_first", [False, True])
def test_what_waits_to_be_mended_is_not_when_it_is_deleted(tmp_path: Path, deleted_first: bool) -> None:
    """A delete and the mending wait for the same job, and hear of its end together."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        made = await engine.create(loopback("/image"))
        record = engine._graph.get(IMAGE)
        record.facts = Facts(device_file="/dev/loop0", helper=GONE)
        kernel.hold("observe", IMAGE)
        looking = asyncio.create_task(engine._jobs.drive("observe", record))
        await kernel.begun("observe", IMAGE)
        deletes: list[asyncio.Task[Any]] = []
        for deleted in (deleted_first, not deleted_first):
            if deleted:
                deletes.append(_delete(engine, made.record.key))
            else:
                engine._mender.is_lost(record)
            for _ in range(5):
                await asyncio.sleep(0)
        kernel.hold("release", IMAGE)
        kernel.let_go("observe", IMAGE)
        await looking
        await kernel.begun("release", IMAGE)
        for _ in range(20):
            await asyncio.sleep(0)
        assert kernel.count("mend", IMAGE) == 0
        kernel.let_go("release", IMAGE)
        await asyncio.gather(*deletes)
        await gone(engine, kernel)

    act(scenario, tmp_path)


def _delete(engine: Engine, key: Key) -> asyncio.Task[Any]:
    return asyncio.create_task(engine.delete(key, force=False))


@pytest.mark.parametrize("reason", [errno.EMFILE, errno.ENOMEM, errno.ENOENT, errno.EINVAL])
def test_a_create_is_undone_also_when_nobody_can_tell_whether_its_helper_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.hold("acquire", MOUNT)
        kernel.failures["acquire", MOUNT] = Invalid("no file system")
        creating = asyncio.create_task(engine.create(on(loopback("/image"))))
        await kernel.begun("acquire", MOUNT)
        while engine._graph.get(IMAGE).phase is not Phase.LIVE:
            await asyncio.sleep(0)
        engine._graph.get(IMAGE).facts = Facts(device_file="/dev/loop0", helper=HERE)
        _refuse(monkeypatch, reason)
        kernel.let_go("acquire", MOUNT)
        with pytest.raises(Invalid):
            await creating
        await gone(engine, kernel)

    act(scenario, tmp_path)


def test_a_helper_that_cannot_be_watched_now_is_watched_as_soon_as_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mending, "LAST_RETRY", 0.01)

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(loopback("/image"))
        record = engine._graph.get(IMAGE)
        record.facts = Facts(device_file="/dev/loop0", helper=HERE)
        with monkeypatch.context() as shortage:
            _refuse(shortage, errno.EMFILE)
            assert engine._mender.watch(record)
            assert not engine._mender.is_lost(record)
        while HERE not in engine._mender._watched:
            await asyncio.sleep(0.01)
        engine._mender.close()

    act(scenario, tmp_path)


def test_whether_a_helper_lives_is_asked_without_leaving_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(pidfd, "start_time", _raise(errno.EMFILE))
    assert mending._lives(HERE)
    assert os.listdir("/proc/self/fd") == before


def _refuse(monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    """From now on no pidfd can be had."""
    monkeypatch.setattr(pidfd, "pidfd_open", _raise(reason))


def _raise(reason: int) -> Callable[[int], int]:
    def fail(pid: int) -> int:
        raise OSError(reason, os.strerror(reason))

    return fail


def test_what_a_refused_delete_leaves_is_mended_if_its_helper_has_ended_meanwhile(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(loopback("/image"))
        record = engine._graph.get(IMAGE)
        record.facts = Facts(device_file="/dev/loop0", helper=HERE)
        kernel.mended.append(Facts(helper=HERE))
        kernel.failures["release", IMAGE] = Conflict("it is busy")
        kernel.hold("release", IMAGE)
        deleting = _delete(engine, IMAGE)
        await kernel.begun("release", IMAGE)
        engine._mender.lose(record, "its store did not answer")
        kernel.let_go("release", IMAGE)
        with pytest.raises(Conflict, match="busy"):
            await deleting
        await kernel.begun("mend", IMAGE)
        await says(record, None)
        assert (record.phase, record.pinned) == (Phase.LIVE, True)
        engine._mender.close()

    act(scenario, tmp_path)


def test_what_is_mended_while_its_delete_is_refused_is_so_in_the_end(tmp_path: Path) -> None:
    """Its store was silent, and its helper never ended: nobody else would say that all is well."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(loopback("/image"))
        record = engine._graph.get(IMAGE)
        record.facts = Facts(device_file="/dev/loop0", helper=HERE)
        kernel.mended += [Facts(helper=HERE), Facts(helper=HERE)]
        kernel.failures["release", IMAGE] = Conflict("it is busy")
        kernel.hold("mend", IMAGE)
        engine._mender.lose(record, "its store did not answer")
        await kernel.begun("mend", IMAGE)
        deleting = _delete(engine, IMAGE)
        while record.phase is not Phase.RELEASING:
            await asyncio.sleep(0)
        kernel.let_go("mend", IMAGE)
        with pytest.raises(Conflict, match="busy"):
            await deleting
        await says(record, None)
        assert not engine._mender.is_lost(record)
        engine._mender.close()

    act(scenario, tmp_path)


def test_nothing_is_kept_of_an_object_that_is_gone(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.failures["mend", IMAGE] = Conflict("it is another image now")
        record = await lost(engine)
        await says(record, "it is another image now")
        record.facts = Facts(device_file="/dev/loop0", helper=HERE)
        assert engine._mender.watch(record)
        await engine.delete(MOUNT, force=False)
        await gone(engine, kernel)
        mender = engine._mender
        assert not any((mender._told, mender._hopeless, mender._aside, mender._watched, mender._lost))

    act(scenario, tmp_path)


@pytest.mark.parametrize("forced", [True, False], ids=["deleted by force", "stopped"])
def test_containers_that_wait_for_the_same_silent_image_are_cut_off_when_all_are_being_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    """Each of them alone would wait for the other."""
    monkeypatch.setattr(mending, "PATIENCE", 0.05)

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        mount = on(loopback("/image"))
        boxes = [(await engine.create(container(overlay(mount)))).record for _ in range(2)]
        supervisor = Supervisor(engine, 0)
        for box in boxes:
            await engine.request_state(box.key, "running")
        record = engine._graph.get(IMAGE)
        record.facts = Facts(device_file="/dev/loop0", helper=HERE)
        assert engine._mender.watch(record)

        async def end(box: AnyRecord) -> None:
            if forced:
                await engine.delete(box.key, force=True)
            else:
                engine._graph.get(box.key).run.start_time = 0  # type: ignore[union-attr]
                await engine.request_state(box.key, "exited")

        first = asyncio.create_task(end(boxes[0]))
        await asyncio.sleep(0.2)
        assert kernel.count("sever", IMAGE) == 0
        second = asyncio.create_task(end(boxes[1]))
        await kernel.begun("sever", IMAGE)
        for box in boxes:
            engine._containers._on_ended(Ended(box.id, 1, 137, now()))
        await asyncio.gather(first, second)
        assert {call[:2] for call in supervisor.calls} >= {("kill", 0), ("kill", 1)}
        engine._mender.close()

    act(scenario, tmp_path)
