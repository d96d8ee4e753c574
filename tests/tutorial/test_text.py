"""That the text is taken apart rightly: each command whole, none left out."""

from __future__ import annotations

import json

import pytest

from tutorial import text

pytestmark = pytest.mark.pure


def test_the_commands_are_those_of_the_text() -> None:
    names = [command.line.split(" ")[0:2] for command in text.commands()]
    assert names == [
        ["nohup", "sudo"],
        ["curl", "-s"],
        ["dmesg", "|"],
        ["ls", "-l"],
        ["curl", "-s"],
        ["sudo", "ls"],
        ["curl", "-s"],
        ["curl", "-s"],
        ["sudo", "cat"],
        ["curl", "-s"],
        ["ps", "-elF"],
        ["sudo", "nsenter"],
        ["curl", "-s"],
        ["curl", "-s"],
        *[["curl", "-XDELETE"]] * 4,
        ["sudo", "cat"],
        ["ls", "-l"],
    ]


def test_every_dollar_of_the_text_begins_a_command() -> None:
    assert text.TEXT.count("$ ") == len(text.commands())


def test_every_answer_is_json() -> None:
    answers = [command.answer() for command in text.commands() if command.line.endswith("| jq")]
    assert len(answers) == 7
    assert answers[0]["options"]["secret"] == text.MASK


def test_the_log_is_whole() -> None:
    lines = text.log_lines()
    assert len(lines) == 29
    assert (lines[0], lines[-1]) == ("container(0): container created", "container(0): container deleted")


def test_the_nested_bodies_are_the_overlay_and_the_container() -> None:
    overlay, container = text.nested_bodies()
    assert list(json.loads(overlay)) == ["lower"]
    with pytest.raises(json.JSONDecodeError) as misprint:
        json.loads(container)
    assert misprint.value.lineno == container[: container.index('"systemd" true')].count("\n") + 1
