"""The benchmark's arithmetic, its turns, and how it reads an answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.bench import flame, measure
from tools.bench.client import Client, Refused, request
from tools.bench.machine import Machine
from tools.bench.measure import Figure, Row, Target, Unable, interleave, percentile, ratio
from tools.bench.report import Report, lines, verdict

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(("part", "expected"), [(0.05, 1), (0.5, 10), (0.95, 19), (1.0, 20)])
def test_a_percentile_is_the_value_of_the_nearest_rank(part: float, expected: float) -> None:
    assert percentile(list(range(20, 0, -1)), part) == expected


def test_a_ratio_is_that_of_the_medians_and_needs_both() -> None:
    ours, least, silent = Row("ours", [9, 3, 6], against="least"), Row("least", [2, 2, 100]), Row("least")
    assert ratio(ours, [ours, least]) == 3
    assert ratio(ours, [ours, silent]) is None
    assert ratio(ours, [ours]) is None


@pytest.mark.parametrize(
    ("target", "values", "times", "said"),
    [
        (Target(5.0), [5.0], None, "<= 5: met"),
        (Target(5.0), [6.0], None, "<= 5: MISSED by 20%"),
        (Target(100.0, at_least=True), [75.0], None, ">= 100: MISSED by 25%"),
        (Target(4.0, ratio=True), [1.0], 8.0, "<= 4x: MISSED by 100%"),
        (Target(4.0, ratio=True), [1.0], None, "<= 4x: unknown"),
    ],
)
def test_a_missed_target_says_by_how_much(target: Target, values: list[float], times: float | None, said: str) -> None:
    assert verdict(Row("row", values, targets=[target]), times) == said


def test_contestants_take_turns_and_one_that_is_unable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAUSE", 0)
    turns: list[str] = []

    def turn(name: str) -> dict[str, float]:
        turns.append(name)
        return {name: len(turns)}

    def unable() -> dict[str, float]:
        raise Unable("no such program")

    rows = interleave(2, {"a": lambda: turn("a"), "none": unable, "b": lambda: turn("b")})
    assert turns == ["a", "b"] * 3
    assert rows["a"].values == [3, 5]
    assert (rows["none"].values, rows["none"].error) == ([], "no such program")


def test_the_table_hides_neither_a_failed_figure_nor_who_does_not_run() -> None:
    machine = Machine("processor", 2, "6.1", "none", "3.11", "abc", "today", 0.0, 0.0)
    figures = {"start": Figure("Title", [Row("crun", error="no hybrid mode")], {"told": {"plan": [1.0, 3.0, 2.0]}})}
    table = "\n".join(lines(Report(machine, 1, figures, {"nest": "OSError: gone"})))
    assert "does not run here: no hybrid mode" in table
    assert "told: plan 2.00" in table
    assert "nest: FAILED: OSError: gone" in table


@contextlib.contextmanager
def _served(directory: Path, *parts: bytes) -> Iterator[Client]:
    """A client whose first answer comes in these parts."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "socket"))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(1 << 16)
            for part in parts:
                connection.sendall(part)

    serving = threading.Thread(target=serve)
    serving.start()
    with Client(directory / "socket") as client:
        yield client
    serving.join()


def test_an_answer_is_read_whole(tmp_path: Path) -> None:
    head = b"HTTP/1.1 201 Created\r\nContent-Length: 8\r\nServer-Timing: read;dur=0.5, mount-0;dur=1.25\r\n\r\n"
    with _served(tmp_path, head + b'{"id', b'": 7}') as client:
        answer = client.ask(request("POST", "/container", {"command": "/bin/stamp"}))
    assert answer.json() == {"id": 7}
    assert answer.stages() == {"read": 0.5, "mount-0": 1.25}


def test_an_error_is_raised_with_its_message(tmp_path: Path) -> None:
    said = b'HTTP/1.1 409 Conflict\r\nContent-Length: 18\r\n\r\n{"message":"busy"}'
    with _served(tmp_path, said) as client, pytest.raises(Refused, match="busy"):
        client.ask(request("DELETE", "/container/0"))


def test_stacks_of_all_processes_are_one_picture() -> None:
    """What is not yet a process with a work of its own is left out."""
    begun = 'process 7:"imageapi-server --run-dir /run/x";main (imageapi/server.py:24)'
    raw = f"""\
{begun};run (asyncio/runners.py:86);answer <T> (imageapi/api/app.py:3) 600
{begun};serve (imageapi/engine/worker.py:40);mount (imageapi/linux/mount.py:9) 399
{begun};serve (imageapi/engine/worker.py:41) 1
{begun} 5
"""
    root = flame.tree("all", flame.read(raw))
    assert [(box.name, box.samples) for box in root.calls] == [("server", 600), ("worker", 400)]
    picture = ElementTree.fromstring("\n".join(flame.drawn(root)))
    titles = [each.text for each in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == [
        "all: 100.0%", "server: 60.0%", "answer <T> (api/app.py): 60.0%",
        "worker: 40.0%", "serve (engine/worker.py): 40.0%", "mount (linux/mount.py): 39.9%",
    ]  # fmt: skip


def test_what_is_hardly_ever_seen_is_not_drawn() -> None:
    root = flame.tree("all", [flame.Stack(["server", "rare"], 1), flame.Stack(["server"], 999)])
    assert "rare" not in "\n".join(flame.drawn(root))
