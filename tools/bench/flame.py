"""`make flame`: where the processor time of creates and deletes goes, in all our processes, as a flame graph.

    python -m tools.bench.flame PY-SPY PICTURE

PY-SPY is the program of that name; it looks at the stacks of the server, of what it has forked, and of the supervisor.
Time in a system call is time of the function that makes it. PICTURE is an SVG file.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

from tools.bench.client import Client, request
from tools.bench.lab import opened
from tools.bench.service import Service, nest

SECONDS, RATE = 8, 400
"""How long is sampled, and how many samples a second: each stops the process that is looked at."""
PAUSE = 0.001
"""Seconds between two questions whether the command has ended."""

ROLES = {
    "runtime/init.py": "container, before its exec",
    "runtime/supervisor.py": "supervisor",
    "engine/worker.py": "worker",
    "engine/zygote.py": "zygote",
    "asyncio/runners.py": "server",
}
"""By the module from which on a stack is a process' own work, the last fork first: before it is how it began."""

WIDTH, HEIGHT, TEXT = 1200, 16, 6.6
"""Pixels of the picture's width, of a row, and of a character."""
SMALLEST = 2.0
"""Pixels: a narrower box is left out, with what is above it."""
HUES = {"server": 210, "worker": 130, "supervisor": 30, "container, before its exec": 0}


class Box(NamedTuple):
    """A function with all it called: how many samples saw it, and whom it called."""

    name: str
    samples: int
    calls: list[Box]


def main(spy: str, picture: str) -> None:
    with opened(0) as lab, lab.service() as (service, client):
        create = request("POST", "/container", nest(lab.image, "/bin/stamp", state="running"))
        _cycle(client, create)
        outputs = [lab.place / f"{pid}.raw" for pid in _roots(service)]
        spies = [_watch(spy, path) for path in outputs]
        while any(each.poll() is None for each in spies):
            _cycle(client, create)
        stacks = [stack for path in outputs for stack in read(path.read_text())]
    Path(picture).write_text("\n".join(drawn(tree("all", stacks))) + "\n")


def _cycle(client: Client, create: bytes) -> None:
    box = client.ask(create).json()
    client.await_state(box["id"], "exited", PAUSE)
    client.ask(request("DELETE", f"/container/{box['id']}"))


def _roots(service: Service) -> Iterator[int]:
    """The server, and the supervisor, which is no descendant of it."""
    for pid in service.processes():
        if Path(f"/proc/{pid}/comm").read_text().strip() in ("imageapi-server", "imageapi-super"):
            yield pid


def _watch(spy: str, path: Path) -> subprocess.Popen[bytes]:
    what = ("--pid", path.stem, "--subprocesses", "--function", "--rate", str(RATE), "--duration", str(SECONDS))
    command = [spy, "record", *what, "--format", "raw", "--output", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------------------ stacks


class Stack(NamedTuple):
    """The outermost frame first; the first is the role of the process."""

    frames: list[str]
    samples: int


def read(text: str) -> Iterator[Stack]:
    """py-spy's raw format: the frames with semicolons between them, a space, the number of samples."""
    for line in text.splitlines():
        stack, _, samples = line.rpartition(" ")
        if frames := _own([_short(frame) for frame in stack.split(";")]):
            yield Stack(frames, int(samples))


def _short(frame: str) -> str:
    """Without the line's number, and our own package's name."""
    return re.sub(r":\d+\)$", ")", frame).replace("(imageapi/", "(")


def _own(frames: list[str]) -> list[str]:
    """The role of the process and what it did; empty where it is not known, which is while it is forked."""
    for module, role in ROLES.items():
        for number, frame in enumerate(frames):
            if f"({module})" in frame:
                return [role, *frames[number + (role == "server") :]]
    return []


def tree(name: str, stacks: Iterable[Stack]) -> Box:
    """All stacks as boxes in boxes, the most time first."""
    below: dict[str, list[Stack]] = {}
    total = 0
    for frames, samples in stacks:
        total += samples
        if frames:
            below.setdefault(frames[0], []).append(Stack(frames[1:], samples))
    calls = [tree(each, inner) for each, inner in below.items()]
    return Box(name, total, sorted(calls, key=lambda box: -box.samples))


# ----------------------------------------------------------------------------------------------- picture


def drawn(root: Box) -> Iterator[str]:
    """The lines of the SVG: who calls is below, who is called stands on it."""
    scale = WIDTH / max(1, root.samples)
    height = _depth(root, scale) * HEIGHT
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="11">'
    yield from _boxes(root, 0.0, height - HEIGHT, scale, 60)
    yield "</svg>"


def _depth(box: Box, scale: float) -> int:
    return 1 + max((_depth(each, scale) for each in box.calls if each.samples * scale >= SMALLEST), default=0)


def _boxes(box: Box, left: float, top: int, scale: float, hue: int) -> Iterator[str]:
    width = box.samples * scale
    if width < SMALLEST:
        return
    hue = HUES.get(box.name, hue)
    yield f"<g><title>{escape(box.name)}: {width / WIDTH:.1%}</title>{_rectangle(left, top, width, hue)}"
    yield f'<text x="{left + 3:.1f}" y="{top + 12}">{escape(_fitting(box.name, width))}</text></g>'
    for each in box.calls:
        yield from _boxes(each, left, top - HEIGHT, scale, hue)
        left += each.samples * scale


def _rectangle(left: float, top: int, width: float, hue: int) -> str:
    place = f'x="{left:.1f}" y="{top}" width="{width:.1f}" height="{HEIGHT - 1}"'
    return f'<rect {place} fill="hsl({hue},70%,{72 + top // HEIGHT % 2 * 6}%)"/>'


def _fitting(name: str, width: float) -> str:
    """As much of the name as the box is wide."""
    return name[: max(0, int((width - 6) / TEXT))]


if __name__ == "__main__":
    main(*sys.argv[1:])
