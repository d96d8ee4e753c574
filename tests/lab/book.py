"""A server that can be killed at any of its steps, and what a client of it knows: what was answered must be so, what
was under way may be or not, but whole.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from lab import audit
from lab.deaths import HELPERS, ITSELF
from lab.faults import VARIABLE, Faults, Step
from lab.processes import find
from lab.server import FOREVER, Server, alive, eventually, hooked, writable

COUNTING = (
    "/bin/sh -c 'cp /bin/busybox /busybox; "
    'exec /busybox sh -c "i=0; while true; do echo line \\$i; i=\\$((i+1)); /busybox sleep 0.02; done"\''
)
"""Prints consecutive numbers, and is never stopped. Once it has begun, it needs nothing of its image: what it executes
is in memory, in the overlay's upper directory."""
CODES = {"/bin/true": 0, "/bin/false": 1}
"""The exit codes of what ends by itself."""
NOT_EXECUTED = 127
"""The exit code of a first process that has not come to execute its command: none of these ever has it."""
MISSING = "/bin/nothing"
OBEDIENT = """/bin/sh -c 'trap "exit 0" TERM; trap "exit 3" USR1; echo ready; while true; do sleep 0.005; done'"""
"""Ends when it is asked to."""


class FaultyServer(Server):
    """A server that can be killed at any of its steps."""

    module = "lab.faults"

    def __init__(self, run_dir: Path, *options: str) -> None:
        super().__init__(run_dir, *options)
        self.faults = Faults(run_dir / "faults", lambda: audit.storage_daemons(run_dir))

    @property
    def environment(self) -> dict[str, str]:
        return hooked(self.package, VARIABLE, self.faults.path)

    @property
    def zygote(self) -> int:
        """Raises: StopIteration, when it does not live."""
        found = filter(None, map(find, audit.children(self.pid)))
        return next(one.pid for one in found if one.name == "imageapi-zygote")

    def victims(self, who: str) -> list[int]:
        """The processes that a fault kills: `itself` is the one whose step it is."""
        found = {
            "itself": lambda: [ITSELF],
            "server": lambda: [self.pid],
            "supervisor": lambda: [self.supervisor],
            "zygote": lambda: [self.zygote],
            "both": lambda: [self.pid, self.supervisor],
            "all": lambda: [self.pid, self.supervisor, self.zygote, ITSELF],
            "helper": lambda: [HELPERS],
        }
        return [pid for one in who.split(" and ") for pid in found[one]()]

    def start_in_vain(self, step: Step, who: str) -> bool:
        """Start it with a fault at one of the steps before it answers; it may get over it. Whether the step has
        come."""
        victims = {"itself": [ITSELF], "supervisor": self._supervisors(), "both": [ITSELF, *self._supervisors()]}
        self.faults.arm(step, victims[who])
        self.launch()
        eventually(lambda: not self.runs or self._answers(), "it has ended, or answers")
        return self.faults.disarm()

    def _supervisors(self) -> list[int]:
        with contextlib.suppress(StopIteration):
            return [self.supervisor]
        return []

    def revive(self) -> None:
        """Start it again if it has ended, or is about to since its zygote has."""
        if not self._answers():
            self._end_by_itself()
            self.start()

    @property
    def listens(self) -> bool:
        return self.runs and self._accepts()

    def _answers(self) -> bool:
        self.reconnect()
        try:
            return self.listens and self.http.get("/container").is_success and bool(self.zygote)
        except (httpx.TransportError, OSError, StopIteration):
            return False

    def _end_by_itself(self) -> None:
        if self._process is not None:
            self._process.wait(20)
            self._process = None
            self.reconnect()


VICTIMS = ("itself", "server", "supervisor", "zygote", "both", "all")
WITH_HELPERS = ("helper", "helper and itself", "helper and server", "helper and supervisor", "helper and both")
"""What dies where a storage daemon serves the image."""
AT_START = ("itself", "supervisor", "both")


class Interrupted(Exception):
    """A request has had no answer, or was answered that it met a fault."""


class Refused(Interrupted):
    """A request was answered that the host has run out of something."""


class Failure(NamedTuple):
    """A request that was answered with a code from 500 on."""

    method: str
    path: str
    code: int
    message: str

    @property
    def ends(self) -> bool:
        """Whether it asks for something to end or go."""
        return self.method == "DELETE" or self.path.endswith("/exited")


