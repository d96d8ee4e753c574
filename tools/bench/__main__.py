"""`make bench`, or as root: PYTHONPATH=tests .venv/bin/python -m tools.bench [--only NAME]... [--rounds N]"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from tools.bench.contestants import tidied
from tools.bench.figures import FIGURES
from tools.bench.lab import Lab, opened
from tools.bench.machine import Watch
from tools.bench.report import Report, lines, write

RESULTS = Path(__file__).parents[2] / "build/bench/results.json"


def main() -> int:
    options = _parser().parse_args()
    if os.geteuid() != 0:
        print("make bench attaches, mounts and makes namespaces: run it as root", file=sys.stderr)
        return 1
    report = _measure(options.only or list(FIGURES), options.rounds)
    print("\n".join(lines(report)))
    write(report, options.json)
    print(f"\nEvery value is in {options.json}")
    return 1 if report.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench BENCH_ARGS=...", description="Measure speed and smallness.")
    parser.add_argument("--only", action="append", choices=list(FIGURES), help="this figure (may repeat)")
    parser.add_argument("--rounds", type=int, default=80, help="rounds of what takes turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where every value goes (default: %(default)s)")
    return parser


def _measure(names: list[str], rounds: int) -> Report:
    watch = Watch()
    report = Report(watch.machine, rounds)
    with tidied(), opened(rounds) as lab:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            _measure_one(name, lab, report)
    watch.finish()
    return report


def _measure_one(name: str, lab: Lab, report: Report) -> None:
    try:
        report.figures[name] = FIGURES[name](lab)
    except Exception as error:  # whatever it was: the others are measured, and this one is told
        traceback.print_exc()
        report.failed[name] = f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
