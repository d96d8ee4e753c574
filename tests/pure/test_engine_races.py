"""Requests that meet in the middle of each other: whatever the order, what is said is so, and nothing is left over."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from imageapi.engine import apply
from imageapi.engine.engine import Engine
from imageapi.errors import Conflict, Invalid, NotFound, Problem, TimedOut
from imageapi.records import Key
from imageapi.spec import Mount
from imageapi.store import Store
from pure.nests import container, loopback, on, overlay
from pure.slow_kernel import SlowKernel, Supervisor, act, everything, gone

pytestmark = pytest.mark.pure

IMAGE = Key("attach", 0)
MOUNT = Key("mount", 0)
ROOT = Key("mount", 1)
BOX = Key("container", 0)


def nest(name: str = "/image") -> Any:
    return overlay(on(loopback(name)))


def test_what_a_cancelled_create_had_made_for_another_is_shown(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.hold("acquire", ROOT)
        first = asyncio.create_task(engine.create(nest()))
        await kernel.begun("acquire", ROOT)
        second = await engine.create(nest())
        assert everything(engine) == [IMAGE, MOUNT, second.record.key]
        first.cancel()
        kernel.let_go("acquire", ROOT)
        await asyncio.wait({first})
        while engine._graph.find(ROOT):
            await asyncio.sleep(0)
        assert everything(engine) == [IMAGE, MOUNT, second.record.key]
        await engine.delete(second.record.key, force=False)
        await gone(engine, kernel)

    act(scenario, tmp_path)


def test_who_came_to_share_what_was_given_up_makes_it_himself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.hold("acquire", IMAGE)
        first = asyncio.create_task(engine.create(nest()))
        await kernel.begun("acquire", IMAGE)
        second = asyncio.create_task(engine.create(nest()))
        await asyncio.sleep(0)
        first.cancel()
        kernel.let_go("acquire", IMAGE)
        made = await second
        assert len(everything(engine)) == 3
        await engine.delete(made.record.key, force=False)
        await gone(engine, kernel)

    with caplog.at_level(logging.ERROR):
        act(scenario, tmp_path)
    assert caplog.messages == []


@pytest.mark.parametrize("pause", range(24))
def test_a_failure_is_told_to_all_who_ask_for_the_same(tmp_path: Path, pause: int) -> None:
    """However late the second comes, it hears why, or makes its own: never that something is being deleted."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.hold("acquire", IMAGE)
        kernel.failures["acquire", IMAGE] = Invalid("no such image")
        first = asyncio.create_task(engine.create(nest()))
        await kernel.begun("acquire", IMAGE)
        third = asyncio.create_task(engine.create(nest()))
        await asyncio.sleep(0)
        kernel.let_go("acquire", IMAGE)
        for _ in range(pause):
            await asyncio.sleep(0)
        second = asyncio.create_task(engine.create(nest()))
        for answer in await asyncio.gather(first, second, third, return_exceptions=True):
            if isinstance(answer, BaseException):
                assert isinstance(answer, Invalid), answer
            else:
                await engine.delete(answer.record.key, force=False)
        await gone(engine, kernel)

    act(scenario, tmp_path)


