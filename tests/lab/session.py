"""The places of one test run. Everything the run makes is made in them, or by a process that carries their token in its
environment: that is how its traces are told from those of another run on the same machine.

There are two: `fast`, in memory, and `disk`, where temporary files go. Both are named `imageapi-test-<token>`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lab import table

PREFIX = "imageapi-test-"
VARIABLE = "IMAGEAPI_TEST_TOKEN"
USUAL = "/run/imageapi"
"""The run directory of a server that is not told of another."""
CLAIM = "in-the-usual-place"


class Session(NamedTuple):
    """One test run. The token is four hex digits; the instances of its sites begin with them."""

    token: str
    fast: Path
    disk: Path

    @property
    def name(self) -> str:
        return PREFIX + self.token

    @property
    def images(self) -> Path:
        """Where the run's copies of images are."""
        return self.fast / "images"

    def concerns_a_neighbour(self, text: str) -> bool:
        """Whether `text` (a path, a line of mountinfo) names the place of another test run."""
        return PREFIX in text.replace(self.name, "") or (USUAL in text and any(_claims(self)))

    @contextlib.contextmanager
    def in_the_usual_place(self) -> Iterator[None]:
        """Within it what is in the usual run directory is this run's."""
        claim = self.disk / CLAIM
        claim.touch()
        try:
            yield
        finally:
            claim.unlink()


def begin() -> Session:
    """A new test run: make its places, and hand its token on to every process it starts."""
    token = secrets.token_hex(2)
    session = _session(token)
    for place in {session.fast, session.disk}:
        place.mkdir(mode=0o755)
    session.images.mkdir()
    os.environ[VARIABLE] = token
    os.environ["TMPDIR"] = tempfile.tempdir = str(session.disk)
    return session


def current() -> Session | None:
    """The run that this process belongs to."""
    token = os.environ.get(VARIABLE)
    return _session(token) if token else None


def neighbours(session: Session) -> Iterator[Path]:
    """The places of other test runs on this machine, and what others left."""
    for parent in {session.fast.parent, session.disk.parent}:
        yield from (place for place in parent.glob(f"{PREFIX}*") if place.name != session.name)


def _claims(session: Session) -> Iterator[Path]:
    """The claims of other runs to the usual place."""
    return (claim for place in neighbours(session) if (claim := place / CLAIM).exists())


def _session(token: str) -> Session:
    name = PREFIX + token
    return Session(token, _memory() / name, Path("/tmp") / name)


def _memory() -> Path:
    """A directory on a tmpfs where this user can write; `/tmp` where there is none."""
    on_tmpfs = {line.split()[1] for line in table.lines("/proc/mounts") if line.split()[2] == "tmpfs"}
    usable = (place for place in ("/run", "/dev/shm") if place in on_tmpfs and os.access(place, os.W_OK))
    return Path(next(usable, "/tmp"))
