"""The kind `local`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from drivers.bench import Bench
from imageapi.errors import Invalid
from imageapi.linux import loop, mountinfo
from imageapi.records import AnyRecord

pytestmark = pytest.mark.kernel


@pytest.fixture
def device(bench: Bench) -> str:
    record = bench.acquire(bench.loopback("ext4", ro=False))
    assert record.facts.device_file is not None
    return record.facts.device_file


def test_release_leaves_the_device_as_it_is(bench: Bench, device: str) -> None:
    record = bench.acquire(bench.local(device))
    assert record.facts.device_file == device
    bench.release(record)
    assert loop.status(device) is not None


def test_a_node_that_names_another_device_now_is_gone(bench: Bench, device: str, run_dir: Path) -> None:
    node = run_dir / "disk"
    node.symlink_to(device)
    record = bench.acquire(bench.local(str(node)))
    assert bench.observe(record) is not None
    node.unlink()
    assert bench.observe(record) is None
    os.mknod(node, 0o60600, os.makedev(7, 250))
    assert bench.observe(record) is None


@pytest.mark.parametrize("ro", [True, False])
def test_ro_makes_the_mounts_on_it_read_only(bench: Bench, device: str, ro: bool) -> None:
    on = bench.acquire(bench.local(device, ro=ro))
    assert mounted_read_only(bench.acquire(bench.attach(on, "ext4"))) is ro
    assert bench.driver(on).read_only(on.definition) is ro


def mounted_read_only(record: AnyRecord) -> bool:
    assert record.facts.mountpoint is not None
    found = mountinfo.at(record.facts.mountpoint)
    assert found is not None
    return found.read_only


def test_what_is_no_device_is_refused_with_a_remedy(bench: Bench, run_dir: Path) -> None:
    (run_dir / "file").touch()
    (run_dir / "circle").symlink_to("circle")
    os.mknod(run_dir / "nobody", 0o60600, os.makedev(240, 7))
    reasons = {
        str(run_dir / "missing"): "lsblk",
        str(run_dir / "file"): "kind 'loopback'",
        str(run_dir): "no block device",
        str(run_dir / "nobody"): "not there",
        "sda": "relative",
        str(run_dir / "circle"): "circles of symbolic links",
    }
    for path, reason in reasons.items():
        with pytest.raises(Invalid, match=reason) as refusal:
            bench.acquire(bench.local(path))
        assert refusal.value.fields["path"] == "$.path"


def test_a_device_without_a_medium_is_refused(bench: Bench, device: str) -> None:
    """A free loop device has size 0."""
    bench.release_all()
    with pytest.raises(Invalid, match="no medium"):
        bench.acquire(bench.local(device))
