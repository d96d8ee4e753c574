"""Many clients, the same few objects: whatever they are told is explained by some order of what they have asked for."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lab import model
from lab.grabber import grabbing
from lab.history import Operation, State, Step, unexplained
from lab.model import Box, Root
from lab.server import FOREVER, Server, squashfs, writable

pytestmark = pytest.mark.api

CLIENTS = 16
NAMES = ("one", "two", "three")
ALLOWED = (200, 201, 404, 409)
"""There is no other answer to what is asked for here."""

BEREFT = ("runs on, is gone", "cannot be used: it is being deleted")
"""What a start is told when that which the container runs on has been deleted by force."""

Json = dict[str, Any]
Subject = tuple[str, Any]
"""What a history is about: a container by its id, a mount by its id, or a name."""


class Ask(NamedTuple):
    """One thing that a client does. `which` chooses among the objects that there are by then."""

    verb: str
    which: int
    by_name: bool
    force: bool


verbs = st.sampled_from(
    [*("create",) * 5, *("running", "exited") * 3, *("read",) * 3, *("delete",) * 5, "list", "root", "see", "drop"]
)
scripts = st.lists(st.builds(Ask, verbs, st.integers(0, 11), st.booleans(), st.booleans()), min_size=8, max_size=14)
programs = st.lists(scripts, min_size=CLIENTS, max_size=CLIENTS)


class Race:
    """The clients of one program, and what they were told."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._boxes: list[int] = []
        self._on_roots: set[int] = set()
        self.roots: list[int] = []
        self.histories: defaultdict[Subject, list[Operation]] = defaultdict(list)
        self.lists: list[tuple[float, float, dict[int, str]]] = []

    def run(self, program: list[list[Ask]]) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in [pool.submit(self._play, number, script) for number, script in enumerate(program)]:
                done.result()

    def _play(self, client: int, script: list[Ask]) -> None:
        with self._server.client() as http:
            for ask in script:
                getattr(self, f"_{ask.verb}", self._state)(http, client, ask)

    def _do(self, http: httpx.Client, method: str, path: str, body: Json | None = None) -> _Answer:
        begun = time.monotonic()
        answer = http.request(method, path, json=body)
        ended = time.monotonic()
        assert answer.status_code in ALLOWED, f"{method} {path}: {answer.text}"
        return _Answer(begun, ended, answer.status_code, answer.json(), f"{method} {path} {body or ''}")

    def _note(self, subject: Subject, answer: _Answer, steps: tuple[Step, ...]) -> None:
        said = answer.body if answer.code > 201 else {key: answer.body.get(key) for key in ("id", "state", "refs")}
        text = f"{answer.asked}: {answer.code} {said}"
        with self._lock:
            self.histories[subject].append(Operation(answer.begun, answer.ended, steps, text))

    # ------------------------------------------------------------------------------------------------ containers

    def _create(self, http: httpx.Client, client: int, ask: Ask) -> None:
        name = NAMES[ask.which % len(NAMES)] if ask.by_name else None
        root = _chosen(self.roots, ask.which) if ask.which % 2 else None
        mount = writable() if root is None else {"kind": "overlay", "id": root}
        body = {"mount": mount, "command": FOREVER, "state": "running" if ask.force else "created"}
        answer = self._do(http, "POST", "/container", body | ({"name": name} if name else {}))
        made = answer.body.get("id") if answer.code == 201 else None
        if made is not None:
            self._on_roots |= {made} if root is not None else set()
            self._boxes.append(made)
            self._note(("box", made), answer, model.box_made(answer.body["state"]))
        if root is not None:
            steps = {201: model.root_used, 409: model.root_tried}
            self._note(("root", root), answer, steps.get(answer.code, model.root_unknown))
        if name and made is not None:
            self._note(("name", name), answer, model.name_taken((client, answer.begun), made))
        elif name and "is in use by" in answer.body["message"]:
            self._note(("name", name), answer, model.name_in_use)
        elif name:
            self._note(("name", name), answer, model.name_tried((client, answer.begun)))

    def _path(self, ask: Ask) -> tuple[str, Subject]:
        """The path of a container, and what its history is about."""
        if ask.by_name:
            name = NAMES[ask.which % len(NAMES)]
            return f"/container/byname/{name}", ("name", name)
        number = _chosen(self._boxes, ask.which) or 0
        return f"/container/{number}", ("box", number)

    def _told(self, subject: Subject, answer: _Answer) -> Subject | None:
        """The container that an answer is about, which may be known by a name only; that the name was its then, or
        nobody's, is noted."""
        if subject[0] == "box":
            return subject
        if answer.code == 404:
            self._note(subject, answer, model.name_unknown)
        elif answer.code == 409:
            self._note(subject, answer, model.name_known)
        else:
            self._note(subject, answer, model.name_is(answer.body["id"]))
            return "box", answer.body["id"]
        return None

    def _read(self, http: httpx.Client, client: int, ask: Ask) -> None:
        path, subject = self._path(ask)
        answer = self._do(http, "GET", path)
        if (box := self._told(subject, answer)) is not None:
            self._note(box, answer, model.box_shown(answer.body.get("state")))

    def _state(self, http: httpx.Client, client: int, ask: Ask) -> None:
        path, subject = self._path(ask)
        answer = self._do(http, "POST" if ask.force else "GET", f"{path}/{ask.verb}")
        if (box := self._told(subject, answer)) is not None:
            bereft = answer.code == 409 and any(words in answer.body["message"] for words in BEREFT)
            steps = model.box_asked(ask.verb, answer.code, answer.body.get("state"), bereft=bereft)
            self._note(box, answer, steps)

    def _delete(self, http: httpx.Client, client: int, ask: Ask) -> None:
        path, subject = self._path(ask)
        answer = self._do(http, "DELETE", f"{path}{'?force=true' * ask.force}")
        if (box := self._told(subject, answer)) is None:
            return
        self._note(box, answer, model.box_deleted(answer.code, answer.body.get("state"), force=ask.force))
        if answer.code == 200:
            if name := answer.body.get("name"):
                self._note(("name", name), answer, model.name_freed(answer.body["id"]))
            self._note(("root", answer.body["mount"]["id"]), answer, model.root_left)

    def _list(self, http: httpx.Client, client: int, ask: Ask) -> None:
        answer = self._do(http, "GET", "/container")
        with self._lock:
            self.lists.append((answer.begun, answer.ended, {one["id"]: one["state"] for one in answer.body}))

    # ---------------------------------------------------------------------------------------------------- mounts

    def _root(self, http: httpx.Client, client: int, ask: Ask) -> None:
        answer = self._do(http, "POST", "/mount", writable() if ask.force else squashfs())
        if ask.force:
            self._note(("root", answer.body["id"]), answer, model.root_made)
            self.roots.append(answer.body["id"])

    def _see(self, http: httpx.Client, client: int, ask: Ask) -> None:
        if (root := _chosen(self.roots, ask.which)) is not None:
            answer = self._do(http, "GET", f"/mount/{root}")
            steps = model.root_unknown if answer.code == 404 else model.root_shown(answer.body["refs"])
            self._note(("root", root), answer, steps)

    def _drop(self, http: httpx.Client, client: int, ask: Ask) -> None:
        if (root := _chosen(self.roots, ask.which)) is not None:
            answer = self._do(http, "DELETE", f"/mount/{root}{'?force=true' * ask.force}")
            self._note(("root", root), answer, model.root_deleted(answer.code, force=ask.force))

    # ------------------------------------------------------------------------------------------------- explained

    def unexplained(self) -> list[str]:
        """Every history that no order explains, as a text."""
        found = []
        for begun, ended, states in self.lists:
            for number in self._boxes:
                steps = model.box_shown(states.get(number))
                self.histories["box", number].append(Operation(begun, ended, steps, f"list: {states.get(number)}"))
        for (kind, which), history in self.histories.items():
            start, drift = STARTS[kind]
            if kind == "root" and which not in self.roots:
                continue
            if kind == "box" and which in self._on_roots:
                drift = model.bereft_drift
            if wrong := unexplained(history, start, drift):
                lines = "\n  ".join(f"{one.begun:.6f} {one.ended:.6f} {one.text}" for one in wrong)
                found.append(f"no order explains what was told of {kind} {which}:\n  {lines}")
        return found


