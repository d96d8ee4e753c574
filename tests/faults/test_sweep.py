"""What has our mark and no record is removed at the next start, and what is somebody else's is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageapi.linux import loop
from lab.server import Server, alive, box, eventually, image, squashfs

pytestmark = pytest.mark.api


def _instance(server: Server) -> str:
    return f"imageapi:{(server.run_dir / 'instance').read_text().strip()}:"


def _forget_all(server: Server) -> None:
    """What a lost state directory leaves: everything stands, and nobody knows of it."""
    server.kill()
    for collection in ("container", "mount", "attach"):
        for record in (server.run_dir / "state" / collection).iterdir():
            record.unlink()


def test_mounts_and_loops_without_a_record_go(server: Server) -> None:
    server.post("/mount", squashfs())
    server.post("/attach/loopback", image())
    assert len(loop.marked(_instance(server))) == 2
    _forget_all(server)
    server.start()
    assert server.everything() == []
    eventually(lambda: not loop.marked(_instance(server)), "the loop devices are free")
    assert os.listdir(server.run_dir / "mounts") == []


def test_a_container_without_a_record_goes_with_its_mounts(server: Server) -> None:
    made = server.post("/container", box("/bin/sleep 1000"))
    _forget_all(server)
    server.start()
    assert not alive(made["pid"]), server.log.read_text()
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[str]:
    """A loop device of somebody else's."""
    file = tmp_path / "strange"
    file.write_bytes(bytes(1 << 20))
    descriptor = os.open(file, os.O_RDWR)
    device, _ = loop.attach(descriptor, "imageapi:00000000:attach/0", read_only=False)
    os.close(descriptor)
    yield device
    loop.detach(device)


def test_what_is_another_servers_stays(server: Server, stranger: str) -> None:
    server.kill()
    server.start()
    status = loop.status(stranger)
    assert status is not None
    assert status.name == "imageapi:00000000:attach/0"


def test_a_lost_state_directory_is_made_again(server: Server) -> None:
    server.stop()
    shutil.rmtree(server.run_dir / "state")
    server.start()
    assert server.everything() == []
