"""Mounts from a URI through the service: on them stand containers, a download is seen moving, and is never late while
it does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from imageapi.config import BASE
from imageapi.engine.pool import PER_STORE
from imageapi.linux import loop
from lab import images
from lab.archives import Member, archive
from lab.processes import processes
from lab.server import FOREVER, Server, eventually, posting, running
from lab.web import Web, serving
from tools.images import busybox

pytestmark = pytest.mark.api

SECRET = "dear0dear"
LOGIN = f"me:{SECRET}"
SIGNED = f"/image?X-Amz-Signature={SECRET}"


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as web:
        yield web


def from_uri(address: str, **more: Any) -> dict[str, Any]:
    return {"kind": "uri", "uri": {"uri": address, **more}}


def over(lower: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "overlay", "overlay": {"lower": [lower]}}


def noise(megabytes: int) -> bytes:
    return archive(Member("noise", random.Random(6).randbytes(megabytes << 20)))


def small_tar() -> bytes:
    """A tar in which a container can run."""
    return archive(Member("bin/sleep", busybox().read_bytes(), mode=0o755))


def doing(server: Server) -> list[Any]:
    found: list[Any] = server.get("/progress")
    return found


def moved(server: Server) -> list[Any]:
    """What is being made, once a part of it is there."""
    return [one for one in doing(server) if one.get("done")]


# --------------------------------------------------------------------------------------------- what stands on it


@pytest.mark.parametrize("format", ["tar", "squashfs", "erofs", "ext4"])
def test_a_container_on_an_overlay_on_a_uri_in_one_request(server: Server, web: Web, format: Any) -> None:
    data = small_tar() if format == "tar" else images.small_image(format).read_bytes()
    mount = over(from_uri(web.put("/image", data), format=format))
    made = server.post("/container", {"mount": mount, "command": FOREVER, "state": "running"})
    assert made["state"] == "running"
    assert made["mount"]["overlay"]["lower"][0]["kind"] == "uri"
    assert server.get("/mount/uri")[0]["uri"] == web.url("/image")
    server.delete(f"/container/{made['id']}?force=true")
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


def test_a_container_on_an_unpacked_tar_itself(server: Server, web: Web) -> None:
    mount = from_uri(web.put("/image", small_tar()))
    made = server.post("/container", {"mount": mount, "command": FOREVER, "state": "running"})
    server.delete(f"/container/{made['id']}?force=true")
    assert server.everything() == []


def test_it_is_there_after_the_server_was_killed(server: Server, web: Web) -> None:
    made = [server.post("/mount/uri", {"uri": web.put("/a", small_tar())})]
    image = web.put("/b", images.small_image().read_bytes())
    made.append(server.post("/mount/uri", {"uri": image, "format": "squashfs"}))
    server.kill()
    server.start()
    assert server.get("/mount/uri") == made
    assert all(os.listdir(one["mountpoint"]) for one in made)


def test_without_their_records_they_go(server: Server, web: Web) -> None:
    server.post("/mount/uri", {"uri": web.put("/a", small_tar())})
    image = web.put("/b", images.small_image().read_bytes())
    server.post("/mount/uri", {"uri": image, "format": "squashfs"})
    server.kill()
    shutil.rmtree(server.run_dir / "state")
    server.start()
    assert os.listdir(server.run_dir / "mounts") == []
    assert loop.marked(f"imageapi:{(server.run_dir / 'instance').read_text().strip()}:") == {}


# ------------------------------------------------------------------------------------------------- while it moves


def test_a_download_is_seen_moving(server: Server, web: Web) -> None:
    data = noise(4)
    with posting(server, "/mount/uri", {"uri": web.put(SIGNED, data, trickle=0.3)}) as answer:
        [told] = eventually(lambda: moved(server), "a part of it is there")
        since = told.pop("since")
        assert told == {
            "collection": "mount", "kind": "uri", "step": f"fetching from {web.url('')}",
            "done": told["done"], "total": len(data),
        }  # fmt: skip
        assert since.endswith("Z")
        assert server.get("/mount") == []
        assert answer.result().status_code == 201
    assert doing(server) == []


def test_a_slow_download_is_not_late(run_dir: Path, web: Web) -> None:
    """It takes twice the time that it may stand still for."""
    with running(run_dir, "--operation-timeout", "1s") as server:
        made = server.post("/mount/uri", {"uri": web.put("/a", noise(2), trickle=0.25)})
        assert os.path.getsize(f"{made['mountpoint']}/noise") == 2 << 20


def test_one_that_stands_still_is_and_is_undone(run_dir: Path, web: Web) -> None:
    gate = threading.Event()
    with running(run_dir, "--operation-timeout", "1s") as server:
        address = web.put(SIGNED, noise(4), gate=gate)
        problem = server.refused("POST", "/container", 504, {"mount": over(from_uri(address)), "command": FOREVER})
        assert "stood still for 1s, fetching from http://127.0.0.1" in problem["message"]
        assert SECRET not in str(problem)
        gate.set()
        eventually(lambda: server.everything() == [], "it is undone when it goes on")
        assert os.listdir(server.run_dir / "mounts") == []


def test_who_hangs_up_ends_the_download(server: Server, web: Web) -> None:
    body = json.dumps({"uri": web.put("/a", noise(8), trickle=0.3)}).encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.socket))
        head = f"POST {BASE}/mount/uri HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: moved(server), "a part of it is there")
    eventually(lambda: web.left, "the download is broken off")
    eventually(lambda: doing(server) == [], "nothing is being made any more")
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


def test_a_server_that_is_killed_leaves_nothing_of_it(server: Server, web: Web) -> None:
    gate = threading.Event()
    with posting(server, "/mount/uri", {"uri": web.put("/a", noise(4), gate=gate)}) as answer:
        eventually(lambda: doing(server) and web.asked, "it is being fetched")
        server.kill()
        assert isinstance(answer.exception(), httpx.TransportError)
    gate.set()
    server.start()
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


def test_what_is_there_does_not_wait_for_its_web_server(server: Server, web: Web) -> None:
    """All places of that store are taken by downloads; an overlay on what came from it does not need one."""
    made = server.post("/mount/uri", {"uri": web.put("/a", small_tar())})
    gate = threading.Event()
    address = web.put("/slow", noise(1), gate=gate)
    with contextlib.ExitStack() as under_way:
        under_way.callback(gate.set)
        for _ in range(PER_STORE):
            under_way.enter_context(posting(server, "/mount/uri", {"uri": address}))
        eventually(lambda: len(doing(server)) == PER_STORE, "all places are taken")
        box = server.post("/container", {"mount": over({"id": made["id"]}), "command": FOREVER, "state": "running"})
        server.delete(f"/container/{box['id']}?force=true")
        gate.set()
        eventually(lambda: len(server.get("/mount")) == 1 + PER_STORE, "all have been made")


# ------------------------------------------------------------------------------------------------------- secrets


@pytest.fixture
def talkative(run_dir: Path) -> Iterator[Server]:
    """A server that logs all it can."""
    with running(run_dir, "--log-level", "TRACE") as server:
        yield server


def test_secrets_are_shown_nowhere(talkative: Server, web: Web) -> None:
    server = talkative
    web.put("/image", small_tar())
    good = web.url(SIGNED, login=LOGIN)
    answers = [server.http.post("/mount/uri", json={"uri": good}).text]
    answers += [server.http.get(path).text for path in ("/mount", "/mount/0", "/mount/uri", "/progress")]
    for bad in ("/none", "/im age"):
        answers.append(server.http.post("/mount/uri", json={"uri": web.url(f"{bad}{SIGNED}", login=LOGIN)}).text)
    answers.append(server.http.post("/mount/uri", json={"uri": [good, good], "sha256": "0" * 64}).text)
    answers += [one.command for one in processes().values()]
    answers.append(server.log.read_text())
    assert not [text for text in answers if SECRET in text]
    assert [asked.target for asked in web.asked if SECRET in asked.target], "the server itself was told"
    files = [path for path in server.run_dir.rglob("*") if path.is_file() and SECRET in _text(path)]
    assert {path.parent.parent.name for path in files} == {"state"}
    assert (server.run_dir / "state").stat().st_mode & 0o777 == 0o700


def _text(path: Path) -> str:
    """What a file holds; the supervisor's cannot all be read."""
    with contextlib.suppress(OSError):
        return path.read_text("latin-1")
    return ""


def test_what_was_read_back_is_no_definition(server: Server, web: Web) -> None:
    web.put("/image", small_tar())
    made = server.post("/mount/uri", {"uri": web.url(SIGNED)})
    problem = server.refused("POST", "/mount/uri", 422, {"uri": made["uri"]})
    assert "refer to the mount by id" in problem["message"]
