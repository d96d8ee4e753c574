"""What the kinds have in common that a storage daemon serves, on a device that needs none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from drivers.bench import Bench
from imageapi.config import Site
from imageapi.drivers import exported, revisit, storage_daemon
from imageapi.errors import Problem
from imageapi.linux import mount
from imageapi.records import AnyRecord
from lab import images
from lab.partitions import MEGABYTE, add_partition

pytestmark = pytest.mark.kernel


def refusing(device: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), device)


def device_of(record: AnyRecord) -> str:
    assert record.facts.device_file is not None
    return record.facts.device_file


def write(device: str) -> None:
    with open(device, "r+b") as opened:
        opened.write(bytes(4096))
        opened.flush()
        os.fsync(opened.fileno())


def test_each_loss_is_told_once(bench: Bench, site: Site, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was refused a DELETE for that may go on to write."""
    (run_dir / "disk").write_bytes(bytes(MEGABYTE))
    record = bench.acquire(bench.loopback(path=str(run_dir / "disk"), ro=False))
    device = device_of(record)
    note = Path(storage_daemon.private_path(site, record.key, exported.REFUSED))
    with monkeypatch.context() as patched:
        patched.setattr(exported, "_sync", refusing)
        for _ in range(2):
            write(device)
            with pytest.raises(Problem, match="refused the last writes"):
                exported.flush(site, record.key, device, "see there")
            exported.flush(site, record.key, device, "see there")
    exported.flush(site, record.key, device, "see there")
    assert not note.exists()
    note.parent.rmdir()


def test_the_file_system_of_a_partition_is_looked_at_as_well(
    bench: Bench, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, content = run_dir / "disk", images.small_image("squashfs").read_bytes()
    disk.write_bytes(bytes(MEGABYTE) + content + bytes(-len(content) % MEGABYTE))
    device = device_of(bench.acquire(bench.loopback(path=str(disk))))
    partition = add_partition(device, MEGABYTE, disk.stat().st_size - MEGABYTE)
    assert revisit.complaint(device) is None
    spot = run_dir / "spot"
    spot.mkdir()
    mount.mount(partition, str(spot), "squashfs", mount.MS_RDONLY, None)
    try:
        assert revisit.complaint(device) is None
        monkeypatch.setattr(revisit, "_can_be_read", lambda _: False)
        assert str(spot) in (revisit.complaint(device) or "")
    finally:
        mount.umount(str(spot))
