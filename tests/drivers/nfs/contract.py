"""What `test_contract` checks for the kinds that every kernel has, tried on the NFS driver, within the guest."""

from __future__ import annotations

import os
import shutil
from typing import Literal

from drivers.bench import Bench, Made, stored, traces
from drivers.interruptions import deaths, errors
from imageapi.config import Site
from imageapi.records import Facts
from imageapi.spec import Mount, Nfs

RUN_DIR = "/run/contract"
Version = Literal["3", "4.2"]


def interrupted(host: str, path: str, version: Version) -> dict[str, int]:
    """Kill acquire and release at each of their steps, and let each call of acquire fail; what was left is undone by
    release. The steps of each.

    Raises: AssertionError, when it is not: what is left then goes with the guest.
    """
    site = Site(run_dir=RUN_DIR, instance="0badcafe")
    os.makedirs(site.mounts_dir)
    bench = Bench(site)
    made = bench.plan(Mount(kind="nfs", nfs=Nfs(host, path, ro=True, version=version)))
    steps = {
        "killed in acquire": _killed_in_acquire(bench, made),
        "failed in acquire": _failed_in_acquire(bench, made),
        "killed in release": _killed_in_release(bench, made),
    }
    shutil.rmtree(RUN_DIR)
    return steps


def _killed_in_acquire(bench: Bench, made: Made) -> int:
    driver, before, step = bench.driver(made.record), traces(bench.site), 0
    for step in deaths(lambda: driver.acquire(made.record, [], bench.site)):
        bench.release(stored(made.record))
        assert traces(bench.site) == before, f"killed after step {step}"
    bench.release(made.record)
    return step


def _failed_in_acquire(bench: Bench, made: Made) -> int:
    driver, before, step = bench.driver(made.record), traces(bench.site), 0
    for step, failed in errors(lambda: driver.acquire(made.record, [], bench.site)):
        if not failed:
            bench.release(made.record)
        assert traces(bench.site) == before, f"call {step} failed"
    bench.release(made.record)
    return step


def _killed_in_release(bench: Bench, made: Made) -> int:
    driver, before, step = bench.driver(made.record), traces(bench.site), 0
    made.record.facts = driver.acquire(made.record, [], bench.site)
    for step in deaths(lambda: driver.release(made.record, bench.site)):
        bench.release(made.record)
        assert traces(bench.site) == before, f"killed after step {step}"
        made.record.facts = Facts()
        made.record.facts = driver.acquire(made.record, [], bench.site)
    bench.release(made.record)
    return step
