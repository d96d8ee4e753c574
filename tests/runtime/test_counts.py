"""What a start and an end cost, by the calls that they make of the kernel. Beside each bound stands what was counted
when it was set."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

import pytest

from lab.counting import counted
from lab.supervised import Supervised, eventually

pytestmark = pytest.mark.kernel

_CALL = re.compile(r"(\d+) +(\w+)\(")


def calls(record: Path, pid: int) -> list[str]:
    """The system calls of a process, in their order."""
    found = (_CALL.match(line) for line in record.read_text().splitlines())
    return [call[2] for call in found if call and int(call[1]) == pid]


def test_a_start_is_few_calls(supervised: Supervised, tmp_path: Path) -> None:
    child = eventually(supervised.waiting, "there is a child in waiting")[0]
    record = tmp_path / "start"
    with counted([supervised.pid, child], record):
        started = supervised.start("/bin/sleep", "1000")
        assert started.pid == child
    waited = calls(record, child)
    between = waited[waited.index("recvmsg") :]
    assert between.index("execve") <= 38, between  # 37
    ours = calls(record, supervised.pid)
    assert ours.index("sendto") <= 12, f"the gate is opened late: {ours}"  # 11, with three to watch the child
    before_the_next_fifo = list(takewhile("mknodat".__ne__, ours))
    assert len(before_the_next_fifo) <= 27, ours  # 25, with the end of the lender


def test_an_end_is_few_calls(supervised: Supervised, tmp_path: Path) -> None:
    started = supervised.start("/bin/sleep", "1000")
    eventually(supervised.waiting, "there is a child in waiting")
    record = tmp_path / "end"
    with counted([supervised.pid], record):
        supervised.kill(started)
    ours = calls(record, supervised.pid)
    assert len(ours) <= 32, ours  # 30, of which the look for a freezer that SIGKILL takes makes 7


def test_a_container_has_no_process_but_its_own(supervised: Supervised) -> None:
    eventually(supervised.waiting, "there is a child in waiting")
    running = [supervised.start("/bin/sleep", "1000", container=number).pid for number in range(10)]
    eventually(supervised.waiting, "there is a child in waiting again")
    assert len(supervised.waiting()) == 1
    assert sorted(supervised.children()) == sorted(running + supervised.waiting())
