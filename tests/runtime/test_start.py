"""A start on the real kernel: what a container finds, what it does not, and what is said of it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imageapi.config import Site
from imageapi.errors import Conflict, Exhausted, Invalid, Problem, TimedOut
from imageapi.linux import mountinfo, pidfd
from imageapi.runtime import layout
from imageapi.runtime.child import Child
from imageapi.runtime.loop import Loop
from imageapi.runtime.protocol import Started
from lab.supervised import PATIENCE, Supervised, eventually, mounted, overlay

pytestmark = pytest.mark.kernel

STEPS = """\
making all mounts private
preparing image
mounting /proc
mounting /dev
mounting /dev/shm
mounting /dev/mqueue
mounting /dev/pts
mounting /sys
making device file /dev/null
making device file /dev/zero
making device file /dev/full
making device file /dev/tty
making device file /dev/random
making device file /dev/urandom
creating symlink /dev/pts/ptmx -> /dev/ptmx
creating symlink /proc/self/fd -> /dev/fd
creating symlink /proc/self/fd/0 -> /dev/stdin
creating symlink /proc/self/fd/1 -> /dev/stdout
creating symlink /proc/self/fd/2 -> /dev/stderr
executing init
"""
"""The tutorial's lines for a container without systemd."""


def test_the_log_has_every_step_in_the_tutorials_order(supervised: Supervised) -> None:
    supervised.end_of(supervised.start("/bin/true"))
    assert supervised.steps() == [f"init: {step}" for step in STEPS.splitlines()]
    told = [line.split(" ", 2)[2] for line in supervised.log().splitlines()]
    assert told[:2] == ["container(0): validating image", "container(0): validating init"]
    assert all(re.match(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \S", line) for line in supervised.log().splitlines())


def test_a_command_prints_into_its_log(supervised: Supervised) -> None:
    assert supervised.output("echo one; echo two >&2; echo three") == "one\ntwo\nthree\n"


@pytest.mark.parametrize("code", [0, 1, 2, 126, 127, 128, 200, 255])
def test_an_exit_code_is_reported(supervised: Supervised, code: int) -> None:
    assert supervised.end_of(supervised.shell(f"exit {code}")).exit_code == code


def test_every_exit_code_is_told_from_every_other(supervised: Supervised) -> None:
    started = [supervised.shell(f"exit {code}", container=code) for code in range(0, 256, 5)]
    assert [supervised.end_of(one).exit_code for one in started] == list(range(0, 256, 5))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_an_end_by_a_signal_is_128_and_its_number(supervised: Supervised, number: int) -> None:
    started = supervised.start("/bin/sleep", "1000")
    assert supervised.life(started).running
    os.kill(started.pid, signal.SIGKILL if number == signal.SIGKILL else signal.SIGCONT)
    if number != signal.SIGKILL:
        supervised.signal(started, number)  # a pid namespace's first process ignores it: it has no handler
        assert supervised.life(started).running
        number = signal.SIGKILL
        supervised.kill(started)
    assert supervised.end_of(started).exit_code == 128 + number


def test_the_pid_is_the_hosts_number_of_the_first_process(supervised: Supervised) -> None:
    """Which has passed the point of no return of its exec; its arguments are there a moment later."""
    started = supervised.start("/bin/sleep", "1000")
    command = eventually(Path(f"/proc/{started.pid}/cmdline").read_bytes, "the program is loaded")
    assert command == b"/bin/sleep\x001000\x00"
    born = pidfd.start_time(started.pid)
    assert born is not None
    assert 0 <= started.start_time - born < 100 * PATIENCE
    assert f"NSpid:\t{started.pid}\t1\n" in Path(f"/proc/{started.pid}/status").read_text()


def test_its_age_is_counted_from_the_exec(supervised: Supervised) -> None:
    """However long the start took before."""
    child = in_waiting(supervised)
    os.kill(child, signal.SIGSTOP)
    starting = supervised.begin("/bin/sleep", "1000")
    eventually(lambda: os.path.exists(f"{supervised.site.supervisor_dir}/0.json"), "its process is noted")
    noted = ticks()
    eventually(lambda: ticks() > noted + 1, "the clock goes on while it stands")
    before = ticks()
    os.kill(child, signal.SIGCONT)
    started = supervised.do(starting)
    assert before <= started.start_time <= ticks()
    assert supervised.life(started).start_time == started.start_time
    supervised.kill_supervisor()
    supervised.resume()
    assert before <= supervised.life(started).start_time <= ticks()


def ticks() -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


# ------------------------------------------------------------------------------------------- what it is given


def test_the_environment_is_path_and_nothing_of_the_servers(supervised: Supervised) -> None:
    supervised.end_of(supervised.start("/bin/env"))
    assert supervised.printed() == f"PATH={layout.PATH}\n"


def test_stdin_is_null_and_nothing_else_is_open(supervised: Supervised) -> None:
    started = supervised.start("/bin/sleep", "1000")
    links = {int(link.name): os.readlink(link) for link in Path(f"/proc/{started.pid}/fd").iterdir()}
    assert links == {0: "/dev/null", 1: str(supervised.fifo(started)), 2: str(supervised.fifo(started))}


def test_reading_stdin_ends_at_once(supervised: Supervised) -> None:
    assert supervised.output("cat; echo end") == "end\n"


def test_it_has_namespaces_of_its_own(supervised: Supervised) -> None:
    started = supervised.start("/bin/sleep", "1000")
    ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
    theirs = {name: os.readlink(f"/proc/{started.pid}/ns/{name}") for name in ours}
    different = {name for name in ours if ours[name] != theirs[name]}
    assert different == {"mnt", "pid", "pid_for_children", "uts", "ipc"}


def test_it_sees_its_own_mounts_and_none_of_the_hosts(supervised: Supervised) -> None:
    mounts = [line.split()[1:3] for line in supervised.output("cat /proc/mounts").splitlines()]
    assert sorted(mounts) == [
        ["/", "overlay"],
        ["/dev", "tmpfs"],
        ["/dev/mqueue", "mqueue"],
        ["/dev/pts", "devpts"],
        ["/dev/shm", "tmpfs"],
        ["/proc", "proc"],
        ["/sys", "sysfs"],
    ]


def test_its_mounts_are_private(supervised: Supervised) -> None:
    lines = supervised.output("cat /proc/self/mountinfo").splitlines()
    assert lines
    assert not [line for line in lines if "shared:" in line or "master:" in line]


def test_devices_are_those_of_the_table_and_open_to_all(supervised: Supervised) -> None:
    listing = supervised.output("cd /dev && stat -c '%n %a %t:%T' null zero full tty random urandom; echo x > null")
    assert listing.splitlines() == [
        *("null 666 1:3", "zero 666 1:5", "full 666 1:7", "tty 666 5:0", "random 666 1:8", "urandom 666 1:9"),
    ]


def test_links_lead_to_descriptors_and_terminals(supervised: Supervised) -> None:
    listing = supervised.output("for n in ptmx fd stdin stdout stderr; do readlink /dev/$n; done")
    assert listing.split() == ["/dev/pts/ptmx", "/proc/self/fd", *(f"/proc/self/fd/{number}" for number in range(3))]


def test_a_start_resets_what_a_process_inherits(site: Site, root: Path) -> None:
    """The supervisor is launched as `nohup nice` would: none of it reaches the container."""
    os.nice(5)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = os.umask(0o077)
    try:
        running = Supervised(site, root)
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.umask(before)
    try:
        running.end_of(running.start("/bin/cat", "/proc/1/status"))
        status = dict(line.split(":\t") for line in running.printed().splitlines() if ":\t" in line)
        said = running.output("umask; ulimit -n; ulimit -c; cut -d' ' -f6,19 /proc/1/stat; cat /proc/1/oom_score_adj")
    finally:
        running.close()
    assert [int(status[mask], 16) for mask in ("SigBlk", "SigIgn", "SigCgt")] == [0, 0, 0]
    assert status["Groups"].strip() == ""
    assert said.split() == ["0022", "1024", "0", "1", "0", "0"]


def test_the_hosts_name_is_kept_unless_another_is_given(supervised: Supervised) -> None:
    assert supervised.output("hostname").strip() == os.uname().nodename
    assert supervised.output("hostname", hostname="box").strip() == "box"
    assert os.uname().nodename != "box"


# ------------------------------------------------------------------------------------- what cannot be executed


FAILURES = {
    "/bin/nope": "there is no /bin/nope in the image",
    "/bin": "/bin is a directory",
    "/bin/plain": "is not executable",
    "/bin/no-interpreter": "/missing/interp",
    "/bin/wrong-arch": f"this host is {os.uname().machine}",
    "/data/dangling": "there is no /data/dangling",
    "/bin/sh/x": "cannot be reached",
    "/dev/null": "there is no /dev/null in the image",
}


@pytest.mark.parametrize(("program", "reason"), FAILURES.items())
def test_a_command_that_cannot_be_executed_says_why_and_leaves_nothing(
    supervised: Supervised, program: str, reason: str
) -> None:
    with pytest.raises(Invalid, match=re.escape(reason)):
        supervised.start(program)
    assert supervised.do(supervised.client.list()) == []
    in_waiting(supervised)
    eventually(lambda: supervised.kept() == set(), "nothing is kept for it")
    assert supervised.news == []


def test_a_program_whose_loader_is_missing_names_it(supervised: Supervised, root: Path) -> None:
    source = b"int main(void) { return 0; }"
    subprocess.run(["gcc", "-x", "c", "-", "-o", str(root / "bin/dynamic")], input=source, check=True)
    with pytest.raises(Invalid, match=r"the dynamic loader that /bin/dynamic needs"):
        supervised.start("/bin/dynamic")


STATIC = Path("/bin/busybox").read_bytes()
UNUSABLE = {
    "an object file": STATIC[:16] + b"\1\0" + STATIC[18:],
    "cut after its header": STATIC[:64],
    "an interpreter of bytes": b"#!/bin/\xff\n",
    "an interpreter that ends at a NUL": b"#!/bin/none\0\n",
    "an interpreter with a carriage return": b"#!/bin/sh\r\n",
    "segments of an odd size": STATIC[:54] + b"\x20\0" + STATIC[56:],
}


@pytest.mark.parametrize("content", UNUSABLE.values(), ids=UNUSABLE)
def test_a_program_that_is_none_is_told_as_the_commands_own_fault(
    supervised: Supervised, root: Path, content: bytes
) -> None:
    (root / "bin/odd").write_bytes(content)
    (root / "bin/odd").chmod(0o755)
    with pytest.raises(Invalid, match=r"/bin/odd"):
        supervised.start("/bin/odd")


def test_a_loader_that_is_a_script_is_not_the_storages_fault(supervised: Supervised, root: Path) -> None:
    source = b"int main(void) { return 0; }"
    loader = "-Wl,--dynamic-linker=/bin/loader"
    subprocess.run(["gcc", "-x", "c", "-", loader, "-o", str(root / "bin/dynamic")], input=source, check=True)
    (root / "bin/loader").write_bytes(b"#!/bin/sh\n")
    (root / "bin/loader").chmod(0o755)
    with pytest.raises(Invalid, match=r"/bin/loader, the dynamic loader that /bin/dynamic needs, is no"):
        supervised.start("/bin/dynamic")


def test_a_root_without_a_mountpoint_gets_it_where_it_can(supervised: Supervised, root: Path) -> None:
    for name in ("proc", "sys", "dev"):
        (root / name).rmdir()
    assert supervised.output("cut -d' ' -f1 /proc/1/stat") == "1\n"


def test_a_read_only_root_without_a_mountpoint_names_it_and_the_remedy(supervised: Supervised, run_dir: Path) -> None:
    bare = run_dir / "bare"
    (bare / "proc").mkdir(parents=True)
    (bare / "bin").mkdir()
    shutil.copy("/bin/busybox", bare / "bin/true")
    with mounted(run_dir / "ro", "--bind", "-o", "ro", str(bare)) as root:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(root)], check=True)
        with pytest.raises(Invalid, match=r"no directory /dev and is read-only; run the container on an overlay"):
            supervised.start("/bin/true", root=root)


