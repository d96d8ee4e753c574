"""What goes on while a container runs: signals, output, and the death of its supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageapi.config import LOG_LIMIT, Site
from imageapi.errors import Conflict, NotFound, Problem, TimedOut
from imageapi.linux import cgroup, libc, pidfd
from imageapi.runtime import client, output, protocol
from imageapi.runtime.protocol import Started
from lab.supervised import Supervised, detach, eventually, mounted

pytestmark = pytest.mark.kernel

PR_SET_CHILD_SUBREAPER = 36
CATCHER = "trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.01; done"


def await_line(supervised: Supervised, text: str, container: int = 0) -> None:
    eventually(lambda: text in supervised.printed(container).splitlines(), f"the container prints {text}")


def await_lines(supervised: Supervised, wanted: int) -> None:
    eventually(lambda: len(supervised.printed().splitlines()) == wanted, f"the container prints {wanted} lines")


# ---------------------------------------------------------------------------------------------------- signals


def test_a_signal_reaches_the_first_process(supervised: Supervised) -> None:
    started = supervised.shell(CATCHER)
    await_line(supervised, "ready")
    assert pidfd.catches(started.pid, signal.SIGTERM)
    assert not pidfd.catches(started.pid, signal.SIGUSR1)
    supervised.signal(started, signal.SIGTERM)
    assert supervised.end_of(started).exit_code == 7
    assert supervised.printed() == "ready\ncaught\n"


def test_kill_ends_every_process_of_the_container(supervised: Supervised) -> None:
    started = supervised.shell("sleep 1000 & sleep 1000 & setsid sleep 1000 & echo ready; wait")
    await_line(supervised, "ready")
    namespace = os.readlink(f"/proc/{started.pid}/ns/pid")
    assert len(_inside(namespace)) == 4
    assert supervised.kill(started).exit_code == 128 + signal.SIGKILL
    assert _inside(namespace) == []


def _inside(namespace: str) -> list[int]:
    """The processes of a pid namespace that live."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace and pidfd.start_time(int(pid)) is not None:
                found.append(int(pid))
    return found


@pytest.fixture
def freezer() -> Iterator[int]:
    """A group of the version 1 freezer, as a descriptor of the directory it is in; it is named `imageapi-frozen`."""
    place = cgroup.freezer()
    assert place is not None, "this machine has no version 1 freezer: run the tests where there is one"
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    cgroup.make(directory, "imageapi-frozen")
    yield directory
    eventually(lambda: cgroup.remove(directory, "imageapi-frozen"), "the frozen group goes")
    os.close(directory)


def test_kill_reaches_what_a_version_1_freezer_stopped(supervised: Supervised, freezer: int) -> None:
    started = supervised.start("/bin/sleep", "1000")
    cgroup.write(freezer, "imageapi-frozen/cgroup.procs", str(started.pid))
    cgroup.write(freezer, "imageapi-frozen/freezer.state", "FROZEN")
    assert supervised.kill(started).exit_code == 128 + signal.SIGKILL


def test_an_order_for_another_start_is_refused(supervised: Supervised) -> None:
    started = supervised.start("/bin/sleep", "1000")
    with pytest.raises(NotFound):
        supervised.do(supervised.client.kill(started.id, started.attempt + 1))
    with pytest.raises(NotFound):
        supervised.do(supervised.client.signal(started.id + 1, started.attempt, signal.SIGKILL))
    assert supervised.life(started).running


def test_a_life_is_known_until_it_is_forgotten(supervised: Supervised) -> None:
    started = supervised.shell("exit 6")
    ended = supervised.end_of(started)
    life = supervised.life(started)
    assert (life.running, life.exit_code, life.finished_at) == (False, 6, ended.finished_at)
    for _ in range(2):
        supervised.do(supervised.client.forget(started.id, started.attempt))
        assert supervised.do(supervised.client.list()) == []


def test_a_running_life_is_not_forgotten(supervised: Supervised) -> None:
    started = supervised.start("/bin/sleep", "1000")
    with pytest.raises(Conflict):
        supervised.do(supervised.client.forget(started.id, started.attempt))
    assert supervised.life(started).running


# ----------------------------------------------------------------------------------------------------- output


def test_all_output_is_in_the_log_when_the_end_is_told(supervised: Supervised) -> None:
    started = supervised.shell("seq 1 100000")
    supervised.end_of(started)
    assert supervised.printed() == "".join(f"{number}\n" for number in range(1, 100001))


