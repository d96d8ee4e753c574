"""The table that is printed, and the file with everything that was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap

import msgspec

from tools.bench.machine import Machine
from tools.bench.measure import Figure, Row, Target, percentile, ratio

WIDTH = 46
"""Of the first column, in characters."""
WIDEST = 110
"""Characters of a line."""


class Report(msgspec.Struct):
    """`failed` has the reason for each figure that there is none of."""

    machine: Machine
    rounds: int
    figures: dict[str, Figure] = {}
    failed: dict[str, str] = {}


def write(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))


def lines(report: Report) -> Iterator[str]:
    """The whole table."""
    yield from _machine_lines(report)
    yield ""
    yield f"{'':{WIDTH}}{'median':>10}{'95th':>10}{'ratio':>8}   target"
    for name, figure in report.figures.items():
        yield ""
        yield f"{name}: {figure.title}"
        yield from (_row_line(row, figure.rows) for row in figure.rows)
        yield from _stage_lines(figure.stages)
    for name, reason in report.failed.items():
        yield f"\n{name}: FAILED: {reason}"


def _machine_lines(report: Report) -> Iterator[str]:
    machine = report.machine
    yield f"commit {machine.commit}, {machine.date}; {report.rounds} rounds, {machine.seconds:.0f} s"
    yield f"{machine.processor}, {machine.cores} cores, Linux {machine.kernel}, Python {machine.python}"
    before = f"before: load {machine.load_before:.2f}, {machine.busy_before:.0%} busy"
    after = f"after: load {machine.load_after:.2f}, {machine.busy_after:.0%} busy"
    yield f"{before}; {after}; stolen by the host: {machine.steal:.1%}; frequency governor: {machine.governor}"


def _row_line(row: Row, rows: Sequence[Row]) -> str:
    if not row.values:
        return f"  {row.name:{WIDTH - 2}}  does not run here: {row.error}"
    times = ratio(row, rows)
    columns = f"{_number(statistics.median(row.values)):>10}{_worst(row):>10}{_times(times):>8}"
    return f"  {row.name:{WIDTH - 2}}{columns} {row.unit:3}{verdict(row, times)}".rstrip()


def _worst(row: Row) -> str:
    """The 95th percentile on the bad side: of a rate it is the low one."""
    if len(row.values) == 1:
        return ""
    return _number(percentile(row.values, 0.05 if row.unit == "/s" else 0.95))


def verdict(row: Row, times: float | None) -> str:
    """How the row stands to its targets."""
    median = statistics.median(row.values)
    return "; ".join(_against(target, times if target.ratio else median) for target in row.targets)


def _against(target: Target, value: float | None) -> str:
    wanted = f"{'>=' if target.at_least else '<='} {target.bound:g}{'x' if target.ratio else ''}"
    if value is None:
        return f"{wanted}: unknown"
    missed = target.missed_by(value)
    return f"{wanted}: MISSED by {missed:.0%}" if missed else f"{wanted}: met"


def _stage_lines(accounts: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    for account, stages in accounts.items():
        told = ", ".join(f"{name} {statistics.median(taken):.2f}" for name, taken in stages.items())
        text = f"  {account}: {told}"
        yield from wrap(text, WIDEST, subsequent_indent="    ", break_on_hyphens=False)


def _number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x"
