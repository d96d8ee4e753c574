"""What answers show: the tutorial's own, from every angle the contract names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import msgspec
import pytest

from imageapi.api import views
from imageapi.engine.graph import Graph, Picture
from imageapi.records import AnyRecord, Facts, Key, Record, Run
from imageapi.spec import Attachment, Bind, Chap, Container, Iscsi, Mount, Secret
from pure.memory_engine import MemoryEngine
from pure.nests import overlay
from pure.test_routes import Client
from tutorial import text

pytestmark = pytest.mark.pure

KEY = "c2VjcmV0"
NATURE = ("logfile", "mountpoint", "upperdir", "workdir")
"""Fields whose values are this server's own."""
BIND = {"path": "/", "base": "root", "recursive": False, "ro": False}


# -------------------------------------------------------------------------------------------------- the tutorial


class Curl:
    """One curl of the text, as the request it is."""

    def __init__(self, command: text.Command) -> None:
        words = shlex.split(command.line.removesuffix(" | jq"))
        self.body = json.loads(words[words.index("-d") + 1].replace(text.MASK, KEY)) if "-d" in words else None
        self.method = next((word[2:] for word in words if word.startswith("-X")), "GET")
        self.path = words[-1].partition("/imageapi/v1")[2]
        self.shown = json.loads(command.shown) if command.shown else None


CURLS = [Curl(command) for command in text.commands() if "imageapi/v1" in command.line]


def test_every_answer_holds_what_the_text_shows_of_it() -> None:
    client = Client(MemoryEngine())
    for curl in CURLS:
        answer = client.ask(curl.method, curl.path, curl.body)
        assert answer.status_code == (201 if curl.body else 200), answer.text
        assert KEY not in answer.text
        if curl.shown is not None:
            by_name = isinstance(curl.shown, list) and "byname" in curl.path  # "the same structure as access by id"
            compare(curl.shown[0] if by_name else curl.shown, answer.json(), curl.path)
    assert [client.get(f"/{collection}") for collection in ("container", "mount", "attach")] == [[], [], []]


def compare(shown: Any, answer: Any, place: str) -> None:
    """All that is shown is in the answer; what else is there is extra."""
    if isinstance(shown, dict):
        for name in shown:
            assert name in answer, f"{place}.{name}"
            if name not in NATURE:
                compare(shown[name], answer[name], f"{place}.{name}")
    elif isinstance(shown, list):
        assert len(shown) == len(answer), place
        for one, other in zip(shown, answer, strict=True):
            compare(one, other, f"{place}[]")
    else:
        assert shown == answer, place


def test_both_nested_bodies_of_the_text_are_taken() -> None:
    lower, whole = text.nested_bodies()
    client = Client(MemoryEngine())
    assert client.post("/mount/overlay", json.loads(lower.replace("XXX", KEY)))["lower"] == [0]
    box = client.post("/container", json.loads(whole.replace('"systemd" true', '"systemd": true')))
    assert box["mount"]["overlay"]["lower"][0]["attach"]["attach"]["rbd"]["pool"] == "rbd"
    assert client.get("/container/byname/systemd.sqsh/exited")["name"] == "systemd.sqsh"


# --------------------------------------------------------------------------------------------------- both forms


def picture(*records: AnyRecord) -> Picture:
    """The last of the records, which stands on the others."""
    graph = Graph()
    for record in records:
        graph.add(record)
    records[-1].pinned = True
    return graph.picture(records[-1].key)


def whole(shown: Picture) -> Any:
    return msgspec.json.decode(views.whole(shown))


def bind(number: int, below: int | None = None) -> AnyRecord:
    mount = None if below is None else Mount(id=below)
    asked = Bind(path="/", base="root" if mount is None else "mount", mount=mount)
    return Record(id=number, spec=Mount(kind="bind", bind=asked), token=number + 1)


def test_what_was_learnt_and_what_is_wrong_is_shown_only_where_it_is() -> None:
    mount = Record(id=0, spec=overlay(Mount(id=5)), token=1)
    assert views.flat(picture(mount), "overlay") == {"id": 0, "lower": [5], "ro": False, "refs": 1}
    mount.facts = Facts(mountpoint="/m", upperdir="/u", workdir="/w", detail={"private": 1})
    mount.problem = "its lower is gone"
    shown = {"id": 0, "lower": [5], "ro": False, "upperdir": "/u", "workdir": "/w", "mountpoint": "/m", "refs": 1,
             "problem": "its lower is gone"}  # fmt: skip
    assert views.flat(picture(mount), "overlay") == shown


def test_what_was_lost_below_is_shown_by_its_id() -> None:
    """An object deleted by force leaves its holders."""
    shown = whole(picture(bind(3, below=2)))
    assert shown["bind"]["mount"] == {"id": 2}


