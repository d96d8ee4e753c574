"""`make soak`: clients work while whatever can die does, and the host changes, fails and has no room, for as long as
asked; then all must be as if nothing had been.

A round is a fault with the clients at work, a pause, and a look: what was answered is so, records and kernel agree, the
witnesses have printed every number. All is drawn from the seed, but for what the machine's own timing decides.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import secrets
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab import ordeals
from lab import session as test_session
from lab.book import COUNTING, OBEDIENT, VICTIMS, WITH_HELPERS, Book, FaultyServer, Interrupted
from lab.ceph import Cluster
from lab.crashes import check_clean, check_counted, drop_unknown, located
from lab.images import small_image
from lab.machine import Machine
from lab.room import Filler, tmpfs
from lab.scene import Scene
from lab.server import FOREVER, SOURCE, other_release, squashfs
from lab.session import Session

CLIENTS = 4
TOLD_EVERY = 60.0
"""Seconds between two lines about how far it is."""
MOST = 4
"""Containers of one client at a time."""
MENDED_IN = 40.0
"""Seconds for all to be as it should: a storage daemon that is to be replaced while the store is slow takes more than
one try."""
ROOM = "size=64m,nr_inodes=3000"
"""What the run directory has: enough, until somebody uses it up (tmpfs(5))."""


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
        mount = self._random.choice(self._soak.scene.mounts)
        self.book.create(f"{self.book.prefix}{self._made}", command, state, mount=mount)
        self._soak.done["create"] += 1

    def _mount(self) -> None:
        """A mount of one's own, and its delete. One of which nobody knows is found and deleted in the pause."""
        made = self.book.ask("POST", "/mount", squashfs())
        self.book.ask("DELETE", f"/mount/{made['id']}")


