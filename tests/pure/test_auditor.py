"""Looks at what has become of the objects, where one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imageapi.engine import rundir
from imageapi.engine.audit import Look
from imageapi.engine.engine import Engine
from imageapi.errors import Problem
from pure.slow_kernel import SlowKernel, act

pytestmark = pytest.mark.pure


def test_files_are_made_again_with_the_first_look_that_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their directories were, at the one before, and are not missing any more."""
    missing: Iterator[bool] = iter((True, False, False))
    looks: Iterator[Look | None] = iter((None, Look(set(), [], set()), Look(set(), [], set())))
    restored: list[str] = []

    async def look(store: str, job: Any, timeout: float) -> Look:
        if (seen := next(looks)) is None:
            raise Problem("the host has no memory left")
        return seen

    async def restore() -> None:
        restored.append("files")

    async def scenario(engine: Engine, kernel: SlowKernel) -> None:
        monkeypatch.setattr(rundir, "restore", lambda site: next(missing))
        monkeypatch.setattr(engine._auditor, "_restore_files", restore)
        monkeypatch.setattr(engine._jobs, "run", look)
        assert [await engine._auditor.look(None) for _ in range(3)] == [False, True, True]
        assert restored == ["files"]

    act(scenario, tmp_path)
