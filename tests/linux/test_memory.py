"""What a process gives back it can do without."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.kernel

PROGRAM = """
import re, ssl
from imageapi.linux import memory

def kilobytes():
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(r"^Rss: +([0-9]+)", file.read(), re.MULTILINE)[1])

before = kilobytes()
memory.forget_code()
after = kilobytes()
assert ssl.create_default_context().protocol, "what was let go is there when it is needed"
print(before - after)
"""


def test_the_code_that_was_needed_to_start_is_let_go() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 1024
