"""What is refused, with what words; and that the machine and the server are as before."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab.machine import Machine
from lab.server import FOREVER, Server, box, copy_of_small_image, eventually, image, lent, shared, squashfs, writable

pytestmark = pytest.mark.api

OPTIONS = ("--read-timeout", "1s", "--max-body-size", "64KB")


@pytest.fixture(scope="module")
def impatient(machine: Machine, module_run_dir: Path) -> Iterator[Server]:
    with shared(machine, module_run_dir, *OPTIONS) as server:
        yield server


@pytest.fixture
def server(impatient: Server) -> Iterator[Server]:
    """A server whose patience is short. Nothing that is refused may change it."""
    with lent(impatient) as server:
        yield server
        assert [one for one in server.everything() if not one["refs"]] == []


def nested(definition: Any) -> dict[str, Any]:
    """A container on a mount of this definition, so that every refusal comes from deep within."""
    return {"mount": {"kind": "overlay", "overlay": {"lower": [definition]}}, "command": FOREVER}


def mount_of(**loopback: Any) -> dict[str, Any]:
    return {"kind": "attach", "attach": {"fs_type": "squashfs", "attach": {"kind": "loopback", "loopback": loopback}}}


INVALID: dict[str, tuple[Any, int, str, str]] = {
    # name: (body of POST /container, code, JSON path, words of the message)
    "no command": ({"mount": squashfs()}, 422, "$", "command"),
    "no mount": ({"command": FOREVER}, 422, "$", "mount"),
    "command of a wrong type": ({"mount": squashfs(), "command": 7}, 422, "$.command", "str"),
    "no object": ([], 422, "$", "object"),
    "unknown field": ({"mount": squashfs(), "command": FOREVER, "systmd": True}, 422, "$", "systemd"),
    "unknown field, deep": (
        nested({"kind": "attach", "attach": {"fs_typ": "squashfs", "attach": {"id": 0}}}),
        422,
        "$.mount.overlay.lower[0].attach",
        "fs_type",
    ),
    "unknown kind": (nested({"kind": "zfs", "zfs": {}}), 422, "$.mount.overlay.lower[0]", "zfs"),
    "neither reference nor definition": (nested({}), 422, "$.mount.overlay.lower[0]", "id"),
    "kind without its definition": (nested({"kind": "overlay"}), 422, "$.mount.overlay.lower[0]", "overlay"),
    "reference to nothing": (nested({"id": 99}), 404, "$.mount.overlay.lower[0]", "no mount 99"),
    "id too large": (nested({"id": 2**40}), 404, "$.mount.overlay.lower[0].id", "no mount"),
    "negative id": (nested({"id": -1}), 422, "$.mount.overlay.lower[0].id", ""),
    "empty lower": (
        {"mount": {"kind": "overlay", "overlay": {"lower": []}}, "command": FOREVER},
        422,
        "$.mount.overlay.lower",
        "",
    ),
    "name with bad characters": (box(FOREVER, name="a b"), 422, "$.name", ""),
    "name that is a directory": (box(FOREVER, name=".."), 422, "$.name", ""),
    "id at the top": (box(FOREVER, id=3), 422, "$.id", "id"),
    "state that cannot be asked for": (box(FOREVER) | {"state": "exited"}, 422, "$.state", "running"),
    "other namespaces": (box(FOREVER, namespaces=["net"]), 501, "$.namespaces", "namespaces"),
    "missing file": (
        nested(mount_of(path="/no/such/file", base="root")),
        422,
        "$.mount.overlay.lower[0].attach.attach.loopback",
        "/no/such/file",
    ),
    "directory for a file": (
        nested(mount_of(path="/etc", base="root")),
        422,
        "$.mount.overlay.lower[0].attach.attach.loopback",
        "directory",
    ),
    "device for a file": (
        nested(mount_of(path="/dev/null", base="root")),
        422,
        "$.mount.overlay.lower[0].attach.attach.loopback",
        "/dev/null",
    ),
    "relative path": (
        nested(mount_of(path="image.sqsh", base="root")),
        422,
        "$.mount.overlay.lower[0].attach.attach.loopback",
        "",
    ),
    "base mount without a mount": (
        nested(mount_of(path="/a", base="mount")),
        422,
        "$.mount.overlay.lower[0].attach.attach.loopback",
        "mount",
    ),
    "unknown file system": (
        nested({"kind": "attach", "attach": {"fs_type": "zfs", "attach": {"kind": "loopback", "loopback": image()}}}),
        501,
        "$.mount.overlay.lower[0].attach",
        "zfs",
    ),
    "another file system": (
        nested({"kind": "attach", "attach": {"fs_type": "ext4", "attach": {"kind": "loopback", "loopback": image()}}}),
        422,
        "$.mount.overlay.lower[0].attach",
        "squashfs",
    ),
    "no such command": (box("/no/such/command"), 422, "$", "/no/such/command"),
    "not executable": (box("/bin/plain"), 422, "$", "executable"),
    "another machine's program": (box("/bin/wrong-arch"), 422, "$", "machine"),
    "no interpreter": (box("/bin/no-interpreter"), 422, "$", "/missing/interp"),
    "command is a directory": (box("/data"), 422, "$", "directory"),
    "unbalanced quotes": (box("/bin/sh -c 'oh"), 422, "$", "quot"),
}


@pytest.mark.parametrize("name", INVALID)
def test_a_request_is_refused_with_the_place_and_the_remedy(server: Server, name: str) -> None:
    body, code, path, words = INVALID[name]
    problem = server.refused("POST", "/container", code, body)
    assert words in problem["message"], problem
    if path != "$":
        assert problem["path"].startswith(path), problem


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.write_bytes(b"no image at all" * 1000), "squashfs"),
        (lambda file: os.truncate(file, file.stat().st_size // 2 // 4096 * 4096), "truncated"),
        (lambda file: os.truncate(file, 0), "empty"),
    ],
    ids=["no image", "truncated", "empty"],
)
def test_an_image_that_is_none(server: Server, tmp_path: Path, spoil: Any, words: str) -> None:
    file = copy_of_small_image(tmp_path)
    spoil(file)
    problem = server.refused("POST", "/container", 422, nested(mount_of(path=str(file), base="root", ro=True)))
    assert words in problem["message"], problem


def test_a_reference_of_the_wrong_kind(server: Server) -> None:
    made = server.post("/mount", squashfs())
    problem = server.refused("POST", "/container", 422, nested({"id": made["id"], "kind": "overlay"}))
    assert problem["path"] == "$.mount.overlay.lower[0].kind"


@pytest.mark.parametrize("command", ['"abc', "'a' b\\", "   ", "''"])
@pytest.mark.parametrize("state", ["created", "running"])
def test_a_command_that_could_never_run_is_not_defined(server: Server, command: str, state: str) -> None:
    problem = server.refused("POST", "/container", 422, {"mount": writable(), "command": command, "state": state})
    assert problem["path"] == "$.command"
    assert server.everything() == []


def test_a_failed_create_leaves_no_log(server: Server) -> None:
    server.refused("POST", "/container", 422, box("/bin/no-such-program"))
    assert list((server.run_dir / "logs").iterdir()) == []
    assert server.everything() == []


def test_a_cycle(server: Server) -> None:
    """A mount cannot stand on itself: the id it would get is not there yet."""
    server.refused("POST", "/mount/overlay", 404, {"lower": [0]})


def test_a_name_in_use(server: Server) -> None:
    server.post("/container", {"mount": writable(), "command": FOREVER, "name": "web"})
    problem = server.refused("POST", "/container", 409, box(FOREVER, name="web"))
    assert problem["path"] == "$.name"


# ------------------------------------------------------------------------------------------------------- HTTP


@pytest.mark.parametrize(
    ("body", "line", "column"),
    [(b'{"systemd" true}', 1, 12), (b'{\n "command": "a",\n "systemd" true}', 3, 12), (b"", 1, 1), (b"{", 1, 2)],
)
def test_broken_json_is_pointed_at(server: Server, body: bytes, line: int, column: int) -> None:
    answer = server.http.post("/container", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert f"line {line}" in answer.json()["message"], answer.text


def test_another_content_type(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = server.http.post("/container", content=b"{}", headers={"content-type": kind})
        assert (answer.status_code, answer.json()["code"]) == (415, 415)


def test_a_body_over_the_limit(server: Server) -> None:
    with contextlib.suppress(httpx.WriteError):
        problem = server.refused("POST", "/container", 413, box("/bin/true", name="x" * 70_000))
        assert "64" in problem["message"]


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/attach/7", 404),
        ("GET", "/container/byname/nobody", 404),
        ("DELETE", "/container/byname/nobody", 404),
        ("GET", "/mount?id=5", 404),
        ("GET", "/mount?colour=red", 422),
        ("GET", "/mount?id=x", 422),
        ("DELETE", "/mount", 422),
        ("DELETE", "/mount?id=1&force=maybe", 422),
        ("PUT", "/container", 405),
        ("GET", "/attach/99999999999999999999", 404),
    ],
)
def test_requests_that_find_nothing(server: Server, method: str, path: str, code: int) -> None:
    server.refused(method, path, code)


def test_a_slow_client_is_cut_off(server: Server) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(server.socket))
        client.sendall(b"POST /imageapi/v1/container HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 100\r\n\r\n{")
        assert b"408" in (said := client.recv(4096)) or b"400" in said
        assert client.recv(4096) == b"" or b"}" in said


def test_a_client_that_hangs_up_is_undone(server: Server) -> None:
    """What it asked for is made and undone, or never made; either way nothing is left."""
    body = json.dumps(box(FOREVER)).encode()
    head = "POST /imageapi/v1/container HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.socket))
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    eventually(lambda: all(one["refs"] for one in server.everything()), "half-made objects are gone")


def test_a_secret_is_not_taken_masked(server: Server) -> None:
    rbd = {"monitors": ["127.0.0.1"], "pool": "rbd", "image": "i", "options": {"secret": "X" * 34}}
    problem = server.refused("POST", "/attach/rbd", 422, rbd)
    assert "by id" in problem["message"]
