"""Imported first by the server: what libraries take only because it happens to be installed is kept out.

msgspec asks typing_extensions for what this Python's typing has as well, and with it come inspect, ast and tokenize:
1 MB of the memory that all processes share, and 11 ms of the start.
"""

from __future__ import annotations

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules
if "typing_extensions" not in _modules:
    _modules["typing_extensions"] = None  # whoever imports it is told that there is none (import system, "sys.modules")
    import msgspec as msgspec

    del _modules["typing_extensions"]
