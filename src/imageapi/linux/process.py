"""What a process can say of itself: its name, its descriptors, its signals, its limits, whom it dies with. See
prctl(2), getrlimit(2).
"""

from __future__ import annotations

import os
import resource
import signal

from imageapi.linux.libc import SYS_rt_sigaction, check, libc, syscall

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15

_UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
LIMITS: tuple[tuple[int, tuple[int, int]], ...] = (
    (resource.RLIMIT_STACK, (8 << 20, resource.RLIM_INFINITY)),
    (resource.RLIMIT_CORE, (0, resource.RLIM_INFINITY)),
    (resource.RLIMIT_NICE, (0, 0)),
    (resource.RLIMIT_RTPRIO, (0, 0)),
    *((number, _UNLIMITED) for number in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA)),
    *((number, _UNLIMITED) for number in (resource.RLIMIT_FSIZE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_NPROC)),
)
"""systemd's own defaults for a service, and no limit on locked memory, which RDMA needs; beside them DESCRIPTORS."""
DESCRIPTORS = (1024, 524288)


def name(text: str) -> None:
    """What ps shows in its CMD column for this process: at most 15 bytes (comm in proc(5))."""
    check(libc.prctl(PR_SET_NAME, os.fsencode(text)[:15], 0, 0, 0), text)


def find_program(program: str) -> str | None:
    """The path of an executable of this name in PATH; None when there is none."""
    paths = (os.path.join(directory, program) for directory in os.get_exec_path())
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), None)


def die_with_parent(signal: int) -> None:
    """Have the kernel send `signal` to this process when its parent ends; it is kept over execve, not over fork.

    The parent may have ended already: who must be sure looks at os.getppid() afterwards.
    """
    check(libc.prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0), "PR_SET_PDEATHSIG")


def forbid_dumps() -> None:
    """Have no core made of this memory, whoever asks for one; until the next execve."""
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")


def close_all_but(*kept: int) -> None:
    """Close every descriptor above stderr except those `kept`."""
    low = 3
    for descriptor in sorted(kept):
        if low < descriptor:
            os.closerange(low, descriptor)
        low = max(low, descriptor + 1)
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


_SIGSET_SIZE = 8
_DEFAULT = bytes(32)
"""struct sigaction as the kernel has it: SIG_DFL, no flags, nothing masked."""


def ignored_signals() -> list[int]:
    """The signals this process ignores, those among them that the C library keeps for itself."""
    with open("/proc/self/status", "rb") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith(b"SigIgn:"))
    return [number for number in range(1, 65) if mask >> (number - 1) & 1]


def reset_signal(number: int) -> None:
    """Give a signal its default action again. The C library refuses this for 32 and 33, which are its own, but a
    process that ignores them hands that on to whatever it executes: so the kernel is asked (rt_sigaction(2))."""
    syscall(SYS_rt_sigaction, number, _DEFAULT, None, _SIGSET_SIZE)


def renounce() -> None:
    """Give up what this process was started with, for all that it forks: supplementary groups, a priority, limits, a
    mask of signals, and signals that are ignored. They get a handler that does nothing: this process goes on taking
    none of them, and one that executes has the default (execve(2))."""
    os.setgroups([])
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    for number, (soft, hard) in LIMITS:
        limit(number, soft, hard)
    for ignored in ignored_signals():
        try:
            signal.signal(ignored, lambda *_: None)
        except (OSError, ValueError):
            reset_signal(ignored)  # one of the C library's own
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def limit(number: int, soft: int, hard: int) -> None:
    """Set a limit; what may not be raised (CAP_SYS_RESOURCE) stays as it is."""
    try:
        resource.setrlimit(number, (soft, hard))
    except ValueError:
        _, most = resource.getrlimit(number)
        within = [value if value != resource.RLIM_INFINITY and value < most else most for value in (soft, hard)]
        resource.setrlimit(number, (within[0], within[1]))


def reset_oom_score() -> None:
    """Be neither spared nor preferred when memory runs out."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")
