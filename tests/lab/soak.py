"""`make soak`: clients work while whatever can die does, for as long as asked; then all must be as if nothing had.

A round is a fault with the clients at work, a pause, and a look: what was answered is so, records and kernel agree, the
witnesses have printed every number. All is drawn from the seed, but for what the machine's own timing decides.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab import session as test_session
from lab.book import COUNTING, OBEDIENT, VICTIMS, WITH_HELPERS, Book, FaultyServer, Interrupted
from lab.ceph import Cluster
from lab.crashes import check_clean, check_counted, drop_unknown, kill_helpers
from lab.faults import Step
from lab.images import small_image
from lab.machine import Machine
from lab.server import FOREVER, SOURCE, alive, eventually, other_release, squashfs

CLIENTS = 4
MOST = 4
"""Containers of one client at a time."""
FAULT_IN = 1.5
"""Seconds for a step to come that a fault waits for."""


class Worker(threading.Thread):
    """A client at work, whenever it may."""

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(daemon=True)
        self.book = Book(soak.server, f"c{number}-", soak.server.client())
        self.idle = threading.Event()
        self.failure: BaseException | None = None
        self._soak = soak
        self._random = random.Random(f"{soak.seed}/{number}")
        self._made = 0

    def run(self) -> None:
        while not self._soak.over:
            self.idle.set()
            self._soak.work.wait()
            self.idle.clear()
            try:
                self._do()
            except Interrupted:
                time.sleep(0.01)
            except BaseException as error:
                self.failure = self.failure or error
                self._soak.work.clear()

    def _do(self) -> None:
        """One request, or two that belong together."""
        name = self._random.choice([*self.book.known]) if self.book.known else None
        if name is None or (len(self.book.known) < MOST and self._random.random() < 0.4):
            self._create()
            return
        what = self._random.choice(("/running", "/exited", "", "?force=true", "look", "mount"))
        if what == "look":
            self.book.ask("GET", self._random.choice(("/container", "/mount", "/attach")))
        elif what == "mount":
            self._mount()
        elif what.startswith("/"):
            self.book.change("GET", name, what)
        else:
            self.book.change("DELETE", name, what)
        self._soak.done[what or "delete"] += 1

    def _create(self) -> None:
        self._made += 1
        command = self._random.choice((FOREVER, OBEDIENT, OBEDIENT, "/bin/true", "/bin/false"))
        state = self._random.choice(("running", "running", "created"))
        mount = self._random.choice(self._soak.mounts)
        self.book.create(f"{self.book.prefix}{self._made}", command, state, mount=mount)
        self._soak.done["create"] += 1

    def _mount(self) -> None:
        """A mount of one's own, and its delete. One of which nobody knows is found and deleted in the pause."""
        made = self.book.ask("POST", "/mount", squashfs())
        self.book.ask("DELETE", f"/mount/{made['id']}")


