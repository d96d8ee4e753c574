"""The kernel's log, where some file systems say what their errno does not: /dev/kmsg."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Self


class Tail:
    """What the kernel logs from now on. Empty where the log may not be read."""

    def __enter__(self) -> Self:
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def about(self, *words: str) -> str:
        """The messages since the start that hold one of `words` (others' happen at the same time)."""
        found = (message for message in self._messages() if any(word in message for word in words))
        return "; ".join(dict.fromkeys(found))

    def _messages(self) -> Iterator[str]:
        """One read gives one record: "6,1234,5678,-;message", then lines that begin with a blank."""
        while self._fd is not None:
            try:
                record = os.read(self._fd, 8192)
            except BrokenPipeError:  # older records were overwritten before we read them
                continue
            except BlockingIOError:
                return
            yield record.partition(b";")[2].partition(b"\n")[0].decode("utf-8", "replace")
