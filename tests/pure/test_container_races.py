"""Containers whose starts, stops and deletes meet each other, or a supervisor that hangs or has lost them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from imageapi.engine import containers, journal, starts
from imageapi.engine.engine import Engine
from imageapi.errors import Conflict, Exhausted, TimedOut
from imageapi.records import Key, Phase
from imageapi.runtime.protocol import Ended
from imageapi.store import Store
from pure.nests import container, loopback, on, overlay
from pure.slow_kernel import SlowKernel, Supervisor, act, gone

pytestmark = pytest.mark.pure

BOX = Key("container", 0)


def nest() -> Any:
    return overlay(on(loopback("/image")))


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor is asked again at once."""
    monkeypatch.setattr(containers, "ASK_AGAIN", 0.001)
    monkeypatch.setattr(starts, "ASK_AGAIN", 0.001)


def test_a_start_that_meets_a_delete_is_refused(tmp_path: Path) -> None:
    """Both were let in before either had begun: nothing is started that is nobody's."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        supervisor = Supervisor(engine, 0)
        await engine.create(container(nest()))
        deleting = asyncio.create_task(engine.delete(BOX, force=False))
        starting = asyncio.create_task(engine.request_state(BOX, "running"))
        await deleting
        with pytest.raises(Conflict, match="being deleted"):
            await starting
        assert supervisor.calls == []
        await gone(engine, kernel)

    act(scenario, tmp_path)


def test_a_start_that_meets_a_stop_is_told_that_it_has_begun(tmp_path: Path) -> None:
    """Each is answered as if the other had come before it or after it."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        Supervisor(engine, 0)
        await engine.create(container(nest()))
        asked = [asyncio.create_task(engine.request_state(BOX, state)) for state in ("running", "exited", "running")]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        states = [answer.record.run.state for answer in answers if not isinstance(answer, BaseException)]  # type: ignore[union-attr]
        assert states == ["running", "stopping", "running"]

    act(scenario, tmp_path)


def test_a_stop_is_asked_for_until_the_supervisor_hears_it(tmp_path: Path, impatient: None) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(container(nest()))
        supervisor = Supervisor(engine, 0)
        await engine.request_state(BOX, "running")
        supervisor._failures = 2
        await engine.request_state(BOX, "exited")
        await until(lambda: supervisor.calls.count(("kill", 0, 1)) == 3)
        run: Any = engine.picture(BOX).record.run
        assert run.state == "stopping"
        engine._containers._on_ended(Ended(0, 1, 137, ""))
        await until(lambda: run.state == "exited")

    act(scenario, tmp_path)


def test_a_start_that_was_given_up_is_ended_when_it_comes(tmp_path: Path, impatient: None) -> None:
    """The supervisor hung, and does what it was asked for late: nobody would ever end that process."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(container(nest()))
        supervisor = Supervisor(engine, 1)
        with pytest.raises(TimedOut):
            await engine.request_state(BOX, "running")
        await until(lambda: supervisor.calls.count(("undo", 0, 1)) == 2)
        engine._containers._on_ended(Ended(0, 1, 137, ""))
        await engine._tasks.drain(5)
        record: Any = engine.picture(BOX).record
        assert record.run.state == "dead"
        assert (record.problem or "").startswith("it could not be started: no answer")

    act(scenario, tmp_path)


def test_nothing_is_started_beside_a_start_that_was_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is its container deleted: it may still hang in the image's store, and come to something."""
    monkeypatch.setattr(starts, "ASK_AGAIN", 0.05)

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(container(nest()))
        supervisor = Supervisor(engine, 1)
        with pytest.raises(TimedOut):
            await engine.request_state(BOX, "running")
        with pytest.raises(Conflict, match="still being undone; it could not be started: no answer"):
            await engine.request_state(BOX, "running")
        with pytest.raises(TimedOut, match="has not ended yet"):
            await engine.delete(BOX, force=False)
        await until(lambda: engine._graph.find(BOX) is None)
        assert [call for call in supervisor.calls if call[0] == "undo"] == [("undo", 0, 1)] * 2

    act(scenario, tmp_path)


def test_an_id_is_free_when_its_start_has_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something may come of a start that was given up: until that has ended its container stays, and is told of."""
    monkeypatch.setattr(starts, "ASK_AGAIN", 0.05)

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        supervisor = Supervisor(engine, 1)
        asked = msgspec.structs.replace(container(nest()), state="running")
        with pytest.raises(TimedOut) as given_up:
            await engine.create(asked)
        assert given_up.value.fields["id"] == BOX.id
        record: Any = engine.picture(BOX).record
        assert (record.phase, "has not ended yet" in record.problem) == (Phase.RELEASING, True)
        Path(record.run.logfile).touch()
        assert (await engine.create(asked)).record.id == 1
        await until(lambda: engine._graph.find(BOX) is None)
        first, *_ = [call[2] for call in supervisor.calls if call[0] == "start"]
        assert [call for call in supervisor.calls if call[0] == "undo"] == [("undo", 0, first)] * 2
        assert os.listdir(tmp_path / "logs") == []

    act(scenario, tmp_path)


def test_a_container_that_the_supervisor_has_lost_can_be_deleted(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(container(nest()))
        supervisor = Supervisor(engine, 0)
        await engine.request_state(BOX, "running")
        supervisor.lost = True
        await engine.delete(BOX, force=True)
        await gone(engine, kernel)

    act(scenario, tmp_path)


def test_a_delete_that_could_not_even_ask_has_asked_for_nothing(tmp_path: Path) -> None:
    """The container runs on, also under the next server, and ends as one that nobody has asked."""

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(container(nest()))
        supervisor = Supervisor(engine, 0)
        await engine.request_state(BOX, "running")
        supervisor.unheard = Exhausted("asking the supervisor: no memory is left")
        with pytest.raises(Exhausted):
            await engine.delete(BOX, force=True)
        run = engine.picture(BOX).record.run
        assert run is not None
        assert (run.state, run.stop_requested) == ("running", False)

    act(scenario, tmp_path)


def test_a_start_that_was_given_up_does_not_delay_the_end_of_the_server(tmp_path: Path) -> None:
    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        await engine.create(container(nest()))
        Supervisor(engine, 1000)
        with pytest.raises(TimedOut):
            await engine.request_state(BOX, "running")
        await engine._tasks.drain(60)

    act(scenario, tmp_path)


@pytest.mark.parametrize("told", [True, False], ids=["deleted", "failed"])
def test_a_log_is_dealt_with_as_long_as_there_is_a_record_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """A server that is killed in between leaves it to the next one, which says the last line only once."""
    logs: list[list[str]] = []
    remove = Store.remove

    def look(self: Store, key: Key) -> None:
        if key == BOX:
            logs.append([path.read_text() for path in (tmp_path / "logs").iterdir()])
        remove(self, key)

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        monkeypatch.setattr(Store, "remove", look)
        record = (await engine.create(container(nest()))).record
        run: Any = record.run
        run.untold = not told
        await engine.delete(BOX, force=False)
        journal.close(record)

    act(scenario, tmp_path)
    (found,) = logs
    assert [text.count("container(0): container deleted\n") for text in found] == [1] * told
    assert [path.read_text() for path in (tmp_path / "logs").iterdir()] == found