class Soak:
    """One run."""

    def __init__(self, run_dir: Path, chosen: argparse.Namespace, mounts: list[dict[str, Any]]) -> None:
        self.seed = seed = chosen.seed
        self.victims = VICTIMS if chosen.spare_helpers or len(mounts) == 1 else (*VICTIMS, *WITH_HELPERS)
        self.random = random.Random(seed)
        self.mounts = mounts
        self.server = FaultyServer(run_dir)
        self.releases = [SOURCE, other_release(run_dir.parent / "release")]
        self.done: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()
        self.work = threading.Event()
        self.over = False
        self._steps: list[str] = []
        self.server.start()
        self.witnesses = Book(self.server, "witness-")
        for number, mount in enumerate(mounts):
            self.witnesses.create(f"witness-{number}", COUNTING, mount=mount)
        self.workers = [Worker(self, number) for number in range(CLIENTS)]
        for worker in self.workers:
            worker.start()

    def round(self) -> None:
        """A fault with the clients at work, and a look at what has come of it."""
        kinds = {"step": 8, "moment": 3, "restart": 2, "upgrade": 2, "helper": 2 * ("helper" in self.victims)}
        kind = self.random.choices([*kinds], [*kinds.values()])[0]
        self.work.set()
        try:
            self.faults[getattr(self, f"_{kind}")()] += 1
        finally:
            self._pause()
        self.server.faults.disarm()
        self.server.revive()
        self.check()

    def _pause(self) -> None:
        self.work.clear()
        for worker in self.workers:
            assert worker.idle.wait(70), "a client has had no answer for 70 s"

    def _step(self) -> str:
        """Kill somebody at a step, of all that the clients have been seen to cause."""
        if self.faults["step"] % 50 == 0:
            self.server.faults.record()
            time.sleep(2)
            self._steps = sorted({*self._steps, *(step.name for step in self.server.faults.recorded())})
        who = self.random.choice(self.victims)
        step = Step(self.random.choice(self._steps), self.random.choice((1, 1, 2, 3)))
        self.server.faults.arm(step, self.server.victims(who))
        end = time.monotonic() + FAULT_IN
        while not self.server.faults.came and time.monotonic() < end:
            time.sleep(0.005)
        self.faults[f"{who} at a step"] += self.server.faults.came
        return "step"

    def _moment(self) -> str:
        """Kill somebody, whatever is going on."""
        who = self.random.choice(("server", "supervisor", "zygote", "both"))
        time.sleep(self.random.uniform(0, 0.4))
        victims = self.server.victims(who)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(
            lambda: not any(map(alive, victims)), "who was killed is dead"
        )  # a server without zygote ends, later
        return f"{who} at a moment"

    def _restart(self) -> str:
        time.sleep(self.random.uniform(0, 0.4))
        self.server.stop()
        return "stop of the server"

    def _upgrade(self) -> str:
        """The next server is of another release."""
        time.sleep(self.random.uniform(0, 0.4))
        self.server.stop()
        self.server.package = self.releases[self.server.package == self.releases[0]]
        self.server.start()
        time.sleep(self.random.uniform(0, 0.3))
        return "upgrade"

    def _helper(self) -> str:
        """Kill a storage daemon. What a container then reads is its own business."""
        time.sleep(self.random.uniform(0, 0.4))
        kill_helpers(self.server)
        return "storage daemon"

    def check(self) -> None:
        """Nothing is lost, and nothing left."""
        for worker in self.workers:
            if worker.failure:
                raise worker.failure
        shown = self.server.get("/container")
        books = [self.witnesses, *(worker.book for worker in self.workers)]
        for book in books:
            book.check([one for one in shown if one["name"].startswith(book.prefix)])
        assert sum(len(book.known) for book in books) == len(shown), shown
        drop_unknown(self.server)
        check_clean(self.server)
        for known in self.witnesses.known.values():
            check_counted(known)
        self.checked["looks"] += 1
        self.checked["containers"] += len(shown)

    def end(self) -> None:
        """All goes, and leaves nothing."""
        self.over = True
        self.work.set()
        for worker in self.workers:
            worker.join(70)
            worker.book.close()
        self.server.faults.disarm()
        self.server.revive()
        self.server.clear()
        self.server.stop()
        self.server.http.close()
        self.server.faults.close()

    def report(self) -> str:
        rounds = (f"{sum(counts.values())} {what} ({_listed(counts)})" for what, counts in self._figures())
        return "; ".join(rounds) + f"; seed {self.seed}"

    def _figures(self) -> Iterator[tuple[str, Counter[str]]]:
        yield "operations", self.done
        yield "faults", Counter({kind: count for kind, count in self.faults.items() if kind != "step"})
        yield "checks", self.checked


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def _overlay(lower: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "overlay", "overlay": {"lower": [lower]}}


@contextlib.contextmanager
def _ceph(place: Path) -> Iterator[dict[str, Any]]:
    """A mount of an image in a Ceph of our own."""
    cluster = Cluster(str(place))
    cluster.start()
    try:
        cluster.import_image(str(small_image()), "soak")
        options = {"secret": cluster.admin_key, "ro": True}
        image = {"monitors": [cluster.monitor], "pool": "rbd", "image": "soak", "options": options}
        yield {"kind": "rbd", "rbd": {"fs_type": "squashfs", "mount_options": ["ro"], "rbd": image}}
    finally:
        cluster.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description="Set these with SOAK_ARGS.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--no-ceph", action="store_true", help="loop images alone, which takes no Ceph")
    parser.add_argument("--spare-helpers", action="store_true", help="kill no storage daemon of Ceph images")
    chosen = parser.parse_args()
    machine = Machine(test_session.begin())
    before = machine.look()
    try:
        with contextlib.ExitStack() as stack:
            mounts = [_overlay(squashfs())]
            if not chosen.no_ceph:
                mounts.append(_overlay(stack.enter_context(_ceph(machine.session.fast / "ceph"))))
            failed = _run(machine.session.fast, chosen, mounts)
        left = machine.settle(before)
        print("\n".join(left), flush=True)
        return 1 if failed or left else 0
    finally:
        machine.tidy()


def _run(place: Path, chosen: argparse.Namespace, mounts: list[dict[str, Any]]) -> bool:
    """Whether anything was not as it should be: the reason is printed, and how to have it again."""
    run_dir = place / "run"
    run_dir.mkdir()
    soak = Soak(run_dir, chosen, mounts)
    end = time.monotonic() + chosen.minutes * 60
    try:
        while time.monotonic() < end:
            soak.round()
        soak.end()
        for directory in (run_dir, soak.releases[1]):
            shutil.rmtree(directory)
    except BaseException as error:
        traceback.print_exc(file=sys.stdout)
        print(f"{soak.report()}\nagain: make soak SOAK_ARGS='--seed {chosen.seed} --minutes {chosen.minutes:g}'")
        _keep_logs(run_dir)
        with contextlib.suppress(BaseException):
            soak.end()
        if not isinstance(error, Exception):
            raise
        return True
    print(soak.report(), flush=True)
    return False


def _keep_logs(run_dir: Path) -> None:
    for log in (run_dir / "server.log", run_dir / "supervisor/log"):
        print(f"--- {log.name}, its end:\n", "\n".join(log.read_text().splitlines()[-30:]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
