"""What the NFS client's files say, in the kernel's own words (Linux 6.12)."""

from __future__ import annotations

from pathlib import Path

import pytest

from imageapi.linux import nfs

pytestmark = pytest.mark.pure

VOLUMES = """\
NV SERVER   PORT DEV          FSID                              FSC
v4 7f000001  801 0:45         8e5a5d8b1a5b4f0b:0                no
v3 0a00020f  801 0:145        0:0                               no
"""

STATISTICS = """\
device proc mounted on /proc with fstype proc
device server:/a mounted on /run/a\\040place/mount_1 with fstype nfs4 statvers=1.1
	opts:	rw,vers=4.2,rsize=1048576
	events:	7 3 0 0 4 2 2 {updates} 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
	bytes:	12 {written} 0 {direct} 10 10 1 1
	RPC iostats version: 1.1  p/v: 100003/4 (nfs)
device server:/b mounted on /run/a\\040place/mount_12 with fstype nfs4 statvers=1.1
	events:	7 3 0 0 4 2 2 99 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
	bytes:	12 99 0 99 10 10 1 1
device tmpfs mounted on /run with fstype tmpfs
"""


@pytest.mark.parametrize(("dev", "up"), [("0:45", True), ("0:145", True), ("0:4", False), ("8:1", False)])
def test_a_file_system_is_up_while_the_client_lists_it(tmp_path: Path, dev: str, up: bool) -> None:
    (tmp_path / "volumes").write_text(VOLUMES)
    assert nfs.is_up(dev, str(tmp_path / "volumes")) is up


def test_without_the_client_none_is_up(tmp_path: Path) -> None:
    assert nfs.is_up("0:45", str(tmp_path / "volumes")) is False


@pytest.mark.parametrize(
    ("counts", "written"),
    [
        ({}, False),
        ({"updates": 1}, True),
        ({"written": 1}, True),
        ({"direct": 1}, True),
    ],
)
def test_what_was_written_through_a_mount_is_counted(tmp_path: Path, counts: dict[str, int], written: bool) -> None:
    path = tmp_path / "mountstats"
    path.write_text(STATISTICS.format_map({"updates": 0, "written": 0, "direct": 0} | counts))
    assert nfs.may_have_written("/run/a place/mount_1", str(path)) is written
    assert nfs.may_have_written("/run/a place/mount_12", str(path)) is True
    assert nfs.may_have_written("/run/a place/mount_2", str(path)) is True, "nothing is known of it"