def test_a_read_only_root_runs(supervised: Supervised, image: Path) -> None:
    assert supervised.output("cat /data/message; touch /data/x 2>&1 || true", root=image).startswith("written when")


# ------------------------------------------------------------------------------------------------- hostile images


@pytest.mark.parametrize("target", ["/etc", "/proc/1/root", "../../../../etc", "VICTIM"])
@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
def test_a_symlink_in_place_of_a_mountpoint_never_reaches_the_host(
    supervised: Supervised, root: Path, run_dir: Path, name: str, target: str
) -> None:
    """The victim is a directory that the host has by this path, and the image has not."""
    (victim := run_dir / "victim").mkdir()
    (root / name).rmdir()
    (root / name).symlink_to(target.replace("VICTIM", str(victim)))
    with contextlib.suppress(Problem):
        supervised.end_of(supervised.start("/bin/true"))
    touched = {mount.mountpoint for mount in mountinfo.read()} & {"/etc", str(victim)}
    assert not touched
    assert not {"shm", "null", "pts"} & {*os.listdir("/etc"), *os.listdir(victim)}


@pytest.mark.parametrize("number", range(3, 20))
def test_no_descriptor_of_the_hosts_can_be_named_by_the_image(supervised: Supervised, root: Path, number: int) -> None:
    """Were a host's directory still open in the first process, /dev would lead there as soon as /proc is mounted. What
    it may lead to is the container's own /sys, which is on its way to its place."""
    (root / "dev").rmdir()
    (root / "dev").symlink_to(f"/proc/self/fd/{number}")
    with contextlib.suppress(Problem):
        supervised.end_of(supervised.start("/bin/true"))
    host = {supervised.site.supervisor_dir, supervised.site.logs_dir}
    assert not {mount.mountpoint for mount in mountinfo.read()} & host
    assert not {"shm", "null", "pts"} & set(os.listdir(supervised.site.supervisor_dir))
    assert not {"shm", "null", "pts"} & set(os.listdir(supervised.site.logs_dir))