def test_a_record_that_cannot_be_written_at_the_end_undoes_the_create(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Store.save

    def full(self: Store, record: Any) -> None:
        if record.pinned:
            raise OSError(28, "No space left on device")
        save(self, record)

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        monkeypatch.setattr(Store, "save", full)
        with pytest.raises(Problem, match="no space"):
            await engine.create(nest())
        await gone(engine, kernel)

    act(scenario, tmp_path)


def test_what_was_made_when_a_record_could_not_be_written_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has gone on to what stands on it meanwhile."""
    save = Store.save

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        def full(self: Store, record: Any) -> None:
            if record.phase == "live":
                kernel.run_on()
                raise OSError(28, "No space left on device")
            save(self, record)

        monkeypatch.setattr(Store, "save", full)
        with pytest.raises(Problem, match="no space"):
            await engine.create(nest())
        await gone(engine, kernel)
        assert kernel.released == [ROOT, MOUNT, IMAGE]

    act(scenario, tmp_path)


def test_what_a_cancelled_create_made_for_another_outlives_the_server(tmp_path: Path) -> None:
    """Its record says that it lives, though its own request never said so."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.hold("acquire", IMAGE)
        first = asyncio.create_task(engine.create(loopback("/image")))
        await kernel.begun("acquire", IMAGE)
        second = asyncio.create_task(engine.create(on(loopback("/image"))))
        await asyncio.sleep(0)
        first.cancel()
        kernel.let_go("acquire", IMAGE)
        made = await second
        await engine._tasks.drain(5)
        [record] = [one for one in Store(str(tmp_path / "state")).load().records if one.key == IMAGE]
        assert (record.phase, record.pinned, record.facts) == ("live", False, made.records[IMAGE].facts)

    act(scenario, tmp_path)


def test_an_id_that_is_free_again_is_nothing_to_who_had_it(tmp_path: Path) -> None:
    """A create is undone from the root down. What takes the ids meanwhile is not taken for what had them."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.failures["acquire", ROOT] = Invalid("no")
        kernel.hold("release", IMAGE)
        failing = asyncio.create_task(engine.create(nest()))
        await kernel.begun("release", IMAGE)
        del kernel.failures["acquire", ROOT]
        kernel.hold("acquire", MOUNT)
        second = asyncio.create_task(engine.create(on(loopback("/other"))))
        await kernel.begun("acquire", MOUNT, times=2)
        kernel.let_go("release", IMAGE)
        with pytest.raises(Invalid):
            await failing
        third = asyncio.create_task(engine.create(overlay(on(loopback("/other")))))
        await asyncio.sleep(0)
        kernel.let_go("acquire", MOUNT)
        assert [(await one).record.key for one in (second, third)] == [MOUNT, ROOT]
        assert engine.picture(MOUNT).record.problem is None
        assert engine.picture(MOUNT).refs[MOUNT] == 2

    act(scenario, tmp_path)


def test_a_failed_create_names_no_id(tmp_path: Path) -> None:
    """Nothing stays of it, even if the news of one step is heard while that of another is being told."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.failures["acquire", MOUNT] = Invalid("no such file system")
        kernel.hold("acquire", IMAGE)
        creating = asyncio.create_task(engine.create(nest()))
        await kernel.begun("acquire", IMAGE)
        kernel.hold("acquire", MOUNT)
        kernel.let_go("acquire", IMAGE)
        kernel.run_on()
        kernel.let_go("acquire", MOUNT)
        asyncio.get_running_loop().call_soon(kernel.run_on)
        with pytest.raises(Invalid) as failed:
            await creating
        assert "id" not in failed.value.fields

    act(scenario, tmp_path)


def test_a_container_whose_client_hung_up_is_not_started(tmp_path: Path) -> None:
    """The news of what it stands on is just coming in: no log, and no id is lost."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        supervisor = Supervisor(engine, 0)
        kernel.hold("acquire", ROOT)
        creating = asyncio.create_task(engine.create(msgspec.structs.replace(container(nest()), state="running")))
        await kernel.begun("acquire", ROOT)
        run: Any = engine._graph.get(BOX).run
        (tmp_path / "logs" / os.path.basename(run.logfile)).touch()
        kernel.let_go("acquire", ROOT)
        kernel.run_on()
        creating.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        await gone(engine, kernel)
        await engine._tasks.drain(5)
        assert [call for call in supervisor.calls if call[0] == "start"] == []
        assert os.listdir(tmp_path / "logs") == []
        assert engine._graph.following("container") == 0

    act(scenario, tmp_path)


def test_a_bug_in_a_release_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    """What fails in a way that nobody thought of is tried again as what fails with a reason."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.failures["acquire", ROOT] = Invalid("no")
        kernel.failures["release", ROOT] = ValueError("a bug")
        with pytest.raises(Invalid):
            await engine.create(nest())
        assert "bug" in (engine.picture(ROOT).record.problem or "")
        del kernel.failures["release", ROOT]
        await gone(engine, kernel)

    act(scenario, tmp_path)


def test_a_delete_that_failed_half_way_is_finished(tmp_path: Path) -> None:
    """The kernel has let go of the mount, and then something failed: it is not said to live."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        made = await engine.create(on(loopback("/image")))
        kernel.standing.discard(MOUNT)
        kernel.failures["release", MOUNT] = Problem("its directory cannot be removed")
        with pytest.raises(Problem, match="cannot be removed"):
            await engine.delete(made.record.key, force=False)
        assert engine.picture(MOUNT).refs[MOUNT] == 0
        with pytest.raises(Conflict):
            await engine.create(overlay(Mount(id=0)))
        del kernel.failures["release", MOUNT]
        await gone(engine, kernel)

    act(scenario, tmp_path)


def test_a_refused_delete_changes_nothing(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(on(loopback("/image")))
        kernel.failures["release", MOUNT] = Conflict("it is busy")
        with pytest.raises(Conflict, match="busy"):
            await engine.delete(MOUNT, force=True)
        picture = engine.picture(MOUNT)
        assert (picture.record.phase, picture.record.problem, picture.refs[MOUNT]) == ("live", None, 1)
        del kernel.failures["release", MOUNT]
        await engine.delete(MOUNT, force=False)
        await gone(engine, kernel)

    act(scenario, tmp_path)


def test_who_lost_what_it_stands_on_is_told_however_late(tmp_path: Path) -> None:
    """A forced delete that is finished after its answer tells the holders, too."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(nest())
        engine._graph.get(ROOT).problem = "it is gone from the kernel"
        kernel.hold("release", MOUNT)
        with pytest.raises(TimedOut):
            await engine.delete(MOUNT, force=True)
        kernel.let_go("release", MOUNT)
        while engine._graph.find(MOUNT):
            await asyncio.sleep(0.01)
        assert "mount 0" in (engine.picture(ROOT).record.problem or "")

    act(scenario, tmp_path, timeout=0.05)


def test_a_delete_does_not_wait_for_ever_for_what_was_asked_before(tmp_path: Path) -> None:
    """A look at the object has not come back: its delete ends in time, too, and is done later."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(on(loopback("/image")))
        kernel.hold("observe", MOUNT)
        with pytest.raises(TimedOut):
            await engine._jobs.drive("observe", engine._graph.get(MOUNT))
        with pytest.raises(TimedOut):
            await engine.delete(MOUNT, force=False)
        kernel.let_go("observe", MOUNT)
        await gone(engine, kernel)

    act(scenario, tmp_path, timeout=0.05)


def test_a_create_that_had_to_wait_for_another_has_no_more_time_than_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client does not wait for twice the time of an operation."""
    monkeypatch.setattr(apply, "GRACE", 0.1)

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(on(loopback("/image")))
        kernel.hold("release", MOUNT)
        deleting = asyncio.create_task(engine.delete(MOUNT, force=False))
        await kernel.begun("release", MOUNT)
        new = Key("attach", 1)
        kernel.hold("acquire", new)
        making = asyncio.create_task(engine.create(nest()))
        await asyncio.sleep(0.5)
        kernel.let_go("release", MOUNT)
        await deleting
        with pytest.raises(TimedOut, match=r"did not finish in 0\.[0-5]s"):
            await making
        kernel.let_go("acquire", new)
        await gone(engine, kernel)

    act(scenario, tmp_path, timeout=1.0)


def test_a_record_that_is_gone_is_not_written_again(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        made = await engine.create(on(loopback("/image")))
        await engine.delete(MOUNT, force=False)
        engine._ledger.note(made.record, problem="what came too late")
        assert os.listdir(tmp_path / "state" / "mount") == []
        with pytest.raises(NotFound):
            engine.picture(MOUNT)

    act(scenario, tmp_path)


def test_an_end_does_not_wait_for_what_the_kernel_keeps(tmp_path: Path) -> None:
    """What is only waiting to be tried again does not delay the service's end: the next start tries it."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        kernel.failures["acquire", ROOT] = Invalid("no")
        kernel.failures["release", ROOT] = Conflict("it is busy")
        with pytest.raises(Invalid):
            await engine.create(nest())
        await engine._tasks.drain(60)

    act(scenario, tmp_path)


def test_a_create_that_fails_does_not_wait_for_its_undo_for_longer_than_its_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not undone by then is told, shown, and goes by itself."""
    monkeypatch.setattr(apply, "GRACE", 0.01)

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        engine._applier._timeout = 0.01
        kernel.hold("acquire", ROOT)
        kernel.hold("release", ROOT)
        kernel.failures["acquire", ROOT] = Invalid("no such option")
        creating = asyncio.create_task(engine.create(nest()))
        await kernel.begun("acquire", ROOT)
        kernel.let_go("acquire", ROOT)
        with pytest.raises(Invalid, match=r"no such option; mount 1 \(overlay\) goes as soon as") as failed:
            await creating
        assert failed.value.fields["id"] == ROOT.id
        assert everything(engine) == [ROOT]
        assert "not come back from undoing" in (engine.picture(ROOT).record.problem or "")
        kernel.let_go("release", ROOT)
        await gone(engine, kernel)

    act(scenario, tmp_path)