def test_a_container_always_shows_what_it_may_not_have() -> None:
    box = Record(id=0, spec=Container(mount=Mount(id=0), command="/x"), token=9, run=Run(logfile="/l"))
    assert whole(picture(bind(0), box)) == {
        "id": 0, "mount": {"id": 0, "kind": "bind", "refs": 1, "bind": BIND}, "command": "/x", "systemd": False,
        "state": "created", "namespaces": None, "logfile": "/l", "refs": 1, "pid": None, "exit_code": None,
        "created_at": None, "started_at": None, "finished_at": None,
    }  # fmt: skip
    box.run = Run(state="dead", logfile="/l", pid=7, exit_code=0)
    box.problem = "it failed"
    shown = whole(picture(bind(0), box))
    assert [shown[name] for name in ("state", "pid", "exit_code", "problem")] == ["dead", 7, 0, "it failed"]


def test_one_object_that_several_stand_on_is_whole_in_each() -> None:
    top = Record(id=2, spec=overlay(Mount(id=1), Mount(id=0)), token=7)
    one, other = whole(picture(bind(0), bind(1, below=0), top))["overlay"]["lower"]
    assert one["bind"]["mount"] == other == {"id": 0, "kind": "bind", "refs": 2, "bind": BIND}


@pytest.mark.parametrize("length", [views.DEEPEST, views.DEEPEST + 1, 3000])
def test_a_chain_of_any_length_is_an_answer_that_parsers_can_read(length: int) -> None:
    chain = [bind(number, below=number - 1 if number else None) for number in range(length)]
    shown = whole(picture(*chain))
    depth = 1
    while "bind" in shown and "mount" in shown["bind"]:
        shown, depth = shown["bind"]["mount"], depth + 1
    assert depth == min(length, views.DEEPEST + 1)
    assert (shown["id"], shown["kind"]) == (length - depth, "bind")


@pytest.mark.parametrize("lower", [(399, 400), (400, 399)])
def test_the_longest_way_down_is_what_counts(lower: tuple[int, int]) -> None:
    """Mount 260 lies 140 deep in a chain, and 2 deep by a way of its own."""
    chain = [bind(number, below=number - 1 if number else None) for number in range(400)]
    short = Record(id=400, spec=overlay(Mount(id=260)), token=5000)
    top = Record(id=401, spec=overlay(*(Mount(id=number) for number in lower)), token=5001)
    steps = re.findall(rb"[{}]", views.whole(picture(*chain, short, top)))
    depth = max(accumulate(1 if step == b"{" else -1 for step in steps))
    assert depth <= 2 * views.DEEPEST + 2


def test_a_list_makes_again_only_what_has_changed_and_what_shows_it() -> None:
    graph, album = Graph(), views.Album()
    lower, top, other = bind(0), bind(1, below=0), bind(2)
    for record in (lower, top, other):
        graph.add(record)
    before = album.whole(graph.pictures("mount"))
    assert all(one is two for one, two in zip(before, album.whole(graph.pictures("mount")), strict=True))
    lower.problem = "it is lost"
    after = album.whole(graph.pictures("mount"))
    assert [one is two for one, two in zip(before, after, strict=True)] == [False, False, True]
    assert msgspec.json.decode(after[1])["bind"]["mount"]["problem"] == "it is lost"


@pytest.mark.parametrize("change", [
    lambda graph, box: setattr(box, "problem", "it failed"),
    lambda graph, box: setattr(box, "pinned", True),
    lambda graph, box: setattr(box.run, "state", "running"),
    lambda graph, box: setattr(box.run, "pid", 7),
    lambda graph, box: setattr(graph.find(Key("mount", 0)).facts, "mountpoint", "/m"),
    lambda graph, box: graph.add(bind(1, below=0)),
    lambda graph, box: graph.remove(Key("mount", 0)),
])  # fmt: skip
def test_a_list_shows_every_change(change: Callable[[Graph, AnyRecord], None]) -> None:
    graph, album = Graph(), views.Album()
    box = Record(id=0, spec=Container(mount=Mount(id=0), command="/x"), token=9, run=Run(logfile="/l"))
    graph.add(bind(0))
    graph.add(box)
    before = album.whole(graph.pictures("container"))
    change(graph, box)
    after = album.whole(graph.pictures("container"))
    assert after == [views.whole(one) for one in graph.pictures("container")] != before


def test_every_secret_is_the_mask() -> None:
    chap = Chap(user="u", secret=Secret(KEY), mutual_user="m", mutual_secret=Secret(KEY))
    asked = Iscsi(initiator="i", target="t", host="h", chap=chap)
    shown = views.flat(picture(Record(id=0, spec=Attachment(kind="iscsi", iscsi=asked), token=1)), "iscsi")
    assert shown["chap"] == {"user": "u", "secret": text.MASK, "mutual_user": "m", "mutual_secret": text.MASK}
    assert (shown["lun"], shown["port"], shown["max_comands"], shown["queue_depth"]) == (0, 3260, 128, 16)


def test_every_id_is_there_also_when_it_is_zero() -> None:
    image = {"monitors": ["127.0.0.1"], "pool": "p", "image": "i"}
    mount = {"kind": "rbd", "rbd": {"fs_type": "squashfs", "rbd": image}}
    made = Client(MemoryEngine()).post("/container", {"mount": mount, "command": "/x"})
    assert [made["id"], made["mount"]["id"], made["mount"]["attach"]["attach"]["id"]] == [0, 0, 0]