def test_a_log_that_is_full_is_rotated(supervised: Supervised) -> None:
    megabytes = (LOG_LIMIT >> 20) + 1
    printing = f"dd if=/dev/zero bs=1M count={megabytes} 2>/dev/null | tr '\\0' 'x'; echo last"
    supervised.end_of(supervised.shell(printing))
    old, new = Path(supervised.site.logs_dir, "0.log.1"), Path(supervised.site.logs_dir, "0.log")
    assert LOG_LIMIT <= old.stat().st_size < LOG_LIMIT + output.CHUNK
    assert old.read_text().splitlines()[0].endswith("container(0): validating image")
    assert new.read_text().endswith("xlast\n")
    assert old.stat().st_size + new.stat().st_size > megabytes << 20


def test_another_supervisor_finds_out_whether_a_log_takes_what_is_printed(site: Site, root: Path) -> None:
    """It knows nothing of what the last one has told, and tells what it finds."""
    printing = "trap 'seq 1 5000' USR1; echo ready; while :; do sleep 0.01; done"
    os.rmdir(site.logs_dir)
    with mounted(Path(site.logs_dir), "-t", "tmpfs", "-o", "size=64k", "tmpfs") as disk:
        running = Supervised(site, root)
        started = running.shell(printing)
        await_line(running, "ready")
        (disk / "filler").write_bytes(bytes(40 << 10))
        print_until_told(running, started, errno.ENOSPC)
        assert running.life(started).log_trouble == errno.ENOSPC
        running.kill_supervisor()
        (disk / "filler").unlink()
        running.resume()
        assert running.life(started).log_trouble is None
        print_until_told(running, started, 0)
        (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail << 12))
        running.kill_supervisor()
        running.resume()
        print_until_told(running, started, errno.ENOSPC)
        assert running.life(started).log_trouble == errno.ENOSPC
        running.close()


def print_until_told(supervised: Supervised, started: Started, number: int) -> None:
    """Have it print, and return when what is told of its log then is this errno."""
    told = len(supervised.log_news)
    supervised.signal(started, signal.SIGUSR1)

    def is_told() -> bool:
        supervised.do(supervised.client.list())
        return [news.errno for news in supervised.log_news[told:]][-1:] == [number]

    eventually(is_told, f"{os.strerror(number)} is told")


def test_one_that_floods_its_log_keeps_nobody_waiting(supervised: Supervised) -> None:
    flooding = supervised.shell("while :; do seq 1 10000; done", container=1)
    for _ in range(5):
        assert supervised.end_of(supervised.start("/bin/true")).exit_code == 0
    assert supervised.kill(flooding).exit_code == 128 + signal.SIGKILL


def test_one_that_closes_its_output_costs_nothing(supervised: Supervised) -> None:
    started = supervised.shell("exec >/dev/null 2>&1; while :; do sleep 1; done")
    eventually(lambda: not _prints(started.pid), "the container has closed its output")
    before = _ticks(supervised.pid)
    assert supervised.end_of(supervised.shell("sleep 0.3", container=1)).exit_code == 0
    assert _ticks(supervised.pid) - before < 20  # of the 30 that a loop that never rests would take


def _prints(pid: int) -> bool:
    return ".out" in os.readlink(f"/proc/{pid}/fd/1")


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# ----------------------------------------------------------------------------------- the supervisor's own death


def test_a_container_outlives_its_supervisor(supervised: Supervised) -> None:
    started = supervised.shell("i=0; while :; do i=$((i+1)); echo $i; sleep 0.002; done")
    await_line(supervised, "20")
    born = pidfd.start_time(started.pid)
    supervised.kill_supervisor()
    assert pidfd.start_time(started.pid) == born
    supervised.resume()
    life = supervised.life(started)
    assert (life.running, life.pid) == (True, started.pid)
    assert life.start_time >= started.start_time
    seen = len(supervised.printed().splitlines())
    await_line(supervised, str(seen + 50))
    assert supervised.kill(started).exit_code == 128 + signal.SIGKILL
    printed = supervised.printed().splitlines()
    assert printed == [str(number) for number in range(1, len(printed) + 1)]


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_the_code_of_an_end_that_no_supervisor_saw_is_known(supervised: Supervised, code: int) -> None:
    started = supervised.shell(f"trap 'exit {code}' TERM; echo ready; while :; do sleep 0.01; done")
    await_line(supervised, "ready")
    assert supervised.name(started) in supervised.kept(), "its pidfd is parked before it executes"
    descriptor = pidfd.pidfd_open(started.pid)
    supervised.kill_supervisor()
    os.kill(started.pid, signal.SIGTERM)
    eventually(lambda: pidfd.start_time(started.pid) is None, "the container ends")
    os.close(descriptor)
    supervised.resume()
    assert supervised.end_of(started).exit_code == code
    assert supervised.life(started).exit_code == code


