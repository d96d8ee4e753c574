"""An event loop over epoll(7), for a process with a single thread: descriptors and timers, each with a handler."""

from __future__ import annotations

import heapq
import itertools
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable

from imageapi.linux.memory import REST

Handler = Callable[[], object]


class Timer:
    """A handler to be called once; cancelling one that was called is no error."""

    __slots__ = ("handler",)

    def __init__(self, handler: Handler) -> None:
        self.handler: Handler | None = handler

    def cancel(self) -> None:
        self.handler = None


class Loop:
    """Handlers are called one at a time, until `stop`. One that raises has a bug: the trace goes to stderr, and its
    descriptor is watched no more. `at_rest` is called once whenever there was nothing to do for long (memory.REST)."""

    def __init__(self) -> None:
        self.at_rest: Handler = lambda: None
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._gone: set[int] = set()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._stopped = False

    def watch(self, descriptor: int, handler: Handler) -> None:
        """Call `handler` whenever there is something to read, or the other end is gone; no other that was called for
        that."""
        if descriptor not in self._handlers:
            self._epoll.register(descriptor, select.EPOLLIN)
        self._handlers[descriptor] = handler

    def unwatch(self, descriptor: int) -> None:
        """To be called before the descriptor is closed; one that is not watched is no error."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
            self._gone.add(descriptor)

    def after(self, seconds: float, handler: Handler) -> Timer:
        """Call `handler` once, `seconds` from now."""
        timer = Timer(handler)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def on_signal(self, number: int, handler: Handler) -> None:
        """Call `handler` after a signal: at once, and in turn with the others."""
        ours, pythons = socket.socketpair(type=socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(pythons.detach(), warn_on_full_buffer=False)

        def hear() -> None:
            ours.recv(1)
            handler()

        self.watch(ours.fileno(), hear)

    def stop(self) -> None:
        """Have `run` return."""
        self._stopped = True

    def run(self) -> None:
        """Call handlers until `stop`."""
        while not self._stopped:
            self._gone.clear()
            for descriptor, _ in self._wait():
                if descriptor not in self._gone:  # it may be closed, and its number another's by now
                    self._call(self._handlers.get(descriptor), descriptor)
            if self._timers and self._timers[0][0] <= time.monotonic():
                self._call(heapq.heappop(self._timers)[2].handler)

    def _wait(self) -> list[tuple[int, int]]:
        """What is ready; nothing, when a timer is due."""
        patience = self._patience()
        if patience is not None and patience <= REST:
            return self._epoll.poll(patience)
        if ready := self._epoll.poll(REST):
            return ready
        self._call(self.at_rest)
        return self._epoll.poll(self._patience())

    def _patience(self) -> float | None:
        """Seconds until the next timer, those cancelled passed over; None without one."""
        while self._timers and self._timers[0][2].handler is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _call(self, handler: Handler | None, descriptor: int | None = None) -> None:
        if handler is None or self._stopped:
            return
        try:
            handler()
        except Exception:
            traceback.print_exc()
            if descriptor is not None:
                self.unwatch(descriptor)
