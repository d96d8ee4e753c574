"""What is pure in `make bench-images`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import images
from tools.bench_images import __main__ as table
from tools.bench_images import formats

pytestmark = pytest.mark.pure

SOURCES = """\
Types: deb
URIs: mirror
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: mirror-security
Suites: bookworm-security
Components: main
"""


def test_every_image_has_a_name_of_its_own() -> None:
    assert len({packing.name for packing in formats.PACKINGS}) == len(formats.PACKINGS)


def test_a_cluster_of_erofs_is_told_in_bytes_and_a_block_is_none() -> None:
    options = {packing.name: packing.options for packing in formats.PACKINGS}
    assert options["erofs lz4hc 64K"] == ("-zlz4hc", "-C65536")
    assert options["erofs lz4hc 4K"] == ("-zlz4hc",)


def test_package_sources_are_those_of_another_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "suite", lambda: "bookworm")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/debian.sources").write_text(SOURCES)
    written = formats.of_release("trixie", tmp_path / "in/debian.sources", tmp_path)
    assert written.read_text() == "Types: deb\nURIs: mirror\nSuites: trixie\nComponents: main\n"


def test_an_image_that_cannot_be_made_says_why_in_its_row() -> None:
    rounds = {name: [1.0, 3.0, 2.0] for name in table.COLUMNS}
    assert table.columns(table.Row("good", size=3 << 19, built=0.25, rounds=rounds)).split() == [
        "1.5",
        "0.2",
        *["2"] * 5,
    ]
    assert table.columns(table.Row("bad", error="no zstd")) == "  cannot be made here: no zstd"