# ---------------------------------------------------------------------------------------------------- many


def test_a_running_container_is_not_started_again(supervised: Supervised) -> None:
    started = supervised.start("/bin/sleep", "1000")
    with pytest.raises(Conflict, match=str(started.pid)):
        supervised.start("/bin/sleep", "1000")
    assert supervised.life(started).running


def test_an_ended_container_is_started_again(supervised: Supervised) -> None:
    for code in (3, 4, 5):
        assert supervised.end_of(supervised.shell(f"exit {code}")).exit_code == code
    assert [life.attempt for life in supervised.do(supervised.client.list())] == [3]


def descriptors_at_rest(supervised: Supervised) -> int:
    """How many it has when the next child is parked, and the keep left: the way back is one, too."""
    in_waiting(supervised)
    eventually(lambda: _mounts(supervised) == 2, "it has left the keep, where it parks the next child")
    return len(os.listdir(f"/proc/{supervised.pid}/fd"))


def test_two_hundred_starts_leave_nothing(supervised: Supervised) -> None:
    supervised.end_of(supervised.start("/bin/true"))
    descriptors = descriptors_at_rest(supervised)
    for _ in range(200):
        assert supervised.end_of(supervised.start("/bin/true")).exit_code == 0
    eventually(lambda: descriptors_at_rest(supervised) <= descriptors, "there are no more descriptors than before")
    supervised.do(supervised.client.forget(0, 201))
    assert supervised.kept() == set()


