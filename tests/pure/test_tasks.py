"""What goes on when nobody waits for it, and what is left off."""

from __future__ import annotations

import asyncio

import pytest

from imageapi.engine.tasks import unless

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(("works", "stops", "done"), [(True, False, True), (False, True, False), (True, True, False)])
def test_whether_a_stop_came_before_the_end_of_the_work_is_told(works: bool, stops: bool, done: bool) -> None:
    """A server that is told to end while it starts does not say that it is ready."""

    async def scenario() -> None:
        stop = asyncio.Event()

        async def work() -> None:
            if stops:
                stop.set()
            if not works:
                await asyncio.Event().wait()

        assert await unless(stop, work()) is done

    asyncio.run(scenario())
