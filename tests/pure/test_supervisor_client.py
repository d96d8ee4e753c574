"""The server's end of the supervisor, where what it says depends on when something was said."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from typing import Any

import pytest

from imageapi.config import Config
from imageapi.runtime.client import Supervisor
from imageapi.runtime.protocol import Ended, Life, LogTrouble

pytestmark = pytest.mark.pure


class Client(Supervisor):
    """One whose supervisor tells of `lives`; meanwhile a container starts."""

    def __init__(self, directory: Path, *lives: Life) -> None:
        self.ended: list[Ended] = []
        self.logs: list[LogTrouble] = []
        site = Config(run_dir=str(directory)).site("test")
        super().__init__(site, launch=lambda: None, on_ended=self.ended.append, on_log=self.logs.append)
        self._lives = list(lives)

    async def list(self) -> list[Life]:
        self._running[7] = 1
        return self._lives


def life(number: int, *, running: bool = True, log_trouble: int | None = 0) -> Life:
    at = None if running else "2026-01-01T00:00:00Z"
    return Life(
        id=number,
        attempt=1,
        pid=1,
        start_time=0,
        running=running,
        finished_at=at,
        exit_code=None,
        log_trouble=log_trouble,
    )


def test_what_starts_while_a_new_supervisor_tells_of_its_lives_has_not_ended(tmp_path: Path) -> None:
    client = Client(tmp_path, life(0), life(1, running=False))
    client._running |= {0: 1, 1: 1, 2: 1}
    asyncio.run(client._resume())
    assert [one.id for one in client.ended] == [1, 2]
    assert client._running == {0: 1, 7: 1}


def test_what_a_new_supervisor_says_of_logs_is_news(tmp_path: Path) -> None:
    client = Client(tmp_path, life(0, log_trouble=28), life(1), life(2, log_trouble=None))
    client._running |= {0: 1, 1: 1, 2: 1}
    asyncio.run(client._resume())
    assert client.logs == [LogTrouble(0, 1, 28), LogTrouble(1, 1, 0)]


def test_a_new_supervisor_is_sought_until_there_are_descriptors_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else would ask it what became of the containers."""
    site = Config(run_dir=str(tmp_path)).site("test")
    refused = [OSError(errno.EMFILE, "Too many open files")] * 3
    found = socket.socket

    def scarce(*arguments: Any) -> socket.socket:
        if refused:
            raise refused.pop()
        return found(*arguments)

    async def scenario() -> None:
        client = Supervisor(site, launch=launched.set, on_ended=lambda _: None)
        monkeypatch.setattr(socket, "socket", scarce)
        resuming = asyncio.create_task(client._resume())
        await asyncio.wait_for(launched.wait(), 10)
        assert not resuming.done()
        resuming.cancel()
        client.close()

    monkeypatch.setattr("imageapi.runtime.client.RELAUNCH", 0.01)
    launched = asyncio.Event()
    asyncio.run(scenario())
    assert refused == []


def test_what_an_earlier_supervisor_said_explains_nothing(tmp_path: Path) -> None:
    log = tmp_path / "supervisor" / "log"
    log.parent.mkdir()
    log.write_text("MemoryError\n")
    client = Client(tmp_path)
    assert Path(client._log_path()) == log
    assert client._complaint() is None
    with log.open("a") as file:
        file.write("Traceback\nOSError: no such thing\n")
    assert "OSError: no such thing" in (client._complaint() or "")
    log.write_text("anew\n")
    assert "anew" in (client._complaint() or "")
