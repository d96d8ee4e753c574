"""Records on disk: what is written is what is read, whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from imageapi.engine.graph import Graph
from imageapi.engine.plan import Plan, plan
from imageapi.errors import Conflict
from imageapi.records import Facts, Key, Phase, Record, Run
from imageapi.spec import Object, Secret
from imageapi.store import Store
from pure.nests import answers, container, on, overlay, rbd, things

pytestmark = pytest.mark.pure


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(things)
def test_any_record_is_read_as_it_was_written(store: Store, thing: Object) -> None:
    try:
        planned = plan(thing, Graph(), iter(range(10**6)).__next__, answers)
    except Conflict:
        return
    assert isinstance(planned, Plan)
    store.save_all(planned.steps)
    assert {record.key: record for record in store.load().records} == {record.key: record for record in planned.steps}
    for record in planned.steps:
        store.remove(record.key)
    assert store.load().records == []


def test_facts_and_life_are_kept(store: Store) -> None:
    record = Record(
        id=3,
        spec=container(overlay(on(rbd()))),
        token=5,
        phase=Phase.LIVE,
        pinned=True,
        facts=Facts(mountpoint="/m", detail={"mnt_id": 7}),
        run=Run(state="running", pid=9, start_time=11, attempt=2),
        problem="none really",
        boot_id="now",
    )
    store.save(record)
    assert store.load().records == [record]


def test_secrets_are_kept_for_root_alone(store: Store, tmp_path: Path) -> None:
    attachment = rbd()
    assert attachment.rbd is not None
    secret = Secret("a2V5")
    options = type(attachment.rbd.options)(secret=secret)
    definition = type(attachment.rbd)(monitors=["m"], pool="p", image="i", options=options)
    store.save(Record(id=0, spec=type(attachment)(kind="rbd", rbd=definition), token=1))
    path = tmp_path / "attach" / "0.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert store.load().records[0].definition.options.secret.reveal() == "a2V5"
    assert "a2V5" not in repr(store.load().records)


def test_a_writer_that_was_killed_leaves_the_old_record(store: Store, tmp_path: Path) -> None:
    record = Record(id=0, spec=rbd(), token=1)
    store.save(record)
    (tmp_path / "attach" / "0.json.new").write_bytes(b'{"id": 0, "sp')
    assert store.load().records == [record]
    assert os.listdir(tmp_path / "attach") == ["0.json"]


def test_a_writer_that_was_killed_before_it_wrote_leaves_nothing(store: Store, tmp_path: Path) -> None:
    (tmp_path / "attach" / "0.json").touch()
    assert store.load().records == []
    assert os.listdir(tmp_path / "attach") == []


@pytest.mark.parametrize("sizes", [(10, 2000), (2000, 10), (10, 9000), (9000, 10), (9000, 8000)])
def test_a_record_takes_the_place_of_another_whatever_their_sizes(store: Store, sizes: tuple[int, int]) -> None:
    for size in sizes:
        record = Record(id=0, spec=rbd(), token=1, problem="x" * size)
        store.save(record)
        assert store.load().records == [record]


def test_a_record_of_a_page_is_written_where_it_is(store: Store, tmp_path: Path) -> None:
    """A new file each time is an inode each time, which some file systems do not give quickly."""
    record = Record(id=0, spec=rbd(), token=1)
    store.save(record)
    before = (tmp_path / "attach" / "0.json").stat().st_ino
    record.problem = "changed"
    store.save(record)
    assert (tmp_path / "attach" / "0.json").stat().st_ino == before


def test_a_file_that_is_no_record_is_named_and_left(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mount" / "4.json").write_text("{}")
    (tmp_path / "mount" / "note").write_text("mine")
    (tmp_path / "mount" / "12.json").mkdir()
    contents = store.load()
    assert (contents.records, contents.hidden()) == ([], {Key("mount", 4), Key("mount", 12)})
    assert "4.json is no record" in caplog.text
    assert set(contents.unread) == {str(file) for file in (tmp_path / "mount").iterdir()}


def test_removing_twice_is_removing_once(store: Store) -> None:
    store.save(Record(id=0, spec=rbd(), token=1))
    store.remove(Key("attach", 0))
    store.remove(Key("attach", 0))
    assert store.load().records == []


def test_a_plan_that_cannot_be_written_whole_is_not_written(store: Store, tmp_path: Path) -> None:
    planned = plan(overlay(on(rbd())), Graph(), iter(range(9)).__next__, answers)
    assert isinstance(planned, Plan)
    (tmp_path / "mount" / "1.json").mkdir()
    with pytest.raises(IsADirectoryError):
        store.save_all(planned.steps)
    (tmp_path / "mount" / "1.json").rmdir()
    assert store.load().records == []


def test_counters_are_kept(store: Store) -> None:
    assert store.counters() == {}
    store.save_counters({"attach": 3, "mount": 9})
    assert store.counters() == {"attach": 3, "mount": 9}


def test_counters_that_cannot_be_read_are_told_in_one_line(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "counters.json").write_text("{")
    assert store.counters() == {}
    [said] = caplog.records
    assert "counters.json cannot be read" in said.message
    assert said.exc_info is None
