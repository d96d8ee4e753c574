"""The tree of paths: from the path of a request to what answers there, a step for each segment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from imageapi.api.query import DIGITS
from imageapi.api.resource import Resource


class Route(NamedTuple):
    """One path. A segment in braces stands for any: `{id}` for digits, every other name for any text."""

    path: str
    resource: Resource


class Branch:
    """What is at one path, and where the segments behind it lead. A name that is there goes before what stands for
    any, and digits before text."""

    def __init__(self) -> None:
        self.resource: Resource | None = None
        self._named: dict[str, Branch] = {}
        self._open: dict[str, Branch] = {}

    def add(self, segments: list[str], resource: Resource) -> None:
        if not segments:
            self.resource = resource
            return
        first, *rest = segments
        branches, name = (self._open, first[1:-1]) if first.startswith("{") else (self._named, first)
        branches.setdefault(name, Branch()).add(rest, resource)

    def step(self, segment: str, parts: dict[str, str]) -> Branch | None:
        """The branch behind `segment`. What it says where any may stand is put into `parts`."""
        if (named := self._named.get(segment)) or not segment:
            return named
        for name, branch in self._open.items():
            if name != "id" or DIGITS.fullmatch(segment):
                parts[name] = segment
                return branch
        return None


class Paths:
    """All routes of the API."""

    def __init__(self, routes: Iterable[Route]) -> None:
        """Of two that stand for any at one place, the one that comes first is asked first."""
        self._root = Branch()
        for path, resource in routes:
            self._root.add(path.split("/")[1:], resource)

    def find(self, path: str) -> tuple[Resource | None, dict[str, str]]:
        """What answers at `path`, or None; and what stands in its open places."""
        branch: Branch | None = self._root
        parts: dict[str, str] = {}
        for segment in path.split("/")[1:]:
            if branch is None:
                break
            branch = branch.step(segment, parts)
        return branch.resource if branch else None, parts
