"""The kernel's lists of mounts, as tests read them. A name in them may be no text: whoever may mount has chosen it."""

from __future__ import annotations

import os
from pathlib import Path

MOUNTINFO = "/proc/self/mountinfo"


def lines(path: str = MOUNTINFO) -> list[str]:
    """The lines of a list; they end at newlines alone, which the kernel escapes within a name."""
    return os.fsdecode(Path(path).read_bytes()).split("\n")[:-1]
