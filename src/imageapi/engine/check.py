"""The leak report: all that is not as it should be on this host, each with what would mend it. Nothing is changed.

It needs no server, and works beside one: what is only on its way in or out is not there at the next look, and is left
out. Each part of it is looked at by a process of its own, so that storage that hangs costs that part alone.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from imageapi.config import BASE, Config, Site
from imageapi.drivers.audit import DELETE, Host
from imageapi.engine import rundir
from imageapi.engine.audit import Found, Report, audit, is_live
from imageapi.engine.sweep import SEARCHES, Known, Search
from imageapi.linux import killable
from imageapi.records import AnyRecord, Key, Phase
from imageapi.runtime import leftovers
from imageapi.runtime.leftovers import Leftover, Scene
from imageapi.store import Contents, peek, subject

DEADLINE = 4.0
"""Seconds for one look; what has not come back by then hangs."""
PAUSES = (0.2, 0.5, 1.0)
"""Seconds before each further look: only what all looks have found is told."""


class Answer(NamedTuple):
    """What one part of a look has found, and what of it hangs; "" for nothing."""

    found: list[Found]
    hung: str = ""


def check(site: Site, boot_id: str) -> Report:
    """All that stays wrong for as long as something is wrong. Raises: OSError."""
    report = _look(site, boot_id)
    for pause in PAUSES:
        if not report.found:
            break
        time.sleep(pause)
        again = _look(site, boot_id)
        report = Report([one for one in report.found if one in again.found], report.unseen | again.unseen)
    users = _Users(peek(site.state_dir).records)
    return report._replace(found=[_spelled(one, users) for one in report.found])


def _look(site: Site, boot_id: str) -> Report:
    """What is made meanwhile has a record afterwards, and what goes has one before, or none afterwards."""
    before = peek(site.state_dir)
    answers = killable.ask(_questions(site, boot_id, before), DEADLINE)
    after = peek(site.state_dir)
    known = Known.of(after)
    standing = {(record.key, record.token) for record in after.records if record.phase is Phase.LIVE}
    tokens = {record.key: record.token for record in before.records}
    unseen = {name: str(answer) for name, answer in answers.items() if isinstance(answer, Exception)}
    seen: dict[str, Answer] = {name: answer for name, answer in answers.items() if name not in unseen}
    found = [one for answer in seen.values() for one in answer.found]
    kept = [
        one
        for one in found
        if one.of not in known.keys
        and one.of not in known.tokens
        and (one.about is None or (one.about, tokens.get(one.about)) in standing)
    ]
    unseen |= {name: answer.hung for name, answer in seen.items() if answer.hung}
    return Report([*kept, *_pending(after.records), *map(_unreadable, before.unread)], unseen)


def _questions(site: Site, boot_id: str, contents: Contents) -> dict[str, Callable[[], Answer]]:
    known = Known.of(contents)
    seen = leftovers.scene(site, boot_id, known.keys)
    live = [record for record in contents.records if is_live(record, boot_id)]
    return {
        "the objects": partial(_audited, live, site),
        **{name: partial(_strays, search, site, known) for name, search in SEARCHES.items()},
        **{name: partial(_leftovers, search, seen) for name, search in leftovers.SEARCHES.items()},
    }


def _audited(records: list[AnyRecord], site: Site) -> Answer:
    findings = audit(records, site, Host())
    return Answer([Found(one.wrong.problem, one.wrong.remedy, about=one.key) for one in findings])


def _strays(search: Search, site: Site, known: Known) -> Answer:
    found = []
    try:
        for stray in search(site, known):
            found.append(Found(f"{stray.what} has no record", stray.remedy, of=stray.of))
    except TimeoutError as hung:
        return Answer(found, str(hung))
    return Answer(found)


def _leftovers(search: Callable[[Scene], Iterator[Leftover]], seen: Scene) -> Answer:
    return Answer([Found(one.what, one.remedy, of=one.of) for one in search(seen)])


def _pending(records: Iterable[AnyRecord]) -> list[Found]:
    """What the kernel does not let go, and what stands on something that was deleted by force."""
    every = list(records)
    keys = {record.key for record in every}
    pending = [record for record in every if record.phase is Phase.RELEASING and record.problem]
    bereft = [record for record in every if record.phase is Phase.LIVE and not keys.issuperset(record.edges())]
    return [
        *(Found(record.problem or "", "see to what is said of it", record.key) for record in pending),
        *(Found("what it stands on was deleted", DELETE, record.key) for record in bereft),
    ]


class _Users:
    """Who stands on what. The edges are read once: a thousand containers may have lost what is below them."""

    def __init__(self, records: list[AnyRecord]) -> None:
        self._pinned = {record.key for record in records if record.pinned}
        self._on: defaultdict[Key, list[Key]] = defaultdict(list)
        for record in records:
            for edge in record.edges():
                self._on[edge].append(record.key)

    def deletions(self, key: Key) -> list[Key]:
        """What is to be deleted, in this order, to be rid of an object and of all that stands on it; the rest goes with
        what was made of it."""
        affected = {key: None}
        waiting = [key]
        for one in waiting:
            new = [user for user in self._on.get(one, ()) if user not in affected]
            affected |= dict.fromkeys(new)
            waiting += new
        return [one for one in reversed(waiting) if one in self._pinned or one not in self._on]


def _spelled(one: Found, users: _Users) -> Found:
    """With the requests that its remedy stands for."""
    if one.about is None or DELETE not in one.remedy:
        return one
    requests = [f"DELETE {BASE}/{key.collection}/{key.id}?force=true" for key in users.deletions(one.about)]
    return one._replace(remedy=one.remedy.replace(DELETE, f"{', then '.join(requests)}; then make it again"))


def _unreadable(path: str) -> Found:
    """A file beside the records, or one whose object nobody can reach by now."""
    problem = f"{path} is no record that this version can read"
    if subject(path) is None:
        return Found(problem, f"rm -r {path}")
    remedy = "restart imageapi-server, which ends and clears away what it stood for; until then that is left alone"
    return Found(problem, f"rm -r {path}; {remedy}")


# ------------------------------------------------------------------------------------------ the command


def main(config: Config) -> int:
    """Print the report on a run directory, with or without a server in it. What the process is to end with: 0 when
    all is as it should be, 1 when something is not, 2 when something could not be looked at."""
    instance = rundir.instance(config.run_dir)
    if instance is None:
        return 0
    report = check(config.site(instance), rundir.boot_id())
    for one in report.found:
        print(f"{one.about}: {one.problem}" if one.about else one.problem, f"    {one.remedy}", sep="\n")
    for name, reason in report.unseen.items():
        print(f"could not look at {name}: {reason}", file=sys.stderr)
    return 2 if report.unseen else int(bool(report.found))