def _mounts(supervised: Supervised) -> int:
    """How many mounts the supervisor sees."""
    return len(Path(f"/proc/{supervised.pid}/mountinfo").read_text().splitlines())


def test_many_run_at_once(supervised: Supervised) -> None:
    started = [supervised.shell("sleep 0.2; exit 9", container=number) for number in range(30)]
    assert len({one.pid for one in started}) == 30
    assert {supervised.end_of(one).exit_code for one in started} == {9}


def test_a_container_over_two_images_sees_both(supervised: Supervised, image: Path, run_dir: Path) -> None:
    top = run_dir / "top"
    (top / "data").mkdir(parents=True)
    (top / "data/more").write_text("from the top\n")
    with overlay(Path(f"{top}:{image}"), run_dir / "two") as root:
        assert supervised.output("cat /data/more /data/message", root=root).startswith("from the top\nwritten")


# ------------------------------------------------------------------------------------- what the supervisor goes through


def test_a_start_does_without_the_child_in_waiting(supervised: Supervised) -> None:
    """Somebody has killed it; the next one is there again afterwards."""
    child = in_waiting(supervised)
    os.kill(child, signal.SIGKILL)
    eventually(lambda: pidfd.start_time(child) is None, "it has ended")
    assert supervised.end_of(supervised.start("/bin/true")).exit_code == 0
    assert in_waiting(supervised) != child


