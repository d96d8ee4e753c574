"""Stories that a server is killed in, and what must be so afterwards.

A story is one request, or a few, after a setting that has been answered. It is told once to learn its steps, and then
once for each of them with a fault at it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from lab import audit
from lab.book import COUNTING, MISSING, OBEDIENT, Book, FaultyServer, Interrupted
from lab.faults import Step
from lab.server import Server, alive, eventually

Story = Callable[[Book], Callable[[], object]]
"""Sets the scene, and returns what is told with a fault in it."""


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


def attach(book: Book) -> Callable[[], object]:
    """An attachment that nobody else has, of the image that all have, comes and goes."""
    attachment = copy.deepcopy(_attachment(book.mount["overlay"]["lower"][0]))
    attachment[attachment["kind"]]["readPartitions"] = True

    def tell() -> None:
        made = book.ask("POST", "/attach", attachment)
        assert "id" in made, made
        book.ask("DELETE", f"/attach/{made['id']}")

    return tell


def _attachment(mount: dict[str, Any]) -> dict[str, Any]:
    """What a mount is on."""
    definition: dict[str, Any] = mount[mount["kind"]]
    return definition.get("attach") or {"kind": mount["kind"], mount["kind"]: definition[mount["kind"]]}


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
    *(attach, groups),
)
ON_A_HELPER = (attach, create, start, stop, delete, delete_by_force, collect, mend)
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
        self.deaths: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        """Faults that were met, by story and victim; and those that were not, by step."""

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
        with located(f"{story.__name__}: {who} killed at {step}"):
            came = self._break(story, step, who)
            self.server.revive()
            self.check()
            if not self._is_waiting():
                self.book.create("next")  # after a start there is a child in waiting again
            self.clear()
        self._count(story.__name__, step, who, came)
        return came

    def _count(self, what: str, step: Step, who: str, came: bool) -> None:
        self.deaths[f"{what}: {who}"] += came
        self.missed[str(step)] += not came

    def _break(self, story: Story, step: Step, who: str) -> bool:
        tell = story(self.book)
        self._settle()
        self.server.faults.arm(step, self.server.victims(who))
        with contextlib.suppress(Interrupted):
            tell()
        eventually(self._is_over, "the step has come, or all is at rest")
        return self.server.faults.disarm()

    def _is_over(self) -> bool:
        """Whether the step has come, or will not come any more."""
        with contextlib.suppress(httpx.TransportError):
            return self.server.faults.came or self._is_at_rest()
        return self.server.faults.came

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
        with located(f"a start: {who} killed at {step}"):
            self._leave_work()
            self.server._end_by_itself()
            came = self.server.start_in_vain(step, who)
            self.server.revive()
            self.check()
            self.clear()
        self._count("the server's start", step, who, came)

    def _leave_work(self) -> None:
        """A create whose overlay is mounted, and an end that nobody has noted."""
        made = _make_obedient(self.book, "ended")
        self._break(create, Step("worker mount mounting._mount_either_way < mounting.make", 1), "all")
        self.book.known.pop("ended")
        self.book.unsure.add("ended")
        os.kill(made["pid"], signal.SIGUSR1)

    def _settle(self) -> None:
        eventually(self._is_at_rest, "all is at rest")

    def _is_at_rest(self) -> bool:
        """Whether nothing is under way, and the child in waiting has made all that it makes ahead."""
        return not audit.differences(self.server) and self._is_waiting()

    def _is_waiting(self) -> bool:
        with contextlib.suppress(StopIteration, FileNotFoundError):  # there is no supervisor, or not any more
            return any(map(_waits, audit.children(self.server.supervisor)))
        return False

    def check(self) -> None:
        self.book.check(eventually(self._as_they_are, "who is said to run does"))
        check_clean(self.server)

    def _as_they_are(self) -> Any:
        """The containers, if none is shown to run that has just ended, for lack of its image."""
        found = self.server.get("/container")
        return found if all(alive(one["pid"]) for one in found if one["state"] == "running") else None

    def clear(self) -> None:
        """All but the witness goes."""
        drop_unknown(self.server)
        for name in [*self.book.known]:
            if name != "witness":
                self.book.change("DELETE", name, "?force=true")
        self.check()

    def report(self) -> str:
        """How many deaths there were, and at which steps none."""
        died = (f"{count} {what}" for what, count in sorted(self.deaths.items()))
        missed = (f"{step} ({count})" for step, count in sorted(self.missed.items()) if count)
        return "\n".join([f"{self.deaths.total()} deaths:", *died, "not met:", *missed])

    def check_log(self) -> None:
        check_counted(self.witness)


def _waits(pid: int) -> bool:
    """Whether a process waits to be told what to become, rather than for its death at a step (proc_pid_wchan(5))."""
    with contextlib.suppress(OSError):
        comm, waits_in = (Path(f"/proc/{pid}/{file}").read_text() for file in ("comm", "wchan"))
        return comm == "imageapi-child\n" and "poll" in waits_in
    return False


def drop_unknown(server: FaultyServer) -> None:
    """Delete the mounts and attachments of their own whose answer, or whose delete's, no client has heard. (What is
    below another is not deleted: that is refused.)"""
    held = {key for one in server.get("/container") for key in _mounts_below(one["mount"])}
    for mount in server.get("/mount"):
        if mount["id"] not in held and mount["refs"] == 1:
            server.http.delete(f"/mount/{mount['id']}")
    for attachment in server.get("/attach"):
        if attachment["refs"] == 1:
            server.http.delete(f"/attach/{attachment['id']}")


def _mounts_below(mount: dict[str, Any]) -> Iterator[int]:
    yield mount["id"]
    for lower in mount.get("overlay", {}).get("lower", ()):
        yield from _mounts_below(lower)


def check_clean(server: Server, patience: float = 12) -> None:
    """Records and kernel agree, at least when what is under way is done: within so many seconds."""
    left: list[str] = []

    def clean() -> bool:
        left[:] = audit.differences(server)
        return not left

    try:
        eventually(clean, "records and kernel agree", patience)
    except AssertionError as late:
        raise AssertionError(f"{late}: {left}") from None


def check_counted(witness: dict[str, Any]) -> None:
    """One that counts has all its numbers in its log, each once."""
    lines = Path(witness["logfile"]).read_text().splitlines()
    printed = [line for line in lines if line.startswith("line ")]
    assert printed == [f"line {number}" for number in range(len(printed))]


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Whatever fails says where."""
    try:
        yield
    except BaseException as error:
        error.add_note(where)
        raise
