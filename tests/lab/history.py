"""Whether what many clients were told at once can be explained by some order of what they asked for.

Each object has a history of its own: the operations that concern it, each with the time in which it was under way and
the steps that it takes there, by a sequential model. An order is searched in which every step is possible (the
algorithm of Wing and Gong, with the states remembered that lead nowhere).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

State = Any
"""A value that can be hashed: what an object is at some time."""
Step = Callable[[State], Iterable[State]]
"""The states that a state may become by a step; none where the step is not possible in it."""


class Reads:
    """A step that never changes anything, and is possible where `condition` holds of the state."""

    def __init__(self, condition: Callable[[Any], bool]) -> None:
        self._condition = condition

    def __call__(self, state: State) -> Iterable[State]:
        return (state,) if self._condition(state) else ()


class Operation(NamedTuple):
    """One operation of a client on one object: under way from `begun` to `ended`, and what it does, in turn."""

    begun: float
    ended: float
    steps: tuple[Step, ...]
    text: str


def unexplained(history: Iterable[Operation], start: State, drift: Step = lambda state: ()) -> list[Operation]:
    """The operations among which is the first that no order explains, all that meet it included; none when there is an
    order. `drift` is what the object does by itself, at any time."""
    operations = sorted(history, key=lambda operation: operation.begun)
    search = _Search(operations, drift)
    if search.finds_order(start):
        return []
    last = operations[search.furthest].ended
    return [operation for operation in operations if operation.begun <= last]


_Place = tuple[int, frozenset[tuple[int, int]], State]
"""All operations before the first number are done; of some after it so many steps; and the state after them."""


class _Search:
    def __init__(self, operations: list[Operation], drift: Step) -> None:
        self._operations = operations
        self._drift = drift
        self._dead: set[_Place] = set()
        self.furthest = 0

    def finds_order(self, start: State) -> bool:
        """Depth first, without recursion: a history may be long."""
        stack = [self._next((0, frozenset(), start))]
        while stack:
            place = next(stack[-1], None)
            if place is None:
                stack.pop()
            elif place[0] == len(self._operations):
                return True
            elif place not in self._dead:
                self._dead.add(place)
                self.furthest = max(self.furthest, place[0])
                stack.append(self._next(place))
        return not self._operations

    def _next(self, place: _Place) -> Iterator[_Place]:
        """Where one can go from here. What only reads is done at once if it can be: it hinders none."""
        done, begun, state = place
        open_ = [*self._open(done, dict(begun))]
        for number, taken in open_:
            step = self._operations[number].steps[taken]
            if isinstance(step, Reads) and step(state):
                yield self._after(done, begun, number, taken, state)
                return
        for other in self._drift(state):
            yield done, begun, other
        for number, taken in open_:
            for other in self._operations[number].steps[taken](state):
                yield self._after(done, begun, number, taken, other)

    def _open(self, done: int, begun: dict[int, int]) -> Iterator[tuple[int, int]]:
        """The operations that may take a step now, with the number of it: none that is not done had ended before they
        began."""
        first = float("inf")
        for number in range(done, len(self._operations)):
            operation, taken = self._operations[number], begun.get(number, 0)
            if operation.begun > first:
                return
            if taken < len(operation.steps):
                first = min(first, operation.ended)
                yield number, taken

    def _after(self, done: int, begun: frozenset[tuple[int, int]], number: int, taken: int, state: State) -> _Place:
        now = dict(begun) | {number: taken + 1}
        while done < len(self._operations) and now.get(done, 0) == len(self._operations[done].steps):
            now.pop(done)
            done += 1
        return done, frozenset(now.items()), state