def in_waiting(supervised: Supervised) -> int:
    """The child in waiting, while no container runs, once the supervisor has done all that it does for it."""
    child = eventually(supervised.children, "there is a child in waiting")[0]
    supervised.do(supervised.client.list())
    return child


class Scarcity:
    """Has a method of the supervisor's fail once it was called `after` times, from `begin` to `end`."""

    def __init__(self) -> None:
        self._us = os.getpid()
        self._left = mmap.mmap(-1, mmap.PAGESIZE)  # it is all that the supervisor and the test have together

    def begin(self, after: int) -> None:
        self._left[0] = after + 1

    def end(self) -> None:
        self._left[0] = 0

    def before(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if os.getpid() != self._us and self._left[0] == 1:
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
            self._left[0] -= self._left[0] > 0
            return method(*arguments)

        return wrapped


@pytest.mark.parametrize("systemd", [False, True])
@pytest.mark.parametrize(("of", "name", "steps"), [(Child, "order", 1), (Loop, "watch", 3)], ids=["order", "watch"])
def test_a_start_for_which_there_is_no_memory_leaves_nothing(
    site: Site, root: Path, monkeypatch: pytest.MonkeyPatch, of: type, name: str, steps: int, *, systemd: bool
) -> None:
    """Neither of the child in waiting nor of a new one; and the next start succeeds."""
    scarce = Scarcity()
    monkeypatch.setattr(of, name, scarce.before(getattr(of, name)))
    with contextlib.closing(Supervised(site, root)) as running:
        running.kill(running.start("/bin/sleep", "1000", systemd=systemd))
        descriptors = descriptors_at_rest(running)
        for step in range(steps):
            scarce.begin(step)
            with pytest.raises(Exhausted):
                running.start("/bin/sleep", "1000", container=1, systemd=systemd)
            scarce.end()
            assert [life.id for life in running.do(running.client.list())] == [0]
            running.kill(running.start("/bin/sleep", "1000", systemd=systemd))
        eventually(lambda: descriptors_at_rest(running) <= descriptors, "there are no more descriptors than before")
        assert running.kept() == {"0.json"}


def test_one_that_is_killed_before_its_exec_was_not_started(supervised: Supervised) -> None:
    """It has its orders, and cannot read them: it is stopped."""
    child = in_waiting(supervised)
    os.kill(child, signal.SIGSTOP)
    starting = supervised.begin("/bin/true")
    eventually(lambda: os.path.exists(f"{supervised.site.supervisor_dir}/0.json"), "its process is noted")
    os.kill(child, signal.SIGKILL)
    with pytest.raises(Problem, match="killed before it could execute"):
        supervised.do(starting)
    assert supervised.do(supervised.client.list()) == []


def test_an_exec_that_does_not_come_back_is_given_up(supervised: Supervised) -> None:
    """The failure is told at once; that the process has ended is news when it has."""
    with pytest.raises(TimedOut, match="storage does not answer"):
        supervised.start("/bin/sleep", "1000", timeout=0.0)
    supervised.end_of(Started(0, 1, 0, 0))
    assert not supervised.do(supervised.client.list())[0].running
    assert supervised.end_of(supervised.start("/bin/true")).exit_code == 0


def test_an_order_to_one_that_has_ended_is_done_already(supervised: Supervised) -> None:
    started = supervised.start("/bin/true")
    supervised.end_of(started)
    supervised.signal(started, signal.SIGTERM)
    supervised.do(supervised.client.kill(started.id, started.attempt))
