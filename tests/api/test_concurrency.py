"""Many clients at once: no error that has no cause, and nothing left."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import httpx
import pytest

from imageapi.config import BASE
from lab.server import FOREVER, Server, alive, box, eventually, image, squashfs, writable

pytestmark = pytest.mark.api

CLIENTS = 8
ROUNDS = 12


def at_once(server: Server, work: Callable[[httpx.Client, int], Any]) -> list[Any]:
    """What `work` returns for each of the clients, who all begin together."""

    def one(number: int) -> Any:
        with server.client() as http:
            return work(http, number)

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(one, range(CLIENTS)))


def _cycle(http: httpx.Client, number: int) -> list[str]:
    errors = []
    for turn in range(ROUNDS):
        name = f"box-{number}-{turn}"
        for method, path, body in (
            ("POST", "/container", box(FOREVER, name=name)),
            ("GET", f"/container/byname/{name}/exited", None),
            ("DELETE", f"/container/byname/{name}?force=true", None),
        ):
            answer = http.request(method, path, json=body)
            if answer.status_code not in (200, 201):
                errors.append(answer.text)
    return errors


def test_clients_that_create_and_delete(server: Server) -> None:
    assert list(chain.from_iterable(at_once(server, _cycle))) == []
    assert server.everything() == []
    assert os.listdir(server.run_dir / "mounts") == []


def test_one_image_for_all(server: Server) -> None:
    """However the requests meet, the image is attached once."""
    made = at_once(server, lambda http, number: http.post("/container", json=box(FOREVER)).json())
    assert {one["state"] for one in made} == {"running"}
    assert len(server.get("/attach")) == 1
    assert server.get("/mount/0")["refs"] == CLIENTS


def test_one_name_for_all(server: Server) -> None:
    answers = at_once(server, lambda http, number: http.post("/container", json=box(FOREVER, name="one")).status_code)
    assert sorted(answers) == [201] + [409] * (CLIENTS - 1)
    assert len(server.get("/container")) == 1


def test_one_delete_of_many_succeeds(server: Server) -> None:
    server.post("/mount", squashfs())
    answers = at_once(server, lambda http, number: http.delete("/mount/0").status_code)
    assert sorted(answers) == [200] + [404] * (CLIENTS - 1)


def test_a_start_asked_by_many_is_one(server: Server) -> None:
    server.post("/container", box(FOREVER) | {"state": "created"})
    answers = at_once(server, lambda http, number: http.get("/container/0/running").json())
    assert len({answer["pid"] for answer in answers}) == 1


def test_use_and_delete_of_the_same_object(server: Server) -> None:
    """A reference to what is being deleted is refused, or holds it: never a mount on nothing."""

    def work(http: httpx.Client, number: int) -> list[int]:
        codes = []
        for _ in range(ROUNDS):
            if number % 2:
                codes.append(http.post("/mount", json=writable()).status_code)
            else:
                for one in http.get("/mount?kind=overlay").json():
                    codes.append(http.delete(f"/mount/{one['id']}").status_code)
        return codes

    server.post("/attach/loopback", image())
    codes = set(chain.from_iterable(at_once(server, work)))
    assert codes <= {200, 201, 404}
    eventually(lambda: all(one["refs"] and "problem" not in one for one in server.everything()), "all is settled")


HASTE = 0.008
"""Seconds within which a client that does not wait for an answer goes: a nested create takes as long."""


def _asked_and_left(server: Server, number: int) -> None:
    """Requests of one client, each on a connection that it closes at some moment, whatever comes back."""
    chance = random.Random(number)
    for _ in range(30):
        name = chance.choice(("one", "two", "three"))
        state = chance.choice(("created", "running"))
        method, path, body = chance.choice(
            [
                ("POST", "/container", box(FOREVER, name=name, state=state)),
                ("POST", "/container", box(FOREVER, state=state)),
                ("PATCH", f"/container/byname/{name}", {"state": chance.choice(("running", "exited"))}),
                ("DELETE", f"/container/byname/{name}?force=true", None),
            ]
        )
        text = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {BASE}{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n".encode()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(server.socket))
            connection.sendall(head + text)
            time.sleep(chance.uniform(0, HASTE))


def _at_rest(server: Server) -> bool:
    stops = any(made["state"] == "stopping" for made in server.get("/container"))
    return not stops and server.get("/progress") == []


def test_clients_that_do_not_wait_for_an_answer(server: Server) -> None:
    """What they asked for is whole or gone, and what is there can be used and deleted."""
    at_once(server, lambda _, number: _asked_and_left(server, number))
    eventually(lambda: _at_rest(server), "what was under way has ended")
    for made in server.get("/container"):
        assert made["state"] in ("created", "running", "exited", "dead"), made
        assert made["pid"] is None or alive(made["pid"])
    roots = [made["mount"]["id"] for made in server.get("/container")]
    assert sorted(roots) == sorted(one["id"] for one in server.get("/mount") if one["kind"] == "overlay")
    assert all(one["refs"] == 1 for one in server.get("/mount") if one["kind"] == "overlay")
    assert server.leaks() == []
