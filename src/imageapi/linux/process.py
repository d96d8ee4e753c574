"""What a process can say of itself: its name, its descriptors, whom it dies with. See prctl(2)."""

from __future__ import annotations

import os

from imageapi.linux.libc import check, libc

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
