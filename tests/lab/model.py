"""What the API promises of one object, as steps on a small state: for the search of an order (lab.history).

A create is seen at its end, but takes its name when it begins; a delete is seen to be under way before it is done. So
both are two steps, as is a start. What is told of an object at the end of an operation is a step, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from lab.history import Reads, State, Step

ACTIVE = ("starting", "running", "stopping")


class Box(NamedTuple):
    """A container: `there` is no, yes, leaving or gone."""

    there: str = "no"
    run: str = "created"

    @property
    def shown(self) -> str | None:
        """The state that is told of it, if it can be read."""
        if self.there not in ("yes", "leaving"):
            return None
        return "created" if self.run == "starting" else self.run


# ------------------------------------------------------------------------------------------------------ containers


def box_drift(state: Any) -> Iterable[State]:
    """A container that stops, or is killed since it is deleted, has ended at some time."""
    ends = state.run == "stopping" or (state.there == "leaving" and state.run in ACTIVE)
    return [state._replace(run="exited")] if ends else []


def bereft_drift(state: Any) -> Iterable[State]:
    """What a container runs on may have been deleted by force: whoever starts it, by whatever name, leaves it dead."""
    yield from box_drift(state)
    yield from _if(state.there == "yes" and state.run not in ACTIVE, state, "dead")


def box_made(run: str) -> tuple[Step, ...]:
    return (lambda state: [Box("yes", run)] if state.there == "no" else [],)


def box_shown(run: str | None) -> tuple[Step, ...]:
    """It was read in this state, or was not there."""
    return (Reads(lambda state: state.shown == run),)


def _begin_start(state: Any) -> Iterable[State]:
    if state.there == "yes":
        return [state] if state.run in ("running", "starting") else _if(state.run != "stopping", state, "starting")
    return []


def _end_start(state: Any) -> Iterable[State]:
    return [state._replace(run="running")] if state.run == "starting" else [state]


def _if(condition: bool, state: Any, run: str) -> Iterable[State]:
    return [state._replace(run=run)] if condition else []


def _stop(state: Any) -> Iterable[State]:
    if state.there != "yes" or state.run == "starting":
        return []
    return [state._replace(run="stopping")] if state.run == "running" else [state]


def box_asked(wanted: str, code: int, told: str | None, *, bereft: bool = False) -> tuple[Step, ...]:
    """A container was asked for a state, and `told` to be in that one; `bereft`: what it runs on is gone."""
    if bereft:
        return (Reads(lambda state: state.there != "yes" or state.run == "dead"),)
    if code == 200 and wanted == "running":
        return (_begin_start, _end_start, *box_shown(told))
    if code == 200:
        return (_stop, *box_shown(told))
    if code == 409 and wanted == "running":
        return (Reads(lambda state: state.there == "leaving" or state.run == "stopping"),)
    if code == 409:
        return (Reads(lambda state: state.there == "leaving"),)
    return (Reads(lambda state: state.there in ("no", "gone")),)


def box_deleted(code: int, told: str | None, *, force: bool) -> tuple[Step, ...]:
    """`told`: the state that it was last in."""
    if code == 200:
        return (lambda state: _leave(state, told, force=force), _go)
    if code == 409:
        return (Reads(lambda state: state.there == "yes" and state.run in ACTIVE and not force),)
    return (Reads(lambda state: state.there in ("no", "gone")),)


def _leave(state: Any, told: str | None, *, force: bool) -> Iterable[State]:
    if state.there != "yes" or (state.run in ACTIVE and not force):
        return []
    last = ("exited", state.shown) if state.run in ACTIVE else (state.shown,)
    return [state._replace(there="leaving")] if told in last else []


def _go(state: Any) -> Iterable[State]:
    return [Box("gone")] if state.there == "leaving" else []


# ----------------------------------------------------------------------------------------------------------- names


def name_taken(client: object, number: int) -> tuple[Step, ...]:
    """A create of container `number` has succeeded; the name is taken before it can be read."""
    return (lambda state: [("taken", client)] if state is None else [], lambda state: [number])


def name_tried(client: object) -> tuple[Step, ...]:
    """A create has failed, and may have taken the name before it did."""
    held = ("taken", client)
    return (
        lambda state: [state, held] if state is None else [state],
        lambda state: [None if state == held else state],
    )


name_in_use: tuple[Step, ...] = (Reads(lambda state: state is not None),)
name_known: tuple[Step, ...] = (Reads(lambda state: isinstance(state, int)),)
name_unknown: tuple[Step, ...] = (Reads(lambda state: not isinstance(state, int)),)


def name_is(number: int) -> tuple[Step, ...]:
    return (Reads(lambda state: state == number),)


def name_freed(number: int) -> tuple[Step, ...]:
    return (lambda state: [None] if state == number else [],)


# ---------------------------------------------------------------------------------------------------------- mounts


class Root(NamedTuple):
    """A mount that has a POST of its own, and how many containers stand on it."""

    there: str = "no"
    users: int = 0
    passing: int = 0
    """Of those the ones whose create comes to nothing."""


root_made: tuple[Step, ...] = (lambda state: [Root("yes")] if state.there == "no" else [],)
root_unknown: tuple[Step, ...] = (Reads(lambda state: state.there in ("no", "gone")),)
root_leaving: tuple[Step, ...] = (Reads(lambda state: state.there != "no"),)


def root_shown(refs: int) -> tuple[Step, ...]:
    return (Reads(lambda state: state.there in ("yes", "leaving") and refs == state.users + 1),)


def _use(state: Any) -> Iterable[State]:
    return [state._replace(users=state.users + 1)] if state.there == "yes" else []


def _leave_alone(state: Any) -> Iterable[State]:
    return [state._replace(users=state.users - 1)] if state.there != "gone" else [state]


def _try(state: Any) -> Iterable[State]:
    """A create that fails may have taken the mount before it did."""
    return [state, *(one._replace(passing=one.passing + 1) for one in _use(state))]


def _fail(state: Any) -> Iterable[State]:
    return [state, *(one._replace(passing=one.passing - 1) for one in _leave_alone(state) if state.passing)]


root_used: tuple[Step, ...] = (_use,)
root_tried: tuple[Step, ...] = (_try, _fail)
root_left: tuple[Step, ...] = (_leave_alone,)


def root_deleted(code: int, *, force: bool) -> tuple[Step, ...]:
    if code == 200:
        return (
            lambda state: (
                [state._replace(there="leaving")] if state.there == "yes" and (force or not state.users) else []
            ),
            lambda state: [Root("gone")] if state.there == "leaving" else [],
        )
    if code == 409:
        return (Reads(lambda state: state.there == "yes" and state.users > 0),)
    return root_unknown
