"""Stories that a server is killed in, and what must be so afterwards.

A story is one request, or a few, after a setting that has been answered. It is told once to learn its steps, and then
once for each of them with a fault at it. What was answered must be so; what was under way may be or not, but whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from lab import audit
from lab.faults import HELPERS, ITSELF, VARIABLE, Faults, Step
from lab.server import FOREVER, Server, alive, eventually, writable

ROOT = Path(__file__).parents[2]
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
        self.faults = Faults(run_dir / "faults")

    @property
    def environment(self) -> dict[str, str]:
        path = ":".join((str(self.package), str(ROOT / "tests"), str(ROOT)))
        return {**os.environ, VARIABLE: str(self.faults.path), "PYTHONPATH": path}

    @property
    def zygote(self) -> int:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return next(int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "imageapi-zygote\n")

    def victims(self, who: str) -> list[int]:
        """The processes that a fault kills: `itself` is the one whose step it is."""
        found = {
            "itself": lambda: [ITSELF],
            "server": lambda: [self.pid],
            "supervisor": lambda: [self.supervisor],
            "zygote": lambda: [self.zygote],
            "both": lambda: [self.pid, self.supervisor],
            "all": lambda: [self.pid, self.supervisor, self.zygote, ITSELF],
            "helper": lambda: [HELPERS, *sorted(audit.storage_daemons(self.run_dir))],
        }
        return [pid for one in who.split(" and ") for pid in found[one]()]

    def start_in_vain(self, step: Step, who: str) -> None:
        """Start it with a fault at one of the steps before it answers; it may get over it."""
        victims = {"itself": [ITSELF], "supervisor": self._supervisors(), "both": [ITSELF, *self._supervisors()]}
        self.faults.arm(step, victims[who])
        self.launch()
        eventually(lambda: not self.runs or self._answers(), "it has ended, or answers")
        self.faults.disarm()

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
        return self.runs and self._listens()

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
Story = Callable[["Book"], Callable[[], object]]
"""Sets the scene, and returns what is told with a fault in it."""


class Interrupted(Exception):
    """A request has had no answer, or was answered that it met a fault."""


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
        self.used: dict[str, int] = {"container": -1, "mount": -1, "attach": -1}

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer. Raises: Interrupted."""
        try:
            answer = (self._http or self.server.http).request(method, path, json=body)
        except httpx.TransportError as error:
            raise Interrupted(repr(error)) from None
        found = answer.json()
        if answer.status_code >= 500:
            assert found["message"], found
            raise Interrupted(found["message"])
        return found

    def close(self) -> None:
        if self._http is not None:
            self._http.close()

    def create(self, name: str, command: str = FOREVER, state: str = "running", **more: Any) -> Any:
        self.unsure.add(name)
        wanted = {"name": name, "mount": self.mount, "command": command, "state": state, **more}
        made = self.ask("POST", "/container", wanted)
        self.unsure.discard(name)
        assert ("id" in made) == (command != MISSING or state == "created"), made
        if "id" in made:
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
        if suffix == "/running" and known["state"] != "running":
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


# ------------------------------------------------------------------------------------------------------- stories


def create(book: Book) -> Callable[[], object]:
    return lambda: book.create("made")


def create_in_vain(book: Book) -> Callable[[], object]:
    return lambda: book.create("vain", MISSING)


def start(book: Book) -> Callable[[], object]:
    book.create("begun", OBEDIENT, "created")
    return lambda: book.change("GET", "begun", "/running")


def start_in_vain(book: Book) -> Callable[[], object]:
    book.create("begun", MISSING, "created")
    return lambda: book.change("GET", "begun", "/running")


def start_again(book: Book) -> Callable[[], object]:
    """How it ended before is not forgotten until it has begun again."""
    end(book)()
    return lambda: book.change("GET", "ended", "/running")


def stop(book: Book) -> Callable[[], object]:
    _make_obedient(book, "ended")

    def tell() -> None:
        book.change("GET", "ended", "/exited")
        _await_end(book, "ended")

    return tell


def end(book: Book) -> Callable[[], object]:
    made = _make_obedient(book, "ended")

    def tell() -> None:
        book.known.pop("ended")
        book.unsure.add("ended")
        os.kill(made["pid"], signal.SIGUSR1)
        _await_end(book, "ended")

    return tell


def delete(book: Book) -> Callable[[], object]:
    book.create("gone", "/bin/true")
    _await_end(book, "gone")
    return lambda: book.change("DELETE", "gone")


def delete_by_force(book: Book) -> Callable[[], object]:
    book.create("gone")
    return lambda: book.change("DELETE", "gone", "?force=true")


def groups(book: Book) -> Callable[[], object]:
    """A container with control groups of its own comes and goes."""

    def tell() -> None:
        book.create("grouped", systemd=True)
        book.change("DELETE", "grouped", "?force=true")

    return tell


def collect(book: Book) -> Callable[[], object]:
    """A mount of several layers goes, and with it all that only it needed."""
    made = book.ask("POST", "/mount", book.mount)
    return lambda: book.ask("DELETE", f"/mount/{made['id']}")


def mend(book: Book) -> Callable[[], object]:
    """A storage helper is replaced under those that it served."""
    book.create("served")

    def tell() -> None:
        dead = kill_helpers(book.server)
        eventually(lambda: book.ask("GET", "/attach") and not dead & helpers_noted(book.server), "all is mended")

    return tell


def sever(book: Book) -> Callable[[], object]:
    """What stands on a storage helper that hangs is cut off from it, and goes."""
    book.create("gone")
    return lambda: _delete_beside(book, "gone")


