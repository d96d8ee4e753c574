"""What the tests of the local kinds have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from drivers.bench import Bench, bench_on
from imageapi.config import Site


@pytest.fixture
def bench(site: Site) -> Iterator[Bench]:
    """A place to acquire objects in; they are released when the test ends."""
    with bench_on(site) as bench:
        yield bench
