"""A supervisor of the test's own, and a root to start containers in.

The client is the server's; it lives in an event loop that runs only while the test waits for something.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from imageapi.config import Site
from imageapi.drivers import block
from imageapi.linux import loop
from imageapi.records import Key
from imageapi.runtime import lender, supervisor
from imageapi.runtime.client import Supervisor
from imageapi.runtime.protocol import Ended, Life, LogTrouble, Start, Started

PATIENCE = 20.0
"""Seconds until what should happen is given up."""
T = TypeVar("T")
_OURS = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d (init|container\(\d+\)): ")
"""How a line of the log begins that is not the container's own."""


def eventually(condition: Callable[[], T], what: str) -> T:
    """What `condition` returns once that is true. Raises: AssertionError."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE:g} s"
        time.sleep(0.005)
    return value


def detach(site: Site) -> None:
    """Fork the supervisor as the server's zygote does: twice, into a session of its own."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    os.setsid()
    if os.fork() == 0:
        supervisor.run(site)
    os._exit(0)


class Supervised:
    """A site with its supervisor. `root` is the directory that containers get as their root unless another is named."""

    def __init__(self, site: Site, root: Path) -> None:
        self.site = site
        self.root = root
        self.news: list[Ended] = []
        self.log_news: list[LogTrouble] = []
        self._loop = asyncio.new_event_loop()
        self._attempts: dict[int, int] = {}
        self._killed = 0
        self.client = Supervisor(
            site, launch=lambda: detach(site), on_ended=self.news.append, on_log=self.log_news.append
        )
        self.lives = self.do(self.client.connect())

    def do(self, work: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T:
        """The result of `work`, once it has one."""
        return self._loop.run_until_complete(asyncio.wait_for(work, PATIENCE))

    @property
    def pid(self) -> int:
        assert self.client.pid is not None
        return self.client.pid

    # ----------------------------------------------------------------------------------------------- containers

    def start(self, *argv: str, **more: Any) -> Started:
        """Raises: errors.Problem."""
        return self.do(self.begin(*argv, **more))

    def begin(self, *argv: str, container: int = 0, root: Path | None = None, **more: Any) -> asyncio.Task[Started]:
        """Ask for a start; it is under way when this returns."""
        attempt = self._attempts[container] = self._attempts.get(container, 0) + 1
        root = root or self.root
        order = Start(
            id=container,
            attempt=attempt,
            root=root.name,
            argv=list(argv),
            logfile=f"{container}.log",
            mark=self.site.mark(Key("container", container)),
            **more,
        )
        task = self._loop.create_task(self.client.start(order, str(root.parent)))
        self._loop.run_until_complete(asyncio.sleep(0.001))
        return task

    def shell(self, script: str, **more: Any) -> Started:
        """Run a script in the image's shell."""
        return self.start("/bin/sh", "-c", script, **more)

    def output(self, script: str, **more: Any) -> str:
        """What a script prints, once it has ended with status 0."""
        more.setdefault("container", len(self._attempts))
        ended = self.end_of(self.shell(script, **more))
        assert ended.exit_code == 0, self.log(ended.id)
        return self.printed(ended.id)

    def end_of(self, started: Started) -> Ended:
        """The news of a life's end."""
        return self.do(self._end_of(started))

    async def _end_of(self, started: Started) -> Ended:
        while True:
            for news in self.news:
                if (news.id, news.attempt) == (started.id, started.attempt):
                    return news
            await asyncio.sleep(0.002)

    def signal(self, started: Started, number: int) -> None:
        self.do(self.client.signal(started.id, started.attempt, number))

    def kill(self, started: Started) -> Ended:
        self.do(self.client.kill(started.id, started.attempt))
        return self.end_of(started)

    def life(self, started: Started) -> Life:
        """What the supervisor knows of a life."""
        return next(life for life in self.do(self.client.list()) if life.id == started.id)

    # ------------------------------------------------------------------------------------------- what is kept

    def name(self, started: Started) -> str:
        """Under what the supervisor keeps what belongs to a life."""
        entry = json.loads(Path(self.site.supervisor_dir, f"{started.id}.json").read_text())
        return str(entry["name"])

    def fifo(self, started: Started) -> Path:
        """Where a life prints."""
        return Path(self.site.supervisor_dir, f"{self.name(started)}.out")

    def kept(self) -> set[str]:
        """The files that are there for lives, and the names of parked pidfds; the child in waiting's are left out."""
        files = set(os.listdir(self.site.supervisor_dir)) - {"keep", "lock", "log", "socket"}
        parked = set(os.listdir(f"{self.site.supervisor_dir}/keep/pids"))
        ahead = {name for pid in self.waiting() for name in _kept_for(pid)}
        return (files | parked) - ahead

    def waiting(self) -> list[int]:
        """The child in waiting, when there is one."""
        return self._named("imageapi-child")

    def lenders(self) -> list[int]:
        """The process whose memory the child in waiting has, when it has not its own."""
        return self._named(lender.NAME)

    # ----------------------------------------------------------------------------------------------------- logs

    def log(self, container: int = 0) -> str:
        return Path(self.site.logs_dir, f"{container}.log").read_text()

    def steps(self, container: int = 0) -> list[str]:
        """The lines that the first process wrote, without their time."""
        return [line.split(" ", 2)[2] for line in self.log(container).splitlines() if " init: " in line]

    def printed(self, container: int = 0) -> str:
        """What the container itself has printed."""
        lines = self.log(container).splitlines(keepends=True)
        return "".join(line for line in lines if not _OURS.match(line))

    # ------------------------------------------------------------------------------------------- the supervisor

    def kill_supervisor(self) -> None:
        """SIGKILL, and return when it is gone; the client has not noticed yet."""
        pid = self._killed = self.pid
        descriptor = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: _ended(descriptor), f"supervisor {pid} ends")
        os.close(descriptor)

    def resume(self) -> int:
        """Have another supervisor where one died; its pid."""
        self.do(self._another_than(self._killed))
        self.do(self.client.list())
        return self.pid

    async def _another_than(self, pid: int) -> None:
        while self.client.pid in (None, pid):
            await asyncio.sleep(0.002)

    def reconnect(self) -> None:
        """Be the next server: another client, which finds the supervisor there. Raises: errors.Problem."""
        self.client.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self.client = Supervisor(
            self.site, launch=lambda: detach(self.site), on_ended=self.news.append, on_log=self.log_news.append
        )
        self.lives = self.do(self.client.connect())

    def children(self) -> list[int]:
        """The supervisor's children: each running container's first process, and the child in waiting."""
        aside = {lender.NAME, "imageapi-super"}
        return [pid for pid, name in self._born().items() if name not in aside]

    def _named(self, wanted: str) -> list[int]:
        return [pid for pid, name in self._born().items() if name == wanted]

    def _born(self) -> dict[int, str]:
        """The names of all children that have not been reaped."""
        born = {}
        for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                born[int(pid)] = Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
        return born

    def close(self) -> None:
        """End all that runs, and the supervisor: nothing of it is left."""
        try:
            for life in self.do(self.client.list()):
                if life.running:
                    self.kill(Started(life.id, life.attempt, life.pid, life.start_time))
            descriptor = os.pidfd_open(self.pid)
            self.do(self.client.quit())
            eventually(lambda: _ended(descriptor), "the supervisor ends")
            os.close(descriptor)
            assert not Path(self.site.supervisor_dir, "keep").exists()
            assert Path(self.site.supervisor_dir, "log").read_text() == ""
        finally:
            self.end_loop()

    def end_loop(self) -> None:
        """Leave the supervisor to itself."""
        self.client.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


