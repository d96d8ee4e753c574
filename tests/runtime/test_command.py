"""A command is split as a shell would, and looked at in a tree that is not trusted."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageapi.errors import Invalid
from imageapi.runtime import command, init, layout, logs

pytestmark = pytest.mark.pure

PROGRAM = Path("/bin/true").read_bytes()
"""A program of this machine that needs a dynamic loader."""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/bin/sh", ["/bin/sh"]),
        ("  /bin/sh   -c  'a b' ", ["/bin/sh", "-c", "a b"]),
        ('/bin/echo "a \\"b\\"" c\\ d', ["/bin/echo", 'a "b"', "c d"]),
        ("/bin/echo $HOME * ~ `id` # no comment", ["/bin/echo", "$HOME", "*", "~", "`id`", "#", "no", "comment"]),
        ("/bin/echo ''", ["/bin/echo", ""]),
        ("/bin/echo a;b|c&d>e", ["/bin/echo", "a;b|c&d>e"]),
    ],
)
def test_quotes_count_and_nothing_is_expanded(text: str, words: list[str]) -> None:
    assert command.split(text) == words


@pytest.mark.parametrize("text", ["", "   ", "''", "/bin/sh 'open", '/bin/sh "open', "/bin/sh \\"])
def test_what_is_no_command_is_refused_at_its_place(text: str) -> None:
    with pytest.raises(Invalid) as refused:
        command.split(text)
    assert refused.value.fields["path"] == "$.command"


# ------------------------------------------------------------------------------------------------ in a tree


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    """A directory as the root of an image; /bin/true in it is a program of this machine, without its loader."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/true").write_bytes(Path("/bin/true").read_bytes())
    (tmp_path / "bin/true").chmod(0o755)
    descriptor = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def write(tmp_path: Path, name: str, content: bytes, mode: int = 0o755) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / name).chmod(mode)


def refusal(root: int, path: str) -> str:
    with pytest.raises(Invalid) as refused:
        command.validate(root, [path])
    return refused.value.message


def test_a_loader_that_is_missing_is_named(root: int, tmp_path: Path) -> None:
    message = refusal(root, "/bin/true")
    assert "the dynamic loader that /bin/true needs" in message
    loader = message.removeprefix("there is no ").split(",")[0]
    assert loader.startswith("/lib")
    (tmp_path / loader[1:]).parent.mkdir(parents=True)
    write(tmp_path, loader[1:], b"\x7fELF")
    assert "is no dynamic loader" in refusal(root, "/bin/true")
    write(tmp_path, loader[1:], b"#!/bin/sh\n" * 20)
    assert "is no dynamic loader" in refusal(root, "/bin/true")
    write(tmp_path, loader[1:], Path("/bin/true").read_bytes())
    command.validate(root, ["/bin/true"])


def test_an_interpreter_may_be_a_script_but_not_for_ever(root: int, tmp_path: Path) -> None:
    write(tmp_path, "bin/loop", b"#!/bin/loop\n")
    assert "too often" in refusal(root, "/bin/loop")
    write(tmp_path, "bin/outer", b"#! /bin/inner -x\n")
    write(tmp_path, "bin/inner", b"#!/bin/none\n")
    assert "/bin/none, the interpreter of /bin/inner" in refusal(root, "/bin/outer")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "neither a program nor a script"),
        (b"text\n", "neither a program nor a script"),
        (b"#!\n", "names no interpreter"),
        (b"#! \0/bin/true\n", "names no interpreter"),
        (b"#!/bin/none\0 and more\n", "there is no /bin/none, the interpreter"),
        (b"#!/bin/\xff\n", "there is no /bin/\\xff, the interpreter"),
        (b"#!/bin/true\r\n", "there is no /bin/true\\r, the interpreter of /bin/odd in the image; the script's lines"),
        (b"#!/" + b"a" * 300 + b"\n", "too long"),
        (b"\x7fELF", "damaged"),
        (PROGRAM[:64], "damaged"),
        (PROGRAM[:300], "damaged"),
        (PROGRAM[:800], "damaged"),
        (PROGRAM[:16] + b"\1\0" + PROGRAM[18:], "object file"),
        (b"\x7fELF\x02\x01\x01" + bytes(11) + struct.pack("<H", 75), "built for machine 75"),
    ],
)
def test_what_the_kernel_cannot_execute_is_told(root: int, tmp_path: Path, content: bytes, reason: str) -> None:
    write(tmp_path, "bin/odd", content)
    assert reason in refusal(root, "/bin/odd")


