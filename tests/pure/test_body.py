"""A body that is no JSON is pointed at, and nothing of it is repeated: a secret may stand in it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageapi.api import body
from imageapi.errors import Malformed
from tutorial import text

pytestmark = pytest.mark.pure

KEY = "AQC71s9fOrv9KxAAmH7vB3vQGyVmwbBd005B4A=="


def refuse(data: bytes) -> str:
    with pytest.raises(Malformed) as caught:
        body.decode(data)
    return caught.value.message


PLACES: list[tuple[bytes, int, int, str]] = [
    (b"", 1, 1, "empty"),
    (b" ", 1, 2, "expecting value, found the end"),
    (b"{", 1, 2, "found the end"),
    (b'{"a" true}', 1, 6, "expecting ':' delimiter, found a word"),
    (b'{"a": 1\n "b": 2}', 2, 2, "expecting ',' delimiter, found a string"),
    (b'{"a":\n\n 1 7}', 3, 4, "found a number"),
    (b"[1,]", 1, 4, "found ']'"),
    (b"{'a': 1}", 1, 2, "found '''"),
    (b'["\x01"]', 1, 3, "invalid control character, found an unprintable"),
    (b'["\\x"]', 1, 3, "escape"),
    (b"[1] x", 1, 5, "extra data"),
    (b'{"a": NaN}', 1, 7, "invalid character"),
    (b'{"a":\n "\xff"}', 2, 3, "not UTF-8"),
    (b"\xef\xbb\xbf{}", 1, 1, "invalid character"),
    (b"\xff\xfe{\x00}\x00", 1, 1, "not JSON"),
    ('{"é" 1}'.encode(), 1, 6, "':'"),
]


@pytest.mark.parametrize(("data", "line", "column", "words"), PLACES)
def test_the_place_of_what_is_no_json(data: bytes, line: int, column: int, words: str) -> None:
    message = refuse(data)
    assert message.startswith(f"line {line}, column {column}: ")
    assert words in message


def test_the_tutorials_misprint_is_pointed_at() -> None:
    """The last body of the text says `"systemd" true`."""
    broken = text.nested_bodies()[-1]
    line = next(number for number, found in enumerate(broken.splitlines(), 1) if '"systemd" true' in found)
    column = broken.splitlines()[line - 1].index("true") + 1
    what = "the body is not JSON: expecting ':' delimiter, found a word"
    assert refuse(broken.encode()) == f"line {line}, column {column}: {what}"


@pytest.mark.parametrize(
    "data",
    [f'{{"secret" "{KEY}"}}', f'{{"secret": {KEY}}}', f'{{"secret": "{KEY}" "x"}}', f'{{"secret": "{KEY}\x01"}}', KEY,
     f'["{KEY}\\ud800"]', f'{{"{KEY}": 1e999}}'],
)  # fmt: skip
def test_a_secret_in_the_wrong_place_is_not_repeated(data: str) -> None:
    message = refuse(data.encode())
    assert not any(KEY[at : at + 4] in message for at in range(len(KEY) - 3)), message


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 5000 + b"]" * 5000])
def test_a_bomb_is_refused(data: bytes) -> None:
    assert "deeply" in refuse(data)


def test_of_a_name_that_stands_twice_the_last_counts() -> None:
    assert body.decode(b'{"a": 1, "a": 2}') == {"a": 2}


@given(st.one_of(st.binary(max_size=40), st.text(alphabet='{}[]":,0e-\\utrn\n ', max_size=40).map(str.encode)))
def test_any_bytes_are_read_as_every_parser_reads_them_or_pointed_at(data: bytes) -> None:
    try:
        value: Any = body.decode(data)
    except Malformed as problem:
        message = problem.message
    else:
        assert value == json.loads(data)
        return
    match = re.match(r"line (\d+), column (\d+): .", message)
    assert match, message
    assert 1 <= int(match[1]) <= data.count(b"\n") + 1
    assert 1 <= int(match[2]) <= len(data) + 1
