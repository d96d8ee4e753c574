"""A kind of attachment, stopped at each of its steps; this runs in a guest: `python3 -m drivers.in_guest <record`.

It goes through the contract as `test_contract.py` does for the local kinds: killed after every third step of acquire
and of release, and with every call failing, nothing is left once it is released. It prints how many steps there were.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

from drivers.interruptions import deaths, errors
from imageapi import records
from imageapi.config import Site
from imageapi.drivers.base import driver
from imageapi.records import AnyRecord
from lab.guest.traces import traces

SITE = Site(run_dir="/run/in-guest", instance="feedc0de")

EVERY = 3
"""Most steps are several calls of one function's; under emulation each takes a fifth of a second."""


def lasting() -> list[str]:
    """What counts: a child of a process that was killed ends by itself."""
    return [trace for trace in traces() if not trace.startswith(("process", "control group", "key"))]


class Steps:
    """One record and its driver."""

    def __init__(self, record: AnyRecord) -> None:
        self.record = record
        self.driver = driver(record.key.collection, record.kind)
        self.before = lasting()

    def acquire(self) -> None:
        self.driver.acquire(self.record, [], SITE)

    def release(self) -> None:
        self.driver.release(self.record, SITE)

    def released(self, after: str) -> None:
        self.release()
        self.nothing_is_left(after)
        assert self.driver.observe(self.record, SITE) is None, after

    def nothing_is_left(self, after: str) -> None:
        assert lasting() == self.before, f"{after}: {set(lasting()) ^ set(self.before)}"

    def deaths_of_acquire(self) -> Iterator[int]:
        for step in deaths(self.acquire, every=EVERY):
            self.released(f"acquire was killed after step {step}")
            yield step

    def deaths_of_release(self) -> Iterator[int]:
        self.acquire()
        for step in deaths(self.release, every=EVERY):
            self.released(f"release was killed after step {step}")
            self.acquire()
            yield step
        self.released("release was not killed")

    def failing_calls(self) -> Iterator[int]:
        for step, failed in errors(self.acquire):
            if not failed:
                self.release()
            self.nothing_is_left(f"call {step} failed")
            yield step
        self.released("no call failed")


def main() -> None:
    for directory in (SITE.run_dir, SITE.mounts_dir, SITE.helpers_dir):
        os.mkdir(directory)
    record = records.decode("attach", sys.stdin.buffer.read())
    steps = Steps(record)
    each = (steps.deaths_of_acquire, steps.deaths_of_release, steps.failing_calls)
    print(json.dumps([sum(1 for _ in goes()) for goes in each]))
    for directory in (SITE.helpers_dir, SITE.mounts_dir, SITE.run_dir):
        os.rmdir(directory)


if __name__ == "__main__":
    main()
