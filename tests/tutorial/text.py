"""The tutorial's text, taken apart: its commands with what it shows of each one's output, its log, its JSON.

The text has lost most of its line breaks: a command may stand behind a sentence, and its output behind the command.
Nothing of a command is written here; the patterns only say where one ends.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

TEXT = (Path(__file__).parent / "tutorial.txt").read_text(encoding="utf-8")
ADDRESS = "192.168.1.48"
MASK = "X" * 34

_BEGIN = re.compile(r"(?:^|(?<=[.: ]))\$ (.+?)(?= \$ |$)", re.MULTILINE)
_ENDS = (
    re.compile(r"(.*? \| jq)(.*)"),
    re.compile(r"(sudo (?:ls|cat) \S+)(.*)"),
    re.compile(r"(sudo nsenter -t \d+ -a bash)(.*)"),
    re.compile(r"(ps -elF --forest)(.*)"),
    re.compile(r"(dmesg \| tail -n3)(.*)"),
    re.compile(r"(ls -l /dev/rbd0)(.*)"),
    re.compile(r"(.*)()"),
)
_LOG_LINE = re.compile(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d (.*)$", re.MULTILINE)


class Command(NamedTuple):
    """A command line as it stands in the text, and the output that follows it there."""

    line: str
    shown: str

    def answer(self) -> Any:
        """The JSON that the text shows."""
        return json.loads(self.shown)


def commands() -> list[Command]:
    """All commands, in order."""
    return [_split(match[1]) for match in _BEGIN.finditer(TEXT)]


def _split(text: str) -> Command:
    match = next(match for end in _ENDS if (match := end.fullmatch(text)))
    return Command(match[1], match[2].strip())


def log_lines() -> list[str]:
    """What the log holds at the end, without the times."""
    whole = TEXT[TEXT.index("$ curl -XDELETE") :]
    return _LOG_LINE.findall(whole)


def nested_bodies() -> list[str]:
    """The bodies of the nested requests: the overlay's, and the container's, with its misprint."""
    bodies: list[str] = []
    depth = 0
    for line in TEXT.splitlines():
        if depth or line == "{":
            bodies += [""] if depth == 0 else []
            bodies[-1] += line + "\n"
            depth += line.count("{") - line.count("}")
    return bodies
