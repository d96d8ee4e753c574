"""Processes by descriptor."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageapi.linux import libc, pidfd
from lab.server import eventually

pytestmark = pytest.mark.kernel


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps, and takes no signal."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def await_end(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(10_000)


def test_the_number_of_a_thread_is_no_process() -> None:
    """As the pid of a process that has ended may be by now."""
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        with pytest.raises(ProcessLookupError):
            pidfd.pidfd_open(thread.native_id)
    finally:
        go_on.set()
        thread.join()


LEADERLESS = """
import ctypes, os, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
ctypes.CDLL(None).syscall({"x86_64": 60}.get(os.uname().machine, 93), 0)
"""
"""Ends its first thread by exit(2), and goes on with another."""


def test_a_process_whose_first_thread_has_ended_lives() -> None:
    process = subprocess.Popen([sys.executable, "-c", LEADERLESS])
    try:
        eventually(lambda: (found := pidfd.look(process.pid)) and found.state == "Z", "the first thread ends")
        assert pidfd.start_time(process.pid) is not None
    finally:
        process.kill()
        process.wait()
    assert pidfd.start_time(process.pid) is None


def test_a_zombie_has_no_start_time(sleeper: subprocess.Popen[bytes]) -> None:
    assert pidfd.start_time(sleeper.pid) is not None
    descriptor = pidfd.pidfd_open(sleeper.pid)
    pidfd.send_signal(descriptor, signal.SIGKILL)
    await_end(descriptor)
    assert pidfd.start_time(sleeper.pid) is None
    os.close(descriptor)


@pytest.mark.parametrize("script", ["exit 42", "kill -9 $$"])
def test_an_end_is_known_before_it_is_reaped(script: str) -> None:
    process = subprocess.Popen(["sh", "-c", f"read line; {script}"], stdin=subprocess.PIPE)
    descriptor, began = pidfd.pidfd_open(process.pid), pidfd.start_time(process.pid)
    assert began is not None
    assert pidfd.zombie_status(process.pid, began) is None
    assert pidfd.is_child(descriptor)
    assert process.stdin is not None
    process.stdin.close()
    await_end(descriptor)
    status = pidfd.zombie_status(process.pid, began)
    assert pidfd.zombie_status(process.pid, began - 1) is None
    assert pidfd.is_child(descriptor)
    assert status is not None
    assert os.waitstatus_to_exitcode(status) == process.wait()
    assert pidfd.zombie_status(process.pid, began) is None
    assert not pidfd.is_child(descriptor)
    os.close(descriptor)


def test_an_end_that_may_not_be_known_is_not_guessed() -> None:
    """The kernel shows another user a status of 0."""
    process = subprocess.Popen(["sh", "-c", "exit 42"])
    descriptor = pidfd.pidfd_open(process.pid)
    await_end(descriptor)
    found = pidfd.look(process.pid)
    assert found is not None
    ask = (
        f"import os; from imageapi.linux import pidfd; os.setuid(65534); "
        f"print(pidfd.look({process.pid}).status, pidfd.zombie_status({process.pid}, {found.began}))"
    )
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert (found.status, told.stdout.split()) == (42 << 8, ["0", "None"])
    process.wait()
    os.close(descriptor)


def test_an_end_is_known_once_it_is_reaped() -> None:
    process = subprocess.Popen(["sh", "-c", "exit 42"])
    descriptor = pidfd.pidfd_open(process.pid)
    await_end(descriptor)
    assert pidfd.exit_info(descriptor) is None
    process.wait()
    status = pidfd.exit_info(descriptor)
    assert status is not None
    assert os.waitstatus_to_exitcode(status) == 42
    with pytest.raises(ProcessLookupError):
        pidfd.send_signal(descriptor, signal.SIGTERM)
    os.close(descriptor)


def test_two_descriptors_of_a_process_share_an_inode_that_is_its_own(sleeper: subprocess.Popen[bytes]) -> None:
    ours, one, other = (pidfd.pidfd_open(pid) for pid in (os.getpid(), sleeper.pid, sleeper.pid))
    assert pidfd.inode(one) == pidfd.inode(other) != pidfd.inode(ours)
    for descriptor in (ours, one, other):
        os.close(descriptor)


def test_a_file_is_no_pidfd(sleeper: subprocess.Popen[bytes]) -> None:
    descriptor, file = pidfd.pidfd_open(sleeper.pid), os.open("/dev/null", os.O_RDONLY)
    assert pidfd.is_pidfd(descriptor)
    assert not pidfd.is_pidfd(file)
    os.close(descriptor)
    os.close(file)


def test_a_signal_that_is_handled_or_waited_for_is_caught(sleeper: subprocess.Popen[bytes]) -> None:
    assert not pidfd.catches(sleeper.pid, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    assert pidfd.catches(os.getpid(), signal.SIGUSR1)
    assert pidfd.catches(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR1, old)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert not pidfd.catches(os.getpid(), signal.SIGUSR1)


def test_a_signal_that_is_just_being_waited_for_is_caught() -> None:
    """The kernel takes it out of the blocked ones as long as it is waited for."""
    wait = "import signal as s; s.pthread_sigmask(s.SIG_BLOCK, {s.SIGTERM}); print(flush=True); s.sigwait({s.SIGTERM})"
    with subprocess.Popen([sys.executable, "-c", wait], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        call = Path(f"/proc/{process.pid}/syscall")
        eventually(lambda: call.read_text().startswith(f"{libc.SYS_rt_sigtimedwait} "), "it waits for a signal")
        assert pidfd.catches(process.pid, signal.SIGTERM)
        assert not pidfd.catches(process.pid, signal.SIGUSR1)
        process.terminate()
    assert process.returncode == 0


def test_one_that_is_gone_catches_nothing() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert not pidfd.catches(process.pid, signal.SIGTERM)
    assert pidfd.start_time(process.pid) is None
