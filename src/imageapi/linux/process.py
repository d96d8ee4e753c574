"""What a process can say of itself: its name, its descriptors, its signals, whom it dies with. See prctl(2)."""

from __future__ import annotations

import os

from imageapi.linux.libc import SYS_rt_sigaction, check, libc, syscall

PR_SET_PDEATHSIG = 1


def name(text: str) -> None:
    """What ps shows in its CMD column for this process: at most 15 characters (comm in proc(5))."""
    with open("/proc/self/comm", "w") as file:
        file.write(text[:15])


def die_with_parent(signal: int) -> None:
    """Have the kernel send `signal` to this process when its parent ends; it is kept over execve, not over fork.

    The parent may have ended already: who must be sure looks at os.getppid() afterwards.
    """
    check(libc.prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0), "PR_SET_PDEATHSIG")


def close_all_but(*kept: int) -> None:
    """Close every descriptor above stderr except those `kept`."""
    low = 3
    for descriptor in sorted(kept):
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