def test_a_line_without_an_end_names_an_interpreter_all_the_same(root: int, tmp_path: Path) -> None:
    write(tmp_path, "bin/last", b"#!/bin/none")
    assert "/bin/none, the interpreter of /bin/last" in refusal(root, "/bin/last")
    write(tmp_path, "bin/long", b"#!/bin/none " + b"a" * 300)
    assert "/bin/none, the interpreter of /bin/long" in refusal(root, "/bin/long")


@pytest.mark.parametrize("number", [errno.ENOEXEC, errno.ELIBBAD, errno.ENOENT, errno.EACCES, errno.E2BIG])
def test_what_only_the_kernel_refuses_is_the_commands_own_fault(root: int, tmp_path: Path, number: int) -> None:
    write(tmp_path, "bin/static", Path("/bin/busybox").read_bytes())
    reason = command.explain(root, ["/bin/static"], OSError(number, os.strerror(number)))
    assert isinstance(reason, Invalid)
    assert os.strerror(number) in reason.message


def test_a_failure_is_told_whatever_is_in_its_words() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        init._report(theirs, Invalid("there is no \udcff"))
        assert rb"there is no \\xff" in ours.recv(1 << 16)
        ours.close()
        init._report(theirs, Invalid("nobody hears it"))


def test_no_path_leads_out_of_the_tree(root: int, tmp_path: Path) -> None:
    (tmp_path / "bin/out").symlink_to("/bin/busybox-that-only-the-host-could-have")
    (tmp_path / "etc").symlink_to("../../../../../../etc")
    assert "there is no /bin/out" in refusal(root, "/bin/out")
    assert "cannot be reached" in refusal(root, "/etc/passwd")  # /etc leads to itself
    assert "there is no /../../../etc" not in refusal(root, "/../../../bin")  # that is the tree's own /bin


def test_only_regular_files_are_opened(root: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "bin/pipe", 0o755)
    assert "no regular file" in refusal(root, "/bin/pipe")


# ------------------------------------------------------------------------------------------ the log, the layout


def test_a_line_is_one_line_in_the_tutorials_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "localtime", lambda: (2021, 2, 11, 0, 8, 34, 3, 42, 0))
    told = logs.lines("container(0)", ["container\ncreated", "container deleted"])
    assert told == (
        b"2021/02/11 00:08:34 container(0): container created\n2021/02/11 00:08:34 container(0): container deleted\n"
    )


def test_a_log_grows_line_by_line(tmp_path: Path) -> None:
    path = str(tmp_path / "0-1.log")
    logs.append(path, "container(0)", "container created")
    logs.append(path, "container(0)", "container deleted")
    assert [line.split(" ", 3)[3] for line in Path(path).read_text().splitlines()] == [
        "container created",
        "container deleted",
    ]


def test_the_plan_says_what_it_does_before_it_does_it() -> None:
    plain = [step.describe() for step in layout.PLAIN if step.describe()]
    systemd = [step.describe() for step in layout.SYSTEMD if step.describe()]
    assert [line for line in systemd if line in plain] == plain
    assert [line.split()[-1] for line in systemd if line not in plain] == [
        *("/run", "/tmp", "/sys/fs/cgroup", "/var/lib/journal"),
    ]