class Soak:
    """One run."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.seed = seed
        self.scene = scene
        self.server = scene.server
        self.done: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()
        self.work = threading.Event()
        self.over = False
        self._told = time.monotonic()
        self.server.start()
        self.witnesses = Book(self.server, "witness-")
        for number, mount in enumerate(scene.mounts):
            self.witnesses.create(f"witness-{number}", COUNTING, mount=mount)
        self.workers = [Worker(self, number) for number in range(CLIENTS)]
        for worker in self.workers:
            worker.start()

    def round(self) -> None:
        """A fault with the clients at work, and a look at what has come of it."""
        kind = ordeals.draw(self.scene)
        with located(kind.name):
            self.work.set()
            try:
                self.scene.faults[kind.name] += kind.do(self.scene) is not False
            finally:
                self._pause()
            self.server.faults.disarm()
            self.server.revive()
            self.check(kind.answers)

    def _pause(self) -> None:
        self.work.clear()
        for worker in self.workers:
            assert worker.idle.wait(70), "a client has had no answer for 70 s"

    def check(self, answers: tuple[int, ...]) -> None:
        """Nothing is lost, and nothing left; and no client was told of a failure but with one of these codes."""
        for worker in self.workers:
            if worker.failure:
                raise worker.failure
            self._check_failures(worker.book, answers)
        self._check_containers(self.server.get("/container"))
        drop_unknown(self.server)
        check_clean(self.server, MENDED_IN)
        for known in self.witnesses.known.values():
            check_counted(known)
        self.checked["looks"] += 1

    def _check_failures(self, book: Book, answers: tuple[int, ...]) -> None:
        """For lack of room nothing is refused that ends or goes."""
        for failure in book.failures:
            assert failure.code in answers, f"{failure} was not to be expected"
            assert "no space" not in failure.message or not failure.ends, f"{failure} needs no room"
        self.checked["failures"] += len(book.failures)
        book.failures.clear()

    def _check_containers(self, shown: list[dict[str, Any]]) -> None:
        books = [self.witnesses, *(worker.book for worker in self.workers)]
        for book in books:
            book.check([one for one in shown if one.get("name", "").startswith(book.prefix)])
        assert sum(len(book.known) for book in books) == len(shown), shown
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

    def tell(self, now: float, end: float) -> None:
        """Once in a while say how far it is."""
        if now > self._told + TOLD_EVERY:
            self._told = now
            sums = ", ".join(f"{sum(counts.values())} {what}" for what, counts in self._figures())
            print(f"{(end - now) / 60:.0f} minutes to go: {sums}", flush=True)

    def report(self) -> str:
        lines = (f"{sum(counts.values())} {what} ({_listed(counts)})" for what, counts in self._figures())
        return ";\n".join([*lines, f"seed {self.seed}"])

    def _figures(self) -> Iterator[tuple[str, Counter[str]]]:
        yield "operations", self.done
        yield "faults", self.scene.faults
        yield "deaths", self.scene.deaths
        yield "checks", self.checked


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def _overlay(lower: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "overlay", "overlay": {"lower": [lower]}}


def _on(cluster: Cluster) -> dict[str, Any]:
    """A mount of an image in a Ceph."""
    cluster.import_image(str(small_image()), "soak")
    options = {"secret": cluster.admin_key, "ro": True}
    image = {"monitors": [cluster.monitor], "pool": "rbd", "image": "soak", "options": options}
    return {"kind": "rbd", "rbd": {"fs_type": "squashfs", "mount_options": ["ro"], "rbd": image}}


@contextlib.contextmanager
def _run_directory(place: Path) -> Iterator[Path]:
    """One that can run full, but for the logs, of which no line may be missing."""
    with tmpfs(place / "run", ROOM) as run_dir, tmpfs(run_dir / "logs", "size=50%"):
        yield run_dir
    run_dir.rmdir()


@contextlib.contextmanager
def _scene(session: Session, chosen: argparse.Namespace) -> Iterator[Scene]:
    """All that a run needs; no server runs yet, and none does any more in the end."""
    with contextlib.ExitStack() as stack:
        cluster = None if chosen.no_ceph else stack.enter_context(Cluster(str(session.fast / "ceph")).running())
        mounts = [_overlay(lower) for lower in (squashfs(), *([_on(cluster)] if cluster else ()))]
        run_dir = stack.enter_context(_run_directory(session.fast))
        server = FaultyServer(run_dir)
        server.log = session.fast / "server.log"
        release = session.fast / "release"
        stack.callback(shutil.rmtree, release)
        releases = [SOURCE, other_release(release)]
        victims = VICTIMS if chosen.spare_helpers or cluster is None else (*VICTIMS, *WITH_HELPERS)
        draws = random.Random(chosen.seed)
        yield Scene(server, draws, session.images, mounts, victims, releases, Filler(run_dir), cluster)
        server.log.unlink()


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
        with _scene(machine.session, chosen) as scene:
            failed = _run(scene, chosen)
        left = machine.settle(before)
        print("\n".join(left), flush=True)
        return 1 if failed or left else 0
    finally:
        machine.tidy()


def _run(scene: Scene, chosen: argparse.Namespace) -> bool:
    """Whether anything was not as it should be: the reason is printed, and how to have it again."""
    soak = Soak(scene, chosen.seed)
    end = time.monotonic() + chosen.minutes * 60
    try:
        while (now := time.monotonic()) < end:
            soak.tell(now, end)
            soak.round()
        soak.end()
    except BaseException as error:
        traceback.print_exc(file=sys.stdout)
        print(f"{soak.report()}\nagain: make soak SOAK_ARGS='--seed {chosen.seed} --minutes {chosen.minutes:g}'")
        _keep_logs(scene.server)
        with contextlib.suppress(BaseException):
            soak.end()
        if not isinstance(error, Exception):
            raise
        return True
    print(soak.report(), flush=True)
    return False


def _keep_logs(server: FaultyServer) -> None:
    for log in (server.log, server.run_dir / "supervisor/log"):
        print(f"--- {log.name}, its end:\n", "\n".join(log.read_text().splitlines()[-30:]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
