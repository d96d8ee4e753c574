"""The shape of the source: who may import whom, how long a module may be, and what may stand in no file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/imageapi"

VOCABULARY = frozenset({"spec", "records", "errors", "config"})

ARROWS: dict[str, frozenset[str]] = {
    **dict.fromkeys(VOCABULARY, VOCABULARY),
    "linux": frozenset(),
    "store": VOCABULARY | {"linux"},
    "drivers": VOCABULARY | {"linux"},
    "runtime": VOCABULARY | {"linux"},
    "engine": VOCABULARY | {"linux", "drivers", "runtime", "store"},
    "api": VOCABULARY | {"engine"},
    "client": VOCABULARY,
    "cli": frozenset({"client"}),
    "service": VOCABULARY | {"linux", "engine", "api"},
    "options": VOCABULARY,
    "lean": frozenset(),
    "server": VOCABULARY | {"linux", "engine", "service", "options", "lean"},
}
"""For each part of the package the other parts that it may import; its own modules and the version, always."""

OUTSIDE: dict[str, frozenset[str]] = {
    "linux": frozenset(),
    "drivers": frozenset({"msgspec", "urllib3", "backports", "compression"}),
    "api": frozenset({"msgspec", "httptools"}),
    "client": frozenset({"msgspec", "httpx"}),
    "cli": frozenset({"msgspec", "httpx"}),
    "service": frozenset({"uvloop"}),
    "lean": frozenset({"msgspec", "uvloop"}),
}
"""The third-party packages of those parts that are not content with msgspec. What forks stays slim."""

LONGEST = 500
"""Lines of a module; a longer one has more than one subject."""


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package that a module belongs to: `linux` for imageapi/linux/mount.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Every module that the source imports, at the top or within, each `from` also with the name it takes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(part: str, source: str) -> list[str]:
    """What a module of this part imports and may not."""
    return [name for name in imported(source) if not is_allowed(part, name)]


def is_allowed(part: str, name: str) -> bool:
    top, _, rest = name.partition(".")
    if top != "imageapi":
        return top in sys.stdlib_module_names or top in OUTSIDE.get(part, {"msgspec"})
    target = rest.partition(".")[0]
    return target in {part, "__version__"} or target in ARROWS[part]


@pytest.mark.parametrize("path", modules("src"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert list(imported(path.read_text())) == []
        return
    assert part_of(path) in ARROWS, "a new part of the package needs its arrows"
    assert forbidden(part_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("linux", "import msgspec", ["msgspec"]),
        ("linux", "from imageapi.errors import Problem", ["imageapi.errors.Problem"]),
        ("spec", "from imageapi.linux import mount", ["imageapi.linux.mount"]),
        ("engine", "def late():\n    import imageapi.api.routes", ["imageapi.api.routes"]),
        ("runtime", "from imageapi import drivers", ["imageapi.drivers"]),
        ("drivers", "import httptools.parser, os", ["httptools.parser"]),
        ("api", "from imageapi.engine.engine import Engine", []),
        ("linux", "import os, ctypes\nfrom imageapi.linux.libc import libc", []),
    ],
)
def test_the_reader_of_imports_sees_a_forbidden_one(part: str, source: str, wrong: list[str]) -> None:
    assert forbidden(part, source) == wrong


def test_the_arrows_make_no_circle() -> None:
    """A part is below another when it can be reached from it; the vocabulary is one part here."""
    below = {part: targets - VOCABULARY for part, targets in ARROWS.items() if part not in VOCABULARY}
    while leaves := [part for part, targets in below.items() if not targets]:
        below = {part: targets - set(leaves) for part, targets in below.items() if part not in leaves}
    assert below == {}


@pytest.mark.parametrize("path", modules("src", "tests", "tools"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_short_enough_to_be_read_at_once(path: Path) -> None:
    assert len(path.read_text().splitlines()) < LONGEST


MACHINE_PATH = re.compile(r"(?<![\w.})/])/(?:home/\w+/|root/\.\w)")
"""A path in somebody's home. Beside it the path of this very checkout is looked for, unless it is as short as /src."""


def machine_paths(text: str, root: Path = ROOT) -> list[str]:
    own = re.findall(rf"{re.escape(str(root))}(?!\w)", text) if len(root.parts) > 2 else []
    return own + [match[0] for match in MACHINE_PATH.finditer(text)]


def kept_files() -> list[Path]:
    """Every text file that git keeps or would keep, whoever owns the checkout."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_path_of_one_machine() -> None:
    found = {path: machine_paths(path.read_text(errors="replace")) for path in kept_files()}
    assert {path: paths for path, paths in found.items() if paths} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /home" + "/someone/src", 1),
        ("see '/opt/of/somebody/src'", 1),
        ("see /opt/of/somebodys", 0),
        ("the home /root", 0),
        ("{upper}/home/user/", 0),
    ],
)
def test_a_path_of_one_machine_is_recognised(text: str, found: int) -> None:
    assert len(machine_paths(text, Path("/opt/of/somebody"))) == found


def test_the_locks_pin_by_hash_and_name_no_address() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text
        assert "--index-url" not in text
        pinned = [line for line in text.splitlines() if re.match(r"[\w.-]+==", line)]
        assert pinned
        assert text.count("--hash=sha256:") >= len(pinned)


def test_what_is_pinned_is_what_the_package_asks_for() -> None:
    """A dependency added to pyproject.toml without `make lock` would be missed by `make setup`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    wanted = [re.split(r"[^A-Za-z0-9_-]", requirement)[0] for requirement in asked]
    pinned = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE))
    assert wanted
    assert set(wanted) <= pinned
