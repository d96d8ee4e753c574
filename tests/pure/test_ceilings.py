"""What the server says at its start of the kernel's ceilings."""

from __future__ import annotations

import pytest

from imageapi.engine import ceilings
from imageapi.linux import ceilings as kernel

pytestmark = pytest.mark.pure


def test_those_that_a_thousand_containers_would_reach_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = {"fs.mount-max": 1500, "fs.inotify.max_user_instances": 128, "kernel.pty.max": None}
    monkeypatch.setattr(kernel, "ceiling", lambda name: found.get(name, 10**6))
    monkeypatch.setattr("resource.getrlimit", lambda _: (10**6, 10**6))
    ceilings.warn()
    assert caplog.messages == [
        "fs.mount-max is 1500, which is enough for some 500 containers; raise it for more",
        "fs.inotify.max_user_instances is 128, which is enough for some 25 containers with systemd; raise it for more",
    ]
