"""What every local kind promises, whatever it is: see `imageapi.drivers.base`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from drivers.bench import KINDS, Bench, Made, stored, traces
from drivers.interruptions import deaths, errors
from imageapi import records
from imageapi.errors import Conflict
from lab.elsewhere import working_in

pytestmark = pytest.mark.kernel

RELEASE = """
import sys, msgspec
from imageapi import records
from imageapi.config import Site
from imageapi.drivers.base import driver
site = msgspec.json.decode(sys.argv[1], type=Site)
record = records.decode(sys.argv[2], sys.stdin.buffer.read())
driver(record.key.collection, record.kind).release(record, site)
"""


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, bench: Bench) -> Made:
    return KINDS[request.param](bench)


def test_what_acquire_makes_is_observed_and_release_undoes_it(bench: Bench, made: Made) -> None:
    before, observed = traces(bench.site), bench.observe(made.record)
    record = bench.acquire(made)
    assert record.facts.device_file or record.facts.mountpoint
    found = bench.observe(record)
    assert found is not None
    assert (found.device_file, found.mountpoint) == (record.facts.device_file, record.facts.mountpoint)
    bench.release(record)
    assert traces(bench.site) == before
    assert bench.observe(record) == observed


def test_it_is_observed_from_a_record_without_facts(bench: Bench, made: Made) -> None:
    record = bench.acquire(made)
    bare = msgspec.structs.replace(record, facts=records.Facts())
    found = bench.observe(bare)
    assert found is not None
    assert (found.device_file, found.mountpoint) == (record.facts.device_file, record.facts.mountpoint)


def test_release_is_idempotent(bench: Bench, made: Made) -> None:
    before = traces(bench.site)
    bench.release(made.record)
    record = bench.acquire(made)
    bench.release(record)
    bench.release(record)
    assert traces(bench.site) == before


def test_another_process_can_release_it_from_the_stored_record(bench: Bench, made: Made) -> None:
    before = traces(bench.site)
    record = bench.acquire(made)
    site = msgspec.json.encode(bench.site).decode()
    subprocess.run(
        [sys.executable, "-c", RELEASE, site, record.key.collection],
        input=records.encode(record),
        env={**os.environ, "PYTHONPATH": str(Path(records.__file__).parents[1])},
        check=True,
        timeout=30,
    )
    assert traces(bench.site) == before


def test_it_can_be_acquired_again_after_a_release(bench: Bench, made: Made) -> None:
    bench.release(bench.acquire(made))
    made.record.facts = records.Facts()
    assert bench.observe(bench.acquire(made)) is not None


def test_a_death_at_any_step_of_acquire_is_undone_by_release(bench: Bench, made: Made) -> None:
    before, step = traces(bench.site), 0
    driver = bench.driver(made.record)
    for step in deaths(lambda: driver.acquire(made.record, made.inputs, bench.site)):
        bench.release(stored(made.record))
        assert traces(bench.site) == before, f"killed after step {step}"
    bench.release(made.record)
    assert step > 5


def test_a_death_at_any_step_of_release_is_finished_by_the_next(bench: Bench, made: Made) -> None:
    before = traces(bench.site)
    driver = bench.driver(made.record)
    bench.acquire(made)
    for step in deaths(lambda: driver.release(made.record, bench.site)):
        bench.release(made.record)
        assert traces(bench.site) == before, f"killed after step {step}"
        made.record.facts = records.Facts()
        bench.acquire(made)


def test_an_acquire_that_fails_leaves_nothing(bench: Bench, made: Made) -> None:
    before, step = traces(bench.site), 0
    driver = bench.driver(made.record)
    for step, failed in errors(lambda: driver.acquire(made.record, made.inputs, bench.site)):
        if not failed:
            bench.release(made.record)
        assert traces(bench.site) == before, f"call {step} failed"
    bench.release(made.record)
    assert step > 1


MOUNTS = [kind for kind in KINDS if kind.startswith(("attach", "overlay", "bind", "tmpfs", "uri"))]


@pytest.mark.parametrize("made", MOUNTS, indirect=True)
def test_a_mount_in_use_stays_and_its_user_is_named(bench: Bench, made: Made) -> None:
    record = bench.acquire(made)
    before = traces(bench.site)
    assert record.facts.mountpoint is not None
    with working_in(record.facts.mountpoint) as pid, pytest.raises(Conflict) as refusal:
        bench.release(record)
    assert refusal.value.fields["holders"] == [f"process {pid} (sleep)"]
    assert f"process {pid} (sleep)" in refusal.value.message
    assert traces(bench.site) == before


@pytest.mark.parametrize("made", MOUNTS, indirect=True)
def test_what_a_stranger_mounted_on_top_is_not_touched(bench: Bench, made: Made) -> None:
    record = bench.acquire(made)
    assert record.facts.mountpoint is not None
    subprocess.run(["mount", "-t", "tmpfs", "stranger", record.facts.mountpoint], check=True)
    before = traces(bench.site)
    try:
        with pytest.raises(Conflict, match="stranger"):
            bench.release(record)
        assert traces(bench.site) == before
    finally:
        subprocess.run(["umount", record.facts.mountpoint], check=True)


@pytest.mark.parametrize("made", MOUNTS, indirect=True)
def test_what_lies_in_a_mountpoint_is_never_deleted(bench: Bench, made: Made) -> None:
    record = bench.acquire(made)
    assert record.facts.mountpoint is not None
    subprocess.run(["umount", record.facts.mountpoint], check=True)
    kept = Path(record.facts.mountpoint, "kept")
    kept.write_text("dear to somebody")
    with pytest.raises(Conflict, match="holds files"):
        bench.release(record)
    assert kept.read_text() == "dear to somebody"
    kept.unlink()


@pytest.mark.parametrize("made", ["loopback", "loopback, writable", "loopback in a mount"], indirect=True)
def test_a_loop_device_in_use_stays_and_its_user_is_named(bench: Bench, made: Made) -> None:
    record = bench.acquire(made)
    assert record.facts.device_file is not None
    user = os.open(record.facts.device_file, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(Conflict) as refusal:
            bench.release(record)
        assert any(f"process {os.getpid()} " in holder for holder in refusal.value.fields["holders"])
        assert bench.observe(record) is not None
    finally:
        os.close(user)