def _kept_for(pid: int) -> tuple[str, str]:
    """A child's FIFO, and the name that its pidfd is parked under."""
    fifo = Path(os.readlink(f"/proc/{pid}/fd/1"))
    return fifo.name, fifo.stem


def _ended(descriptor: int) -> bool:
    """Whether the process of a pidfd has ended, reaped or not."""
    poll = select.poll()
    poll.register(descriptor)
    return bool(poll.poll(0))


@contextlib.contextmanager
def mounted(target: Path, *arguments: str) -> Iterator[Path]:
    """A mount(8) of the test's own."""
    target.mkdir()
    subprocess.run(["mount", *arguments, str(target)], check=True, timeout=PATIENCE)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True, timeout=PATIENCE)


@contextlib.contextmanager
def squashfs(image: Path, target: Path) -> Iterator[Path]:
    """An image mounted read-only. Not by `mount -o loop`, which asks every loop device of the machine, and waits for
    those whose store another test has stopped."""
    with open(image, "rb") as file:
        device, _ = loop.attach(file.fileno(), str(target), read_only=True)
    try:
        with mounted(target, "-t", "squashfs", "-o", "ro", device) as mountpoint:
            yield mountpoint
    finally:
        block.detach_loop(device)


@contextlib.contextmanager
def overlay(lower: Path, place: Path) -> Iterator[Path]:
    """A writable view of `lower`, its directories in `place`."""
    for name in ("upper", "work"):
        (place / name).mkdir(parents=True)
    options = f"lowerdir={lower},upperdir={place}/upper,workdir={place}/work"
    with mounted(place / "root", "-t", "overlay", "overlay", "-o", options) as root:
        yield root
