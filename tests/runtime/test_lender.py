"""The process whose memory the child in waiting has: it ends when it is needed no more, and nothing depends on it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess

import pytest

from imageapi.linux import pidfd
from imageapi.runtime import lender
from lab.supervised import Supervised, eventually

pytestmark = pytest.mark.kernel


def pair_in_waiting(supervised: Supervised) -> tuple[int, int]:
    """The child in waiting, and its lender."""
    child = eventually(supervised.waiting, "there is a child in waiting")[0]
    return child, eventually(supervised.lenders, "it has its memory of a lender")[0]


def resident(pid: int, what: str) -> int:
    """kB of a process' memory, of the kind `what` of proc_pid_status(5)."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{what}:"))


def test_a_child_has_its_lenders_memory(supervised: Supervised) -> None:
    child, lent_by = pair_in_waiting(supervised)
    assert resident(child, "VmPTE") == resident(lent_by, "VmPTE")
    with open(f"/proc/{lent_by}/status") as file:
        assert "State:\tD" in file.read(), "it sleeps until the child has executed"


def test_it_ends_when_the_command_is_executed(supervised: Supervised) -> None:
    _, lent_by = pair_in_waiting(supervised)
    started = supervised.start("/bin/sleep", "1000")
    eventually(lambda: pidfd.look(lent_by) is None, "it has ended, and is reaped")
    assert pidfd.start_time(started.pid) is not None


def test_it_goes_after_its_child(supervised: Supervised) -> None:
    """It is woken in the middle of an exec, on the same processor, to do what nobody waits for."""
    child, lent_by = pair_in_waiting(supervised)
    assert (os.sched_getscheduler(lent_by), os.sched_getscheduler(child)) == (os.SCHED_IDLE, os.SCHED_OTHER)


def test_it_is_hurried_and_ended() -> None:
    sleeper = subprocess.Popen(["sleep", "1000"])
    one = lender.Lender(sleeper.pid, os.pidfd_open(sleeper.pid))
    one.wait()
    assert os.sched_getscheduler(one.pid) == os.SCHED_IDLE
    one.hurry()
    assert os.sched_getscheduler(one.pid) == os.SCHED_OTHER
    one.end()
    assert pidfd.look(one.pid) is None
    sleeper.wait()


def test_it_ends_with_a_child_that_is_killed(supervised: Supervised) -> None:
    """And never runs again: else it would go on where the child has left the stack they share."""
    child, lent_by = pair_in_waiting(supervised)
    began = pidfd.start_time(lent_by)
    assert began is not None
    os.kill(supervised.pid, signal.SIGSTOP)  # which reaps it
    os.kill(child, signal.SIGKILL)
    eventually(lambda: pidfd.start_time(lent_by) is None, "it has ended")
    assert pidfd.zombie_status(lent_by, began) == signal.SIGQUIT
    os.kill(supervised.pid, signal.SIGCONT)
    eventually(lambda: not (pidfd.look(lent_by) or pidfd.look(child)), "both are reaped, though there is no start")
    assert supervised.end_of(supervised.start("/bin/true")).exit_code == 0


def test_nothing_depends_on_it(supervised: Supervised) -> None:
    child, lent_by = pair_in_waiting(supervised)
    os.kill(lent_by, signal.SIGKILL)
    started = supervised.start("/bin/sleep", "1000")
    assert started.pid == child
    assert supervised.kill(started).exit_code == 128 + signal.SIGKILL


def test_it_ends_with_the_supervisor(supervised: Supervised) -> None:
    _, lent_by = pair_in_waiting(supervised)
    supervised.kill_supervisor()
    eventually(lambda: pidfd.start_time(lent_by) is None, "it has ended")
    supervised.resume()


def test_at_rest_there_is_none(supervised: Supervised) -> None:
    """Its memory would be counted twice."""
    child, lent_by = pair_in_waiting(supervised)
    eventually(lambda: pidfd.look(lent_by) is None, "it has been let go")
    assert supervised.waiting() == [child]
    assert supervised.start("/bin/sleep", "1000").pid == child


def test_a_clone_that_the_kernel_refuses_is_told(supervised: Supervised) -> None:
    with pytest.raises(OSError) as refused:
        lender.clone(0, 1 << 20)  # no such group
    assert refused.value.errno == errno.EBADF