class Book:
    """What a client knows of its containers: those that were answered, and those it cannot know of. Their names begin
    with `prefix`; they are on a `mount` of the small image, unless told."""

    def __init__(
        self,
        server: FaultyServer,
        prefix: str = "",
        http: httpx.Client | None = None,
        mount: dict[str, Any] | None = None,
    ) -> None:
        self.server = server
        self.prefix = prefix
        self.mount = mount or writable()
        self._http = http
        self.known: dict[str, dict[str, Any]] = {}
        self.unsure: set[str] = set()
        self._before_start: dict[str, dict[str, Any]] = {}
        self.failures: list[Failure] = []
        self.used: dict[str, int] = {"container": -1, "mount": -1, "attach": -1}

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer. Raises: Interrupted, Refused."""
        try:
            answer = (self._http or self.server.http).request(method, path, json=body)
        except httpx.TransportError as error:
            raise Interrupted(repr(error)) from None
        found = answer.json()
        if answer.status_code >= 500:
            assert found["message"], found
            self.failures.append(Failure(method, path, answer.status_code, found["message"]))
            raise (Refused if answer.status_code == 503 else Interrupted)(found["message"])
        return found

    def close(self) -> None:
        if self._http is not None:
            self._http.close()

    def create(self, name: str, command: str = FOREVER, state: str = "running", **more: Any) -> Any:
        """What was made, or why nothing was. What is refused for lack of something has left nothing."""
        self.unsure.add(name)
        wanted = {"name": name, "mount": self.mount, "command": command, "state": state, **more}
        try:
            made = self.ask("POST", "/container", wanted)
        except Refused:
            self.unsure.discard(name)
            raise
        self.unsure.discard(name)
        succeeded = "code" not in made
        assert succeeded == (command != MISSING or state == "created"), made
        if succeeded:
            self._count("container", made)
            self.known[name] = made
        return made

    def _count(self, collection: str, made: dict[str, Any]) -> None:
        """An id that an answer has shown is never given again."""
        assert made["id"] > self.used[collection], f"{collection} {made['id']} was there before"
        self.used[collection] = made["id"]

    def change(self, method: str, name: str, suffix: str = "") -> Any:
        """Have something done to a container; a refusal is an answer, too. Until there is one nobody knows."""
        self.unsure.add(name)
        known = self.known.pop(name)
        if suffix == "/running" and known["state"] not in ("running", "stopping"):
            self._before_start[name] = known
        found = self.ask(method, f"/container/byname/{name}{suffix}")
        if method != "DELETE" or "code" in found:
            self.known[name] = self.ask("GET", f"/container/byname/{name}")
            assert self.known[name]["id"] == known["id"]
        self.unsure.discard(name)
        self._before_start.pop(name, None)
        return found

    def check(self, found: list[dict[str, Any]]) -> None:
        """All that was answered is so in what is found, and what is unsure is whole or gone. It is known afterwards."""
        shown = {one.get("name", ""): one for one in found}
        for name, known in self.known.items():
            assert name in shown, f"{name} is lost: {known}"
            _check_same(known, shown[name])
        assert set(shown) <= {*self.known, *self.unsure}, shown
        for name in self.unsure & set(shown):
            self.known[name] = shown[name]
            if before := self._before_start.get(name):
                _check_start(before, shown[name])
        self.unsure.clear()
        self._before_start.clear()


def _check_same(known: dict[str, Any], now: dict[str, Any]) -> None:
    same = ("id", "name", "command", "logfile", "created_at")
    assert [known[key] for key in same] == [now[key] for key in same], (known, now)
    if _missed_its_image(now):
        return
    if now["state"] in ("exited", "dead") and known["command"] in CODES:
        assert now["exit_code"] in (CODES[known["command"]], None), (known, now)
    elif known["state"] == "running":
        assert (now["state"], now["pid"], now["started_at"]) == ("running", known["pid"], known["started_at"]), now
        assert known["command"] in CODES or alive(now["pid"]), f"{now} is said to run, and does not"
    elif known["state"] in ("exited", "dead"):
        assert (now["state"], now["exit_code"]) == (known["state"], known["exit_code"]), (known, now)


def _missed_its_image(now: dict[str, Any]) -> bool:
    """Whether it has ended over a page of its image, when that had no storage helper. (One that had by the time of the
    look does not say so.)"""
    return now["state"] == "dead" and (
        now["exit_code"] == 128 + signal.SIGBUS or "its image could not be read" in now["problem"]
    )


def _check_start(before: dict[str, Any], now: dict[str, Any]) -> None:
    """A start without an answer has come to something, has failed for a reason, or has not been."""
    told = ("state", "exit_code", "started_at", "finished_at")
    same = before.get("problem") == now.get("problem") or "which it needs" in now.get("problem", "")
    undone = same and all(before[key] == now[key] for key in told)
    failed = "could not be started" in now.get("problem", "")
    killed = now["exit_code"] == 128 + signal.SIGKILL  # in the moment of its exec
    assert undone or failed or killed or now["started_at"] != before["started_at"], (before, now)
    assert now["exit_code"] != NOT_EXECUTED, now
