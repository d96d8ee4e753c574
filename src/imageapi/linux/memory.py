"""Memory: what a process has and does not need is given back (madvise(2), proc_pid_smaps(5)); what the host has."""

from __future__ import annotations

import contextlib
import re
import select
from collections.abc import Iterator, Sequence

from imageapi.linux.libc import check, libc

MADV_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-.p \S+ \S+ [1-9]\d* ")


REST = 2.0
"""Seconds without anything to do, after which a process is at rest."""
Mapping = tuple[int, int]
"""Where it begins and where it ends."""


def forget_code(mappings: Sequence[Mapping] = ()) -> None:
    """Let go of the pages of programs and libraries, most of which were needed only to start: of these mappings, or of
    all. The kernel still has them in its page cache, and gives back at once those that are used again. On a host that
    has not even a descriptor left to look for them, they stay.
    """
    with contextlib.suppress(OSError):
        for start, end in mappings or code():
            check(libc.madvise(start, end - start, MADV_DONTNEED))


def rest_until_readable(descriptor: int, mappings: Sequence[Mapping] = ()) -> None:
    """Wait until there is something to read, and let go of code when nothing comes for long."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(REST * 1000):
        forget_code(mappings)
        poll.poll()


def code() -> list[Mapping]:
    """The mappings of programs and libraries in this process, to be let go of where there is no /proc to ask.

    Raises: OSError.
    """
    return list(_code())


def _code() -> Iterator[Mapping]:
    """The mappings of files that cannot be written and hold nothing of our own: what the loader has relocated in
    them, and then protected, would be lost."""
    mapping: re.Match[str] | None = None
    with open("/proc/self/smaps") as file:
        for line in file:
            if found := _MAPPING.match(line):
                mapping = found
            elif line[0] in "0123456789abcdef":
                mapping = None
            elif line.startswith("Anonymous:") and mapping and line.split()[1] == "0":
                yield int(mapping[1], 16), int(mapping[2], 16)


def available() -> int:
    """Bytes that can be had without swapping, as the kernel estimates them (proc_meminfo(5), MemAvailable).

    Raises: OSError.
    """
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) << 10


def oom_kills() -> int:
    """How many processes the kernel has killed since the boot because memory ran out, the host's or a cgroup's
    (oom_kill in /proc/vmstat, 4.13).

    Raises: OSError.
    """
    with open("/proc/vmstat") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