def test_the_code_of_an_end_that_the_next_supervisor_sees_is_known(supervised: Supervised) -> None:
    started = supervised.shell(CATCHER)
    await_line(supervised, "ready")
    supervised.kill_supervisor()
    supervised.resume()
    supervised.signal(started, signal.SIGTERM)
    assert supervised.end_of(started).exit_code == 7


@pytest.fixture
def reaper() -> Iterator[None]:
    """This process is the parent of what loses its own, and waits for none of it."""
    libc.check(libc.libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    yield
    libc.check(libc.libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0))
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def test_the_code_of_an_end_is_known_before_it_is_reaped(supervised: Supervised, reaper: None) -> None:
    """A host's init may take its time."""
    supervised.kill_supervisor()
    supervised.resume()
    started = supervised.shell(CATCHER)
    await_line(supervised, "ready")
    supervised.kill_supervisor()
    supervised.resume()
    supervised.signal(started, signal.SIGTERM)
    assert supervised.end_of(started).exit_code == 7
    found = pidfd.look(started.pid)
    assert found is not None
    assert found.ended


def test_a_full_pipe_waits_for_the_next_supervisor(supervised: Supervised) -> None:
    started = supervised.shell("trap 'seq 1 50000; exit 0' TERM; echo ready; while :; do sleep 0.01; done")
    await_line(supervised, "ready")
    supervised.kill_supervisor()
    os.kill(started.pid, signal.SIGTERM)
    eventually(lambda: _waiting(supervised.fifo(started)) == output.CHUNK, "the pipe is full")
    supervised.resume()
    supervised.end_of(started)
    assert supervised.printed() == "ready\n" + "".join(f"{number}\n" for number in range(1, 50001))


def _waiting(fifo: Path) -> int:
    """The bytes in a FIFO (FIONREAD)."""
    end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return int.from_bytes(fcntl.ioctl(end, termios.FIONREAD, b"\0" * 4), sys.byteorder)
    finally:
        os.close(end)


@pytest.mark.parametrize("silent", ["", ">/dev/null", "2>/dev/null"])
def test_a_pipe_that_was_removed_is_found_at_who_prints_into_it(supervised: Supervised, silent: str) -> None:
    """More than a pipe holds comes through, and nothing is twice or missing, over two deaths of a supervisor."""
    said = "/proc/self/fd/2" if silent.startswith(">") else "/proc/self/fd/1"
    printing = f"exec 3>{said} {silent}; trap 'seq 1 30000 >&3' USR1; echo ready >&3; while :; do sleep 0.01; done"
    started = supervised.shell(printing)
    await_line(supervised, "ready")
    supervised.fifo(started).unlink()
    for _ in range(2):
        supervised.kill_supervisor()
        supervised.resume()
        wanted = 30000 + len(supervised.printed().splitlines())
        supervised.signal(started, signal.SIGUSR1)
        await_lines(supervised, wanted)
    supervised.kill(started)
    assert supervised.printed() == "ready\n" + 2 * "".join(f"{number}\n" for number in range(1, 30001))


def test_one_that_prints_elsewhere_gets_a_new_pipe_for_one_that_was_removed(supervised: Supervised) -> None:
    started = supervised.shell("exec >/dev/null 2>&1; while :; do sleep 0.01; done")
    eventually(lambda: not _prints(started.pid), "the container has closed its output")
    supervised.fifo(started).unlink()
    supervised.kill_supervisor()
    supervised.resume()
    assert supervised.life(started).running
    assert supervised.fifo(started).exists()


def test_what_had_ended_before_the_death_is_still_known(supervised: Supervised) -> None:
    started = supervised.shell("exit 5")
    supervised.end_of(started)
    supervised.kill_supervisor()
    supervised.resume()
    assert supervised.life(started).exit_code == 5
    assert len(supervised.news) == 1


def test_a_start_is_possible_after_the_death(supervised: Supervised) -> None:
    for _ in range(3):
        supervised.kill_supervisor()
        supervised.resume()
        assert supervised.end_of(supervised.start("/bin/true")).exit_code == 0


