"""What the server looks at before all else."""

from __future__ import annotations

import pytest

from imageapi import server

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("5.14.0-427.13.1.el9_4.x86_64", (5, 14)),
        ("6.1.0-56-amd64", (6, 1)),
        ("6.12.117+deb12-amd64", (6, 12)),
        ("6.18+", (6, 18)),
        ("4.18.0-553.el8.x86_64", (4, 18)),
    ],
)
def test_the_version_of_a_kernel(release: str, version: tuple[int, ...]) -> None:
    assert server._version(release) == version
    assert (version < server.OLDEST_KERNEL) == release.startswith("4.")