def _delete_beside(book: Book, name: str) -> None:
    stopped = audit.storage_daemons(book.server.run_dir)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        book.change("DELETE", name, "?force=true")
    finally:
        for pid in stopped & audit.storage_daemons(book.server.run_dir):
            os.kill(pid, signal.SIGCONT)


def kill_helpers(server: Server) -> set[int]:
    """SIGKILL for all storage daemons of a server; who they were."""
    found = audit.storage_daemons(server.run_dir)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def helpers_noted(server: Server) -> set[int]:
    """The storage daemons that the records name."""
    files = (server.run_dir / "state/attach").glob("*.json")
    helpers = (json.loads(file.read_text())["facts"].get("helper") for file in files)
    return {helper[0] for helper in helpers if helper}


STORIES = (
    *(create, create_in_vain, start, start_again, start_in_vain, stop, end, delete, delete_by_force, collect),
    groups,
)
ON_A_HELPER = (create, start, stop, delete, delete_by_force, collect, mend)
"""What is done to containers whose image a storage daemon serves."""


def _make_obedient(book: Book, name: str) -> Any:
    made = book.create(name, OBEDIENT)
    eventually(lambda: "ready" in Path(made["logfile"]).read_text(), f"{name} is ready")
    return made


def _await_end(book: Book, name: str) -> None:
    def ended() -> bool:
        shown = book.ask("GET", f"/container/byname/{name}")
        return shown["state"] in ("exited", "dead")

    eventually(ended, f"{name} has ended")
    book.known[name] = book.ask("GET", f"/container/byname/{name}")
    book.unsure.discard(name)


class Lab:
    """A server that goes through stories, with a container that must not notice any of it; all are on `mount`."""

    def __init__(self, server: FaultyServer, mount: dict[str, Any] | None = None) -> None:
        self.server = server
        self.book = Book(server, mount=mount)
        self.witness = self.book.create("witness", COUNTING)

    def steps(self, story: Story) -> list[Step]:
        """The steps of a story."""
        tell = story(self.book)
        self._settle()
        self.server.faults.record()
        tell()
        self._settle()
        found = self.server.faults.recorded()
        self.clear()
        return found

    def interrupt(self, story: Story, step: Step, who: str) -> bool:
        """Tell a story with a fault, and see that nothing is lost and nothing left. Whether the step has come."""
        with _located(f"{story.__name__}: {who} killed at {step}"):
            came = self._break(story, step, who)
            self.server.revive()
            self.check()
            self.clear()
        return came

    def _break(self, story: Story, step: Step, who: str) -> bool:
        tell = story(self.book)
        self._settle()
        self.server.faults.arm(step, self.server.victims(who))
        with contextlib.suppress(Interrupted):
            tell()
        if not (came := self.server.faults.disarm()):
            self._settle()
        return came

    def steps_of_a_start(self) -> list[Step]:
        """The steps of a server that finds what another has left in the middle of its work."""
        self._leave_work()
        self.server.faults.record()
        self.server.revive()
        self.check()
        found = self.server.faults.recorded()
        self.clear()
        return found

    def interrupt_start(self, step: Step, who: str) -> None:
        """Kill the server in the middle of its work, and the next while it finds that, and see what the third has."""
        with _located(f"a start: {who} killed at {step}"):
            self._leave_work()
            self.server._end_by_itself()
            self.server.start_in_vain(step, who)
            self.server.revive()
            self.check()
            self.clear()

    def _leave_work(self) -> None:
        """A create whose overlay is mounted, and an end that nobody has noted."""
        made = _make_obedient(self.book, "ended")
        self._break(create, Step("worker mount mounting._mount_either_way < mounting.make", 1), "all")
        self.book.known.pop("ended")
        self.book.unsure.add("ended")
        os.kill(made["pid"], signal.SIGUSR1)

    def _settle(self) -> None:
        eventually(lambda: not audit.differences(self.server), "all is at rest")

    def check(self) -> None:
        self.book.check(self.server.get("/container"))
        check_clean(self.server)

    def clear(self) -> None:
        """All but the witness goes."""
        drop_mounts(self.server)
        for name in [*self.book.known]:
            if name != "witness":
                self.book.change("DELETE", name, "?force=true")
        self.check()

    def check_log(self) -> None:
        check_counted(self.witness)


def drop_mounts(server: FaultyServer) -> None:
    """Delete the mounts of their own whose answer, or whose delete's, no client has heard. (What is below another is
    not deleted: that is refused.)"""
    held = {key for one in server.get("/container") for key in _mounts_below(one["mount"])}
    for mount in server.get("/mount"):
        if mount["id"] not in held and mount["refs"] == 1:
            server.http.delete(f"/mount/{mount['id']}")


def _mounts_below(mount: dict[str, Any]) -> Iterator[int]:
    yield mount["id"]
    for lower in mount.get("overlay", {}).get("lower", ()):
        yield from _mounts_below(lower)


def check_clean(server: Server) -> None:
    """Records and kernel agree, at least when what is under way is done."""
    left: list[str] = []

    def clean() -> bool:
        left[:] = audit.differences(server)
        return not left

    try:
        eventually(clean, "records and kernel agree", 12)
    except AssertionError as late:
        raise AssertionError(f"{late}: {left}") from None


def check_counted(witness: dict[str, Any]) -> None:
    """One that counts has all its numbers in its log, each once."""
    lines = Path(witness["logfile"]).read_text().splitlines()
    printed = [line for line in lines if line.startswith("line ")]
    assert printed == [f"line {number}" for number in range(len(printed))]


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Whatever fails says where."""
    try:
        yield
    except BaseException as error:
        error.add_note(where)
        raise
