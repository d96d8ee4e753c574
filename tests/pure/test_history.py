"""The search for an order: it finds one where there is one, and none where there is none."""

from __future__ import annotations

import pytest

from lab.history import Operation, Step, unexplained
from lab.model import (
    Box,
    Root,
    box_asked,
    box_deleted,
    box_drift,
    box_made,
    box_shown,
    name_freed,
    name_in_use,
    name_taken,
    root_deleted,
    root_made,
    root_shown,
    root_used,
)

pytestmark = pytest.mark.pure

Told = tuple[float, float, tuple[Step, ...]]
MADE: Told = (0, 1, box_made("created"))
STARTED: Told = (2, 5, box_asked("running", 200, "running"))


def history(*told: Told) -> list[Operation]:
    return [Operation(begun, ended, steps, "") for begun, ended, steps in told]


@pytest.mark.parametrize(
    "told",
    [
        [
            MADE,
            (2, 3, box_shown("created")),
            (2.5, 4, box_deleted(200, "created", force=False)),
            (3.5, 5, box_shown(None)),
        ],
        [
            MADE,
            STARTED,
            (3, 4, box_shown("created")),
            (4, 6, box_asked("exited", 200, "stopping")),
            (7, 8, box_shown("exited")),
        ],
        [MADE, STARTED, (3, 6, box_deleted(200, "exited", force=True)), (4, 7, box_asked("running", 409, None))],
        [(0, 9, box_made("created")), (1, 2, box_shown(None)), (3, 4, box_shown("created"))],
    ],
)
def test_what_some_order_explains(told: list[Told]) -> None:
    assert unexplained(history(*told), Box(), box_drift) == []


@pytest.mark.parametrize(
    "told",
    [
        [MADE, (2, 3, box_shown(None))],
        [MADE, (2, 3, box_deleted(200, "created", force=False)), (4, 5, box_shown("created"))],
        [MADE, STARTED, (6, 7, box_deleted(200, "running", force=False))],
        [MADE, STARTED, (6, 7, box_shown("exited"))],
        [MADE, STARTED, (3, 4, box_shown("running")), (4.1, 4.2, box_shown("created"))],
        [MADE, (2, 9, box_deleted(200, "created", force=False)), (2, 9, box_deleted(200, "created", force=False))],
    ],
)
def test_what_no_order_explains(told: list[Told]) -> None:
    assert unexplained(history(*told), Box(), box_drift)


def test_names_and_references() -> None:
    assert not unexplained(history((0, 1, name_taken("a", 3)), (0, 1, name_in_use), (2, 3, name_freed(3))), None)
    assert unexplained(history((0, 1, name_taken("a", 3)), (0, 1, name_taken("b", 4))), None)
    made, used = (0, 1, root_made), (2, 3, root_used)
    assert not unexplained(history(made, used, (2, 4, root_shown(1)), (4, 5, root_shown(2))), Root())
    assert unexplained(history(made, used, (4, 5, root_shown(1))), Root())
    assert unexplained(history(made, used, (4, 5, root_deleted(200, force=False))), Root())