def test_a_supervisor_that_is_stopped_is_named_with_the_way_out(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CALL_TIMEOUT", 0.05)
    os.kill(supervised.pid, signal.SIGSTOP)
    with pytest.raises(TimedOut, match=f"kill -CONT {supervised.pid}$"):
        supervised.do(supervised.client.list())
    os.kill(supervised.pid, signal.SIGCONT)


def test_a_call_whose_connection_breaks_is_asked_of_the_next_supervisor(supervised: Supervised) -> None:
    """The client learns of the death only by asking: it must not keep itself from hearing of it."""
    started = supervised.start("/bin/sleep", "1000")

    async def kill() -> None:
        supervised.kill_supervisor()
        await supervised.client.kill(started.id, started.attempt)

    supervised.do(kill())
    supervised.end_of(started)


def test_a_start_over_which_the_supervisor_dies_fails_when_nothing_is_left_of_it(supervised: Supervised) -> None:
    """It was stopped before it could execute: a dead supervisor's child, on disk, of which anything may come."""
    child = supervised.waiting()[0]
    os.kill(child, signal.SIGSTOP)
    starting = supervised.begin("/bin/sleep", "1000")
    eventually(lambda: os.path.exists(f"{supervised.site.supervisor_dir}/0.json"), "its process is noted")
    supervised.kill_supervisor()
    with pytest.raises(Problem, match="the supervisor ended"):
        supervised.do(starting)
    assert supervised.do(supervised.client.list()) == []
    assert supervised.end_of(supervised.start("/bin/true")).exit_code == 0


def test_killed_at_any_moment_of_a_start_it_leaves_nothing_half_made(supervised: Supervised) -> None:
    """Either the command runs on, or nothing of it is left; and what was told to have failed does not run."""
    for step in range(8):
        starting = supervised.begin("/bin/sleep", "1000", container=step)
        supervised.do(asyncio.sleep(step * 0.0005))
        supervised.kill_supervisor()
        try:
            started = supervised.do(starting)
        except Problem:
            assert supervised.do(supervised.client.list()) == [], "nothing is known of it"
        else:
            supervised.resume()
            supervised.kill(started)
            supervised.do(supervised.client.forget(started.id, started.attempt))
    eventually(lambda: len(supervised.children()) == 1, "there is nothing but the child in waiting")
    assert supervised.kept() == set()


def test_a_second_supervisor_ends_at_once(supervised: Supervised) -> None:
    pid = supervised.pid
    detach(supervised.site)
    assert supervised.do(supervised.client.list()) == []
    assert supervised.pid == pid


def test_one_with_nothing_to_do_ends_by_itself(site: Site, root: Path) -> None:
    running = Supervised(site, root)
    running.end_of(running.start("/bin/true"))
    descriptor = os.pidfd_open(running.pid)
    running.client.close()
    eventually(
        lambda: pidfd.exit_info(descriptor) is not None or not os.path.exists(f"{site.supervisor_dir}/keep"),
        "the supervisor ends",
    )
    os.close(descriptor)
    again = Supervised(site, root)
    assert [life.exit_code for life in again.lives] == [0]
    again.close()
    running.end_loop()


def test_it_does_not_end_while_a_container_runs(supervised: Supervised) -> None:
    started = supervised.start("/bin/sleep", "1000")
    with pytest.raises(Conflict):
        supervised.do(supervised.client.quit())
    assert supervised.life(started).running


def test_many_lives_are_listed_whole(supervised: Supervised, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a page of them."""
    monkeypatch.setattr(protocol, "PAGE", 3)
    supervised.kill_supervisor()
    supervised.resume()
    ended = [supervised.end_of(supervised.start("/bin/true", container=number)) for number in range(10)]
    assert [life.id for life in supervised.do(supervised.client.list())] == [one.id for one in ended]


def test_what_a_supervisor_had_not_noted_when_it_died_is_cleared_away(supervised: Supervised) -> None:
    """That of its child in waiting, and of a start that came no further. What containers that run need stays."""
    started = supervised.start("/bin/sleep", "1000", container=3)
    eventually(supervised.waiting, "there is a child in waiting")
    supervised.kill_supervisor()
    os.mkfifo(f"{supervised.site.supervisor_dir}/7.out")
    supervised.resume()
    assert len(supervised.do(supervised.client.list())) == 1
    eventually(supervised.waiting, "there is a child in waiting again")
    assert supervised.kept() == {"3.json", supervised.fifo(started).name, supervised.name(started)}


def test_it_ends_also_after_somebody_removed_its_socket(site: Site, root: Path) -> None:
    running = Supervised(site, root)
    os.unlink(f"{site.supervisor_dir}/socket")
    running.close()