class _Answer(NamedTuple):
    begun: float
    ended: float
    code: int
    body: Any
    asked: str


def _none(state: State) -> tuple[()]:
    return ()


STARTS: dict[str, tuple[State, Any]] = {
    "box": (Box(), model.box_drift),
    "root": (Root(), _none),
    "name": (None, _none),
}


def _chosen(numbers: list[int], which: int) -> int | None:
    return numbers[-1 - which % min(len(numbers), 6)] if numbers else None


def _check_references(server: Server, roots: list[int]) -> None:
    """What is shown is what a walk over all objects counts; nothing has a problem but for what was deleted by force."""
    objects: dict[tuple[str, int], Json] = {
        (collection, one["id"]): one
        for collection in ("container", "mount", "attach")
        for one in server.get(f"/{collection}")
    }
    held = dict.fromkeys(objects, 0)
    for one in objects.values():
        for edge in _edges(one):
            assert edge in objects or "by force" in one["problem"] or "is gone" in one["problem"], one
            held[edge] = held.get(edge, 0) + 1
    for key, one in objects.items():
        own = key[0] == "container" or (key[0] == "mount" and one["refs"] == held[key] + 1)
        assert one["refs"] == held[key] + own, one
        assert one["refs"], one
        assert "problem" not in one or any(edge not in objects for edge in _edges(one)), one


def _edges(one: Json) -> Iterator[tuple[str, int]]:
    part = one if "command" in one else one[one["kind"]]
    if "attach" in part:
        yield "attach", part["attach"]["id"]
    for mount in [part["mount"]] if "mount" in part else part.get("lower", []):
        yield "mount", mount["id"]


def race(server: Server, program: list[list[Ask]]) -> None:
    running = Race(server)
    try:
        running.run(program)
        _check_references(server, running.roots)
        if left := running.unexplained():
            raise AssertionError("\n".join(left))
    finally:
        server.clear()
    assert os.listdir(server.run_dir / "mounts") == []
    assert [name for name in os.listdir(server.run_dir / "supervisor") if name.endswith(".json")] == []


@pytest.mark.parametrize("number", [1, 2, secrets.randbelow(1 << 32)])
def test_whatever_is_told_is_explained_by_some_order(server: Server, number: int) -> None:
    @seed(number)
    @settings(
        max_examples=int(os.environ.get("RACES", 4)),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(programs)
    def race_of(program: list[list[Ask]]) -> None:
        race(server, program)

    with grabbing():
        race_of()
