"""`make bench-images`, or as root: .venv/bin/python -m tools.bench_images [--rounds N] [--image FILE.squashfs]"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tools import images
from tools.bench.machine import Machine, Watch
from tools.bench.measure import Unable
from tools.bench_images import formats, reading
from tools.bench_images.formats import PACKINGS

RESULTS = Path(__file__).parents[2] / "build/bench/images.json"
COLUMNS = {
    "list": "list all",
    "read": "read all",
    "shuffled": "shuffled",
    "pieces": "pages",
    "again": "warm",
}
MEBIBYTE = 1 << 20


class Row(msgspec.Struct):
    """One image: bytes, seconds to build, and the milliseconds of each round; or why there is none."""

    name: str
    size: int = 0
    built: float = 0.0
    rounds: dict[str, list[float]] = {}
    error: str = ""


class Report(msgspec.Struct):
    """What the tree was, and what was measured."""

    machine: Machine
    files: int
    bytes: int
    rows: list[Row]


def main() -> int:
    options = _parser().parse_args()
    if os.geteuid() != 0:
        print("make bench-images mounts: run it as root", file=sys.stderr)
        return 1
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="bench-images-", dir=options.directory) as scratch:
        report = _measure(watch, options.image or images.systemd_image(), Path(scratch), options.rounds)
    watch.finish()
    print("\n".join(_lines(report)))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    print(f"\nEvery value is in {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-images", description="Compare image formats.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which all take turns (default: %(default)s)")
    parser.add_argument("--image", type=Path, help="a squashfs whose tree is taken (default: the demo's small Debian)")
    parser.add_argument(
        "--directory", default="/var/tmp", help="where images are made, on a disk (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where every value goes (default: %(default)s)")
    return parser


def _measure(watch: Watch, image: Path, scratch: Path, rounds: int) -> Report:
    tree = formats.tree_of(image, scratch)
    mountpoint = scratch / "mounted"
    mountpoint.mkdir()
    rows = [_built(packing, tree, scratch) for packing in PACKINGS]
    files, total = formats.size_of(tree)
    for _ in range(rounds):
        for packing, row in zip(PACKINGS, rows, strict=True):
            if not row.error:
                for name, taken in reading.measure(scratch / row.name, packing.fs_type, mountpoint).items():
                    row.rounds.setdefault(name, []).append(taken)
    return Report(watch.machine, files, total, rows)


def _built(packing: formats.Packing, tree: Path, scratch: Path) -> Row:
    print(f"{packing.name} ...", file=sys.stderr, flush=True)
    image = scratch / packing.name
    try:
        taken = formats.build(packing, tree, image)
    except Unable as error:
        return Row(packing.name, error=str(error))
    os.sync()  # what is not on the disk would be written while others are measured
    return Row(packing.name, image.stat().st_size, taken)


def _lines(report: Report) -> Iterator[str]:
    machine = report.machine
    yield f"commit {machine.commit}, {machine.date}; {machine.processor}, {machine.cores} cores, Linux {machine.kernel}"
    yield f"a tree of {report.files} files, {report.bytes / MEBIBYTE:.0f} MiB; medians, times in ms"
    yield ""
    titles = "".join(f"{title:>10}" for title in COLUMNS.values())
    yield f"{'':24}{'MiB':>8}{'build s':>9}{titles}"
    for row in report.rows:
        yield f"{row.name:24}{columns(row)}"


def columns(row: Row) -> str:
    if row.error:
        return f"  cannot be made here: {row.error}"
    times = "".join(f"{statistics.median(row.rounds[name]):>10.0f}" for name in COLUMNS)
    return f"{row.size / MEBIBYTE:>8.1f}{row.built:>9.1f}{times}"


if __name__ == "__main__":
    sys.exit(main())
