"""Memory: what a process has and does not need is given back (madvise(2), proc_pid_smaps(5)); what the host has."""

from __future__ import annotations

import re
from collections.abc import Iterator

from imageapi.linux.libc import check, libc

MADV_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-.p \S+ \S+ [1-9]\d* ")


def forget_code() -> None:
    """Let go of the pages of programs and libraries, most of which were needed only to start. The kernel still has
    them in its page cache, and gives back at once those that are used again.

    Raises: OSError.
    """
    for start, end in list(_code()):
        check(libc.madvise(start, end - start, MADV_DONTNEED))


def _code() -> Iterator[tuple[int, int]]:
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
