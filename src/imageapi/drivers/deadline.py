"""The time that an operation of several steps has for all of them."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable


class Deadline:
    """A moment after which an operation is given up."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """The seconds that are left.

        Raises: TimeoutError when there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "the deadline has passed")
        return left

    def within(self, seconds: float) -> Deadline:
        """This moment, or the one in so many seconds if that is sooner.

        Raises: TimeoutError when it has passed.
        """
        return Deadline(min(seconds, self.left()))

    def wait(self, done: Callable[[], bool]) -> None:
        """Return once `done` holds. It is asked every few milliseconds: use it where nothing can be polled.

        Raises: TimeoutError.
        """
        while not done():
            time.sleep(min(self.left(), 0.003))
