"""A supervisor becomes one of another release, in place: its containers do not notice."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from imageapi.config import Site
from imageapi.errors import Problem
from imageapi.linux import pidfd
from imageapi.runtime import protocol, successor
from imageapi.runtime.protocol import Upgrade
from lab.supervised import Supervised, eventually

pytestmark = pytest.mark.kernel

CATCHER = "trap 'echo caught; exit 7' TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.002; done"


@pytest.fixture
def old(site: Site, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervised]:
    """A supervisor of an older release, which this process, as its client, does not know yet."""
    monkeypatch.setattr(protocol, "RELEASE", "0.0.1")
    running = Supervised(site, root)
    monkeypatch.undo()
    yield running
    running.close()


def _counted(supervised: Supervised, container: int = 0) -> int:
    """How far a container has counted; nothing is missing."""
    numbers = [line for line in supervised.printed(container).splitlines() if line.isdigit()]
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    return len(numbers)


def _await_more(supervised: Supervised) -> None:
    before = _counted(supervised)
    eventually(lambda: _counted(supervised) > before + 20, "it counts on, and is heard")


def test_the_containers_are_still_its_children_and_do_not_notice(old: Supervised) -> None:
    started, pid = old.shell(CATCHER), old.pid
    _await_more(old)
    old.reconnect()
    assert (old.pid, old.life(started).running) == (pid, True)
    assert _program(pid)[1:4] == ["-P", "-m", successor.__name__]
    assert started.pid in old.children()
    _await_more(old)
    old.signal(started, signal.SIGTERM)
    assert old.end_of(started).exit_code == 7
    assert old.printed().endswith("caught\n")
    _counted(old)
    eventually(lambda: pidfd.look(started.pid) is None, "its parent reaps it")
    assert old.output("echo again") == "again\n"


def _program(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def test_one_of_this_release_stays_as_it_is(supervised: Supervised) -> None:
    pid, program = supervised.pid, _program(supervised.pid)
    supervised.reconnect()
    assert (supervised.pid, _program(pid)) == (pid, program)


def test_an_end_that_comes_while_it_upgrades_is_known(old: Supervised, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has ended, and its parent is neither the old supervisor any more nor the new one yet."""
    started, pid = old.shell("trap 'exit 9' TERM; echo ready; while :; do sleep 0.002; done"), old.pid
    eventually(lambda: "ready" in old.printed(), "it is ready")
    order = successor.order(old.site)
    script = (
        f"import os, sys; os.kill({started.pid}, {signal.SIGTERM}); "
        f"os.waitid(os.P_PID, {started.pid}, os.WEXITED | os.WNOWAIT); os.execv(sys.argv[1], sys.argv[1:])"
    )
    argv = [sys.executable, "-c", script, *order.argv]
    monkeypatch.setattr(successor, "order", lambda _: Upgrade(argv, order.environment))
    old.reconnect()
    assert old.pid == pid
    eventually(lambda: not old.life(started).running, "its end is known")
    assert old.life(started).exit_code == 9


def test_a_program_that_is_not_there_changes_nothing(old: Supervised, monkeypatch: pytest.MonkeyPatch) -> None:
    started, pid = old.shell(CATCHER), old.pid
    with monkeypatch.context() as patch:
        patch.setattr(successor, "order", lambda _: Upgrade(["/bin/nothing"], {}))
        with pytest.raises(Problem, match="upgrading the supervisor to /bin/nothing"):
            old.reconnect()
    assert _program(pid) != ["/bin/nothing"]
    assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    _await_more(old)
    old.reconnect()
    assert old.life(started).running


def test_a_program_that_fails_is_followed_by_another_supervisor(
    old: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, pid = old.shell(CATCHER), old.pid
    monkeypatch.setattr(successor, "order", lambda _: Upgrade(["/bin/false"], {}))
    old.reconnect()
    assert old.pid != pid
    assert old.life(started).running
    old.signal(started, signal.SIGTERM)
    assert old.end_of(started).exit_code == 7
    _counted(old)


def test_one_that_stays_another_is_refused_with_the_way_out(old: Supervised, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "RELEASE", "0.9")
        with pytest.raises(Problem, match=f"kill it, process {old.pid}"):
            old.reconnect()
    old.reconnect()


def test_what_a_later_version_adds_is_no_hindrance() -> None:
    """Hello, Upgrade and Welcome are understood by all versions."""
    hello = b'{"number":1,"body":{"type":"Hello","version":99,"more":[1]}}'
    upgrade = b'{"number":2,"body":{"type":"Upgrade","argv":["/x"],"environment":{},"more":{}}}'
    assert protocol.decode_call(hello).body == protocol.Hello(99)
    assert protocol.decode_call(upgrade).body == Upgrade(["/x"], {})
    welcome = msgspec.json.encode({"number": 1, "body": {"type": "Welcome", "version": 99, "pid": 5, "more": ""}})
    assert protocol.decode_reply(welcome).body == protocol.Welcome(99, 5)
    assert shlex.join(successor.order(Site()).argv)
