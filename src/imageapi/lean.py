"""Kept out: what libraries would take, and this program never uses. The server imports this first.

- msgspec asks typing_extensions, where that is installed, for what this Python's typing has as well, and with it come
  inspect, ast and tokenize: 1 MB of the memory that all processes share, and 11 ms of the start.
- asyncio and uvloop import ssl, and with it libcrypto: 1.4 MB of the server's own. The https listener, where there is
  one, speaks TLS without their help (api/secure); what fetches images by https does so in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_modules: dict[str, Any] = sys.modules


class _NoTls(ModuleType):
    """In the place of ssl while an event loop is imported, which takes exceptions and error numbers of it."""

    def __getattr__(self, name: str) -> Any:
        return 0 if name.startswith("SSL_ERROR_") else type(name, (Exception,), {})


@contextmanager
def _without(name: str, instead: ModuleType | None = None) -> Iterator[None]:
    """Who imports the module meanwhile is told that there is none (import system, "sys.modules"), or gets another."""
    if name in _modules:
        yield
        return
    _modules[name] = instead
    try:
        yield
    finally:
        del _modules[name]


with _without("typing_extensions"):
    import msgspec as msgspec


def load_event_loop() -> None:
    """Import asyncio and uvloop, before anybody else does."""
    with _without("ssl", _NoTls("ssl")):
        import uvloop as uvloop
