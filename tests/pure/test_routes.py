"""Every line of the contract's two tables of routes, and what may be wrong with a request, over an engine in memory."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest

from imageapi.api.app import app
from imageapi.config import Config
from imageapi.errors import Conflict, TimedOut
from pure.memory_engine import MemoryEngine

pytestmark = pytest.mark.pure

LOOP: dict[str, Any] = {"path": "/image", "base": "root", "ro": True}
SQUASHFS = {"kind": "loopback", "loopback": {"fs_type": "squashfs", "loopback": LOOP}}
BIND = {"path": "/srv", "base": "root"}
JSON = {"content-type": "application/json"}


class Client:
    """The whole application, without a socket."""

    def __init__(self, engine: MemoryEngine, **config: Any) -> None:
        self.engine = engine
        self._app = app(engine, Config(**config))

    def ask(self, method: str, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return asyncio.run(self._ask(method, path, body, more))

    async def _ask(self, method: str, path: str, body: Any, more: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080/imageapi/v1") as client:
            answer = await client.request(method, path, json=body, **more)
        assert answer.headers.get("content-type") == (None if answer.status_code == 204 else "application/json")
        return answer

    def get(self, path: str) -> Any:
        return self._good(self.ask("GET", path), 200)

    def post(self, path: str, body: Any) -> Any:
        return self._good(self.ask("POST", path, body), 201)

    def refused(self, code: int, method: str, path: str, body: Any = None, **more: Any) -> dict[str, Any]:
        answer = self.ask(method, path, body, **more)
        problem: dict[str, Any] = answer.json()
        assert (answer.status_code, problem["code"]) == (code, code), problem
        assert problem["message"]
        return problem

    @staticmethod
    def _good(answer: httpx.Response, code: int) -> Any:
        assert answer.status_code == code, answer.text
        return answer.json()


@pytest.fixture
def client() -> Client:
    return Client(MemoryEngine(), max_body_size=10_000)


@pytest.fixture
def full(client: Client) -> Client:
    """attach 0 (loopback), mounts 0 (attach), 1 (overlay), 2 (bind), containers 0 (web) and 1."""
    client.post("/mount/overlay", {"lower": [SQUASHFS]})
    client.post("/mount/bind", BIND)
    client.post("/container", {"name": "web", "mount": {"id": 1, "kind": "overlay"}, "command": "/x"})
    client.post("/container", {"mount": 2, "command": "/y"})
    return client


def ids(found: Any) -> list[int]:
    return [one["id"] for one in found]


# ------------------------------------------------------------------------------------------------------ reading

LISTS: list[tuple[str, list[int]]] = [
    ("/attach", [0]),
    ("/attach?kind=loopback", [0]),
    ("/attach?kind=rbd", []),
    ("/attach?id=0", [0]),
    ("/attach?id=0&kind=loopback", [0]),
    ("/attach/loopback", [0]),
    ("/attach/rbd", []),
    ("/attach/iscsi", []),
    ("/mount", [0, 1, 2]),
    ("/mount?id=1", [1]),
    ("/mount?kind=attach", [0]),
    ("/mount?kind=loopback", [0]),
    ("/mount?kind=rbd", []),
    ("/mount?kind=overlay", [1]),
    ("/mount/attach", [0]),
    ("/mount/loopback", [0]),
    ("/mount/rbd", []),
    ("/mount/overlay", [1]),
    ("/mount/bind", [2]),
    ("/mount/uri", []),
    ("/container", [0, 1]),
    ("/container?id=1", [1]),
    ("/container?name=web", [0]),
    ("/container?name=web&id=0&state=created", [0]),
    ("/container?state=created", [0, 1]),
    ("/container?state=running", []),
]


@pytest.mark.parametrize(("path", "found"), LISTS)
def test_lists(full: Client, path: str, found: list[int]) -> None:
    assert ids(full.get(path)) == found


@pytest.mark.parametrize("path", ["/attach", "/mount", "/container", "/mount/rbd", "/attach/local"])
def test_an_empty_list_is_a_list(client: Client, path: str) -> None:
    assert client.get(path) == []


ONES = [("/attach/0", 0), ("/attach/loopback/0", 0), ("/mount/0", 0), ("/mount/attach/0", 0), ("/mount/loopback/0", 0),
        ("/mount/1", 1), ("/mount/overlay/1", 1), ("/mount/bind/2", 2), ("/container/0", 0), ("/container/1", 1),
        ("/container/byname/web", 0), ("/container/001", 1)]  # fmt: skip


@pytest.mark.parametrize(("path", "number"), ONES)
def test_one_object_by_its_path(full: Client, path: str, number: int) -> None:
    assert full.get(path)["id"] == number


@pytest.mark.parametrize("path", ["/container", "/container/0", "/mount/overlay", "/mount/overlay/1", "/attach?id=0"])
def test_head_is_a_get_without_its_body(full: Client, path: str) -> None:
    head, get = full.ask("HEAD", path), full.ask("GET", path)
    assert (head.status_code, head.headers) == (200, get.headers)


@pytest.mark.parametrize(
    ("code", "path"),
    [
        (404, "/attach/1"), (404, "/attach/rbd/0"), (404, "/attach/loopback/9"), (404, "/mount/rbd/0"),
        (404, "/mount/overlay/0"), (404, "/mount/attach/1"), (404, "/container/9"), (404, "/container/byname/nobody"),
        (404, "/attach/zfs"), (404, "/mount/zfs"), (404, "/attach/overlay"), (404, "/attach/zfs/0"),
        (404, "/mount/3/4"), (404, "/container/{id}"), (404, "/container/0%0A"), (404, "/container/{id}/{state}"),
        (404, "/container/web"), (404, "/container/byname"), (404, "/container/byname/"), (404, "/container/"),
        (404, "/attach/-1"), (404, "/attach/" + "9" * 5000), (404, "/mount/overlay/" + "9" * 5000), (404, "/nothing"),
        (404, "/attach/loopback/x"), (404, "/attach/loopback/0/x"), (404, "/container/byname/a%2Fexited"),
        (404, "/container/%30%2frunning"), (404, "/container/byname/%ff%zz"), (404, "//container"),
        (404, "/attach?id=1"), (404, "/mount?id=" + "9" * 5000), (404, "/container?name=nobody"),
        (404, "/mount?id=1&kind=bind"), (404, "/container?id=0&state=running"), (404, "/container?name="),
        (422, "/attach?id=x"), (422, "/attach?id="), (422, "/attach?id=-1"), (422, "/attach?id=%C2%B2"),
        (422, "/attach?kind=overlay"), (422, "/mount?kind="), (422, "/container?state=flying"),
        (422, "/attach?name=web"), (422, "/container?kind=x"), (422, "/mount?id=1&id=1"), (422, "/mount?force=true"),
        (422, "/container?id=1&name=web"), (422, "/container/0?id=0"), (422, "/mount/overlay?id=1"),
    ],
)  # fmt: skip
def test_what_is_not_there_or_not_asked_well(full: Client, code: int, path: str) -> None:
    full.refused(code, "GET", path)


# ----------------------------------------------------------------------------------------------- making, deleting


def test_both_ways_make_the_same_objects(client: Client) -> None:
    assert client.post("/attach/loopback", LOOP)["id"] == 0
    assert client.post("/attach", {"kind": "loopback", "loopback": LOOP})["id"] == 1
    assert client.post("/mount/loopback", {"id": 0, "fs_type": "squashfs"})["loopback_id"] == 0
    assert client.post("/mount/attach", {"attach": 1, "fs_type": "squashfs"})["attach"] == 1
    assert client.post("/mount", SQUASHFS)["kind"] == "attach"
    shown = client.get("/mount")
    assert [one["attach"]["attach"]["id"] for one in shown] == [0, 1, 0]
    assert ids(client.get("/mount/loopback")) == ids(client.get("/mount/attach")) == [0, 1, 2]


def test_a_tutorials_mount_is_shown_flat_on_its_route_and_whole_elsewhere(full: Client) -> None:
    assert full.get("/mount/loopback/0") == {
        "id": 0, "loopback_id": 0, "fs_type": "squashfs", "mount_options": [],
        "mountpoint": "/run/mounts/mount_0", "refs": 1,
    }  # fmt: skip
    loopback = {"path": "/image", "base": "root", "readPartitions": False, "ro": True}
    attachment = {"id": 0, "kind": "loopback", "loopback": loopback, "device_file": "/dev/loop0", "refs": 1}
    assert full.get("/mount/0") == {
        "id": 0, "kind": "attach", "mountpoint": "/run/mounts/mount_0", "refs": 1,
        "attach": {"attach": attachment, "fs_type": "squashfs", "mount_options": []},
    }  # fmt: skip


DELETES: list[tuple[str, dict[str, Any]]] = [
    ("/container/0", {"id": 0, "name": "web"}),
    ("/container/byname/web", {"id": 0}),
    ("/container?name=web", {"id": 0}),
    ("/container?id=0&name=web", {"id": 0}),
    ("/container?id=1", {"id": 1}),
    ("/mount/2", {"id": 2, "kind": "bind"}),
    ("/mount/bind/2", {"id": 2, "path": "/srv"}),
    ("/mount?id=2", {"id": 2, "kind": "bind"}),
    ("/attach/0", {"id": 0, "kind": "loopback"}),
    ("/attach/loopback/0", {"id": 0, "path": "/image"}),
    ("/attach?id=0", {"id": 0, "kind": "loopback"}),
]


@pytest.mark.parametrize(
    ("prefer", "code"),
    [
        ("return=minimal", 204),
        ('respond-async, Return = "minimal"; x=y, wait=10', 204),
        ("return=representation, return=minimal", 200),
        ("return=representation", 200),
        ("minimal", 200),
    ],
)
def test_a_client_may_do_without_the_object(full: Client, prefer: str, code: int) -> None:
    """204 is for who asks for it, and says that it was asked for; what is made or read is shown nevertheless."""
    preferred = {"headers": {"prefer": prefer}}
    assert full.ask("GET", "/container/1", **preferred).status_code == 200
    assert full.ask("POST", "/mount", {"kind": "bind", "bind": BIND}, **preferred).status_code == 201
    for method, path in (("PATCH", "/container?id=1&state=running"), ("DELETE", "/container/1?force=true")):
        answer = full.ask(method, path, **preferred)
        assert answer.status_code == code
        assert answer.headers.get("preference-applied") == ("return=minimal" if code == 204 else None)
        assert ("content-length" in answer.headers, answer.content == b"") == (code == 200, code == 204)
    assert full.ask("DELETE", "/container/1", **preferred).json()["code"] == 404


@pytest.mark.parametrize(("path", "last"), DELETES)
def test_delete_answers_the_object_in_the_form_of_its_route(full: Client, path: str, last: dict[str, Any]) -> None:
    answer = full.ask("DELETE", path)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {**answer.json(), **last}
    full.refused(404, "DELETE", path)


@pytest.mark.parametrize(("given", "force"), [("", False), ("true", True), ("1", True), ("false", False), ("0", False)])
@pytest.mark.parametrize("path", ["/container/0", "/container?id=0", "/mount/bind/2", "/attach/0", "/mount?id=2"])
def test_force(full: Client, path: str, given: str, force: bool) -> None:
    sign = "&" if "?" in path else "?"
    assert full.ask("DELETE", path + (f"{sign}force={given}" if given else "")).status_code == 200
    assert full.engine.forced == [force]


@pytest.mark.parametrize(
    "path",
    ["/container", "/mount", "/attach", "/container?force=true", "/container/0?force=yes", "/mount/2?force=",
     "/mount/bind/2?force=TRUE", "/container?id=1&name=web", "/mount?kind=bind", "/mount?id=2&kind=bind"],
)  # fmt: skip
def test_a_delete_that_is_not_asked_well_deletes_nothing(full: Client, path: str) -> None:
    before = full.get("/mount"), full.get("/attach"), full.get("/container")
    full.refused(422, "DELETE", path)
    assert (full.get("/mount"), full.get("/attach"), full.get("/container")) == before


# ------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/container/0/running"), ("POST", "/container/0/running"), ("GET", "/container/byname/web/running"),
     ("POST", "/container/byname/web/running"), ("PATCH", "/container?id=0&state=running"),
     ("PATCH", "/container?name=web&state=running"), ("PATCH", "/container?name=web&id=0&state=running")],
)  # fmt: skip
def test_every_way_to_ask_for_a_state(full: Client, method: str, path: str) -> None:
    answer = full.ask(method, path)
    assert (answer.status_code, answer.json()["state"]) == (200, "running")
    assert ids(full.get("/container?state=running")) == [0]


@pytest.mark.parametrize(
    ("code", "method", "path"),
    [(501, "GET", "/container/0/paused"), (501, "PATCH", "/container?id=0&state=paused"),
     (422, "GET", "/container/0/flying"), (422, "POST", "/container/byname/web/created"),
     (422, "PATCH", "/container?id=0"), (422, "PATCH", "/container?state=running"),
     (422, "PATCH", "/container?id=1&name=web&state=running"), (422, "PATCH", "/container?id=0&state=flying"),
     (422, "GET", "/container/0/running?force=true"), (404, "GET", "/container/9/running"),
     (404, "GET", "/container/byname/nobody/running"), (404, "PATCH", "/container?id=9&state=running")],
)  # fmt: skip
def test_states_that_cannot_be_asked_for(full: Client, code: int, method: str, path: str) -> None:
    full.refused(code, method, path)


# ------------------------------------------------------------------------------------------------------ methods

METHODS: list[tuple[str, str]] = [
    ("/attach", "DELETE, GET, HEAD, POST"),
    ("/mount/0", "DELETE, GET, HEAD"),
    ("/mount/rbd", "GET, HEAD, POST"),
    ("/mount/zfs/0", "DELETE, GET, HEAD"),
    ("/container", "DELETE, GET, HEAD, PATCH, POST"),
    ("/container/0", "DELETE, GET, HEAD"),
    ("/container/byname/web", "DELETE, GET, HEAD"),
    ("/container/0/running", "GET, POST"),
    ("/container/byname/web/running", "GET, POST"),
]


@pytest.mark.parametrize(("path", "allow"), METHODS)
def test_other_methods_are_told_which_there_are(full: Client, path: str, allow: str) -> None:
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - set(allow.split(", ")):
        answer = full.ask(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allow), method
    assert ids(full.get("/container")) == [0, 1]


# ------------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "Application/JSON;x=y", " application/json "]
)
def test_json_is_taken_with_parameters(client: Client, kind: str) -> None:
    answer = client.ask("POST", "/mount/bind", headers={"content-type": kind}, content=b'{"path":"/","base":"root"}')
    assert answer.status_code == 201


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/mount/bind"), ("POST", "/container/0/running"), ("DELETE", "/container/0")]
)
def test_another_type_is_refused_also_where_nobody_reads_it(full: Client, method: str, path: str, kind: str) -> None:
    full.refused(415, method, path, headers={"content-type": kind}, content=b"{}")
    assert ids(full.get("/container?state=created")) == [0, 1]


def test_the_type_of_a_body_in_pieces_counts_too(full: Client) -> None:
    async def pieces() -> Any:
        yield b"force=true"

    form = {"content-type": "application/x-www-form-urlencoded"}
    full.refused(415, "POST", "/container/0/running", headers=form, content=pieces())


def test_a_packed_body_is_refused(client: Client) -> None:
    client.refused(415, "POST", "/mount", headers={**JSON, "content-encoding": "gzip"}, content=b"x")


def test_the_body_of_a_get_means_nothing(full: Client) -> None:
    assert full.ask("GET", "/container/0", headers={"content-type": "text/plain"}, content=b"x").status_code == 200


def test_a_request_without_a_body_needs_no_type(full: Client) -> None:
    assert full.ask("POST", "/container/0/running").status_code == 200
    full.refused(400, "POST", "/container")


@pytest.mark.parametrize("declared", [True, False])
def test_too_large_a_body(client: Client, declared: bool) -> None:
    data = b'{"path":"' + b"x" * 10_000 + b'"}'

    async def pieces() -> Any:
        yield data

    content: Any = data if declared else pieces()
    answer = client.ask("POST", "/mount", headers=JSON, content=content)
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")


@pytest.mark.parametrize("query", ["?id=1", "?force=true"])
def test_a_post_takes_no_query(client: Client, query: str) -> None:
    for path in ("/mount", "/mount/bind", "/container"):
        client.refused(422, "POST", path + query, BIND)
    assert client.get("/mount") == []


def test_a_problem_of_the_engine_is_about_the_clients_own_place(client: Client) -> None:
    assert client.refused(404, "POST", "/mount/overlay", {"lower": [7]})["path"] == "$.lower[0]"
    assert client.refused(404, "POST", "/mount/rbd", {"id": 7, "fs_type": "x"})["path"] == "$.id"
    assert client.refused(404, "POST", "/mount/rbd", {"rbd_id": 7, "fs_type": "x"})["path"] == "$.rbd_id"
    assert client.refused(404, "POST", "/mount/rbd", {"rbd": {"id": 7}, "fs_type": "x"})["path"] == "$.rbd"
    client.post("/attach/loopback", LOOP)
    wrong = client.refused(422, "POST", "/mount/rbd", {"id": 0, "fs_type": "x"})
    assert (wrong["path"], "loopback" in wrong["message"]) == ("$.id", True)


# ------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/mount/bind"), ("DELETE", "/container/0"), ("GET", "/container/0/running"),
     ("DELETE", "/mount?id=2"), ("PATCH", "/container?id=0&state=exited")],
)  # fmt: skip
def test_failures_of_the_engine_are_answers(full: Client, method: str, path: str) -> None:
    body = BIND if method == "POST" else None
    full.engine.failure = Conflict("mount 2 is held by container 1", holders=["container 1"])
    assert full.refused(409, method, path, body)["holders"] == ["container 1"]
    full.engine.failure = TimedOut("it did not finish")
    full.refused(504, method, path, body)


def test_a_bug_is_a_number_in_the_answer_and_a_trace_in_the_log(full: Client, caplog: pytest.LogCaptureFixture) -> None:
    full.engine.failure = KeyError("something of ours")
    with caplog.at_level(logging.ERROR):
        problem = full.refused(500, "DELETE", "/container/0")
    assert "something of ours" not in str(problem)
    assert [record for record in caplog.records if record.exc_info and problem["message"].split()[-1] in record.message]


def test_a_create_that_the_end_of_the_server_cancels_says_so(client: Client) -> None:
    async def cancelled() -> httpx.Response:
        client.engine.gate = asyncio.Event()
        asking = asyncio.ensure_future(client._ask("POST", "/mount/bind", BIND, {}))
        await client.engine.arrived.wait()
        asking.cancel()
        return await asking

    answer = asyncio.run(cancelled())
    assert (answer.status_code, client.engine.cancelled.is_set()) == (503, True)
