"""The contract's table of fields, line by line: what each kind must have, may have, and has by default."""

from __future__ import annotations

from typing import Any

import pytest

from imageapi import spec
from imageapi.api import dialects, views
from imageapi.engine.graph import Graph
from imageapi.errors import Invalid, Problem
from imageapi.records import Key, Record
from imageapi.spec import MASK

pytestmark = pytest.mark.pure

FLAGS = ["ro", "rw", "share", "noshare", "crc", "nocrc", "ceph_requires_signatures", "noceph_requires_signatures",
         "tcp_nodelay", "notcp_nodelay", "cephx_sign_messages", "nocephx_sign_messages", "force", "lock_on_read",
         "exclusive", "notrim", "abort_on_full", "rxbounce", "udev", "noudev"]  # fmt: skip
NUMBERS = ["mount_timeout", "osdkeepalive", "osd_idle_ttl", "queue_depth", "lock_timeout", "alloc_size"]
OPTIONS: dict[str, Any] = {
    "name": "admin", "namespace": "ns", "fsid": "f", "ip": "10.0.0.1", "ms_mode": "secure",
    "read_from_replica": "localize", "crush_location": "host:a", "compression_hint": "none",
    **dict.fromkeys(FLAGS, True), **dict.fromkeys(NUMBERS, 4096),
}  # fmt: skip
LAYERS: dict[str, Any] = {"volatile": True, "metacopy": True, "redirect_dir": "on", "index": True, "xino": "auto"}


class Line:
    """One line of the table: the required fields, the optional ones, and what an answer shows of these by default."""

    def __init__(self, collection: str, kind: str, required: Any, optional: Any, default: Any = None) -> None:
        self.collection = collection
        self.kind = kind
        self.required: dict[str, Any] = required
        self.optional: dict[str, Any] = optional
        self.default: dict[str, Any] = default or {}


TABLE = [
    Line("attach", "rbd", {"monitors": ["10.0.0.1", "[::1]:3300"], "pool": "p", "image": "i"},
         {"snapshot": "s", "options": OPTIONS, "readPartitions": True}, {"options": {}, "readPartitions": False}),
    Line("attach", "loopback", {"path": "/a", "base": "root"}, {"readPartitions": True, "ro": True},
         {"readPartitions": False, "ro": False}),
    Line("attach", "loopback", {"path": "a", "base": "mount", "mount": 7}, {"ro": True},
         {"readPartitions": False, "ro": False}),
    Line("attach", "local", {"path": "/dev/sda"}, {"ro": True, "readPartitions": True},
         {"ro": False, "readPartitions": False}),
    Line("attach", "iscsi", {"initiator": "iqn.a", "target": "iqn.b", "host": "h"},
         {"lun": 1, "readPartitions": True, "port": 3261, "max_comands": 64, "queue_depth": 8, "scheduler": "none",
          "chap": {"user": "u", "secret": "s", "mutual_user": "m", "mutual_secret": "t"}, "ro": True,
          "options": {"force": True}},
         {"lun": 0, "readPartitions": False, "port": 3260, "max_comands": 128, "queue_depth": 16,
          "scheduler": "mq-deadline", "ro": False}),
    Line("mount", "attach", {"attach": 3, "fs_type": "ext4"}, {"partition": 2, "mount_options": ["ro", "noatime"]},
         {"mount_options": []}),
    Line("mount", "rbd", {"rbd_id": 3, "fs_type": "ext4"}, {"partition": 2, "mount_options": ["ro", "noatime"]},
         {"mount_options": []}),
    Line("mount", "overlay", {"lower": [2, 0, 1]}, {"upper": 7, "upper_path": "/a", "options": LAYERS}, {"ro": False}),
    Line("mount", "overlay", {"lower": [2, 0, 1]}, {"ro": True}, {"ro": False}),
    Line("mount", "tmpfs", {"size": "2G"}, {}),
    Line("mount", "bind", {"path": "/a", "base": "root"}, {"recursive": True, "ro": True},
         {"recursive": False, "ro": False}),
    Line("mount", "bind", {"path": "../a", "base": "mount", "mount": 7}, {}, {"recursive": False, "ro": False}),
    Line("mount", "nfs", {"host": "h", "path": "/export"}, {"ro": True, "version": "3", "options": ["nolock"]},
         {"ro": False, "version": "4.2", "options": []}),
    Line("mount", "uri", {"uri": "http://h/a"}, {"sha256": "aB" * 32, "max_size": 1, "format": "erofs"}),
]  # fmt: skip
WRONG: list[Any] = [[[]], {"x": 1}, 1.5, True, "\0"]
LINES = pytest.mark.parametrize("line", TABLE, ids=lambda line: f"{line.collection} {line.kind}")


def shown(line: Line, body: dict[str, Any]) -> dict[str, Any]:
    """What the kind's route answers a POST of `body` with, but for the id and the references."""
    thing = dialects.read(line.collection, body, line.kind).thing
    graph = Graph()
    graph.add(Record(id=0, spec=thing, token=1))
    view = views.flat(graph.picture(Key(line.collection, 0)), line.kind)
    return {name: value for name, value in view.items() if name not in ("id", "refs")}


def refuse(line: Line, body: dict[str, Any]) -> Problem:
    with pytest.raises(Invalid) as caught:
        dialects.read(line.collection, body, line.kind)
    return caught.value


@LINES
def test_what_is_required_is_enough(line: Line) -> None:
    assert shown(line, line.required) == {**line.required, **line.default}


@LINES
def test_all_that_may_be_said_is_shown(line: Line) -> None:
    told = shown(line, {**line.required, **line.optional})
    if "chap" in line.optional:
        told["chap"] = {name: value if value != MASK else line.optional["chap"][name]
                        for name, value in told["chap"].items()}  # fmt: skip
    assert told == {**line.default, **line.required, **line.optional}


@LINES
def test_what_is_optional_may_be_null(line: Line) -> None:
    body = {**line.required, **dict.fromkeys(line.optional)}
    assert shown(line, body) == {**line.required, **line.default}


@LINES
def test_what_is_required_may_not_be_missing_nor_null(line: Line) -> None:
    for name in line.required:
        left = {field: value for field, value in line.required.items() if field != name}
        for body in (left, {**left, name: None}):
            problem = refuse(line, body)
            place = "$" if name == "rbd_id" else f"$.{name}"
            assert (problem.fields["path"], name in problem.message) == (place, True)


@LINES
def test_no_field_takes_a_value_of_another_type(line: Line) -> None:
    for name, value in {**line.required, **line.optional}.items():
        for wrong in WRONG:
            if type(wrong) is not type(value):
                problem = refuse(line, {**line.required, name: wrong})
                assert problem.fields["path"].startswith(f"$.{name}"), (name, wrong)


@LINES
def test_a_field_that_is_not_in_the_table_is_refused_with_the_nearest(line: Line) -> None:
    for name in {**line.required, **line.optional}:
        wrong = f"{name}x"
        problem = refuse(line, {**line.required, wrong: 1})
        assert (problem.fields["path"], f"did you mean '{name}'?" in problem.message) == (f"$.{wrong}", True)


@LINES
def test_what_the_server_sets_is_ignored_whatever_it_is(line: Line) -> None:
    ours = {"attach": ["device_file", "refs", "problem"], "mount": ["mountpoint", "refs", "problem"]}[line.collection]
    more = {"rbd": ["device_id"], "iscsi": ["device_id"], "overlay": ["upperdir", "workdir"]}.get(line.kind, [])
    names = ours if line.collection == "mount" and line.kind == "rbd" else [*ours, *more]
    for value in WRONG:
        assert shown(line, {**line.required, **dict.fromkeys(names, value)}) == {**line.required, **line.default}


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_every_option_of_an_image_by_itself(option: str) -> None:
    line = TABLE[0]
    body = {**line.required, "options": {option: OPTIONS[option]}}
    assert shown(line, body) == {**line.default, **body}
    problem = refuse(line, {**line.required, "options": {option: [1]}})
    assert problem.fields["path"] == f"$.options.{option}"


def test_no_option_is_left_out_of_this_table() -> None:
    assert set(spec.RbdOptions.__struct_fields__) == {*OPTIONS, "secret"}


@pytest.mark.parametrize("name", ["mount", "command"])
def test_what_a_container_must_have(name: str) -> None:
    body: dict[str, Any] = {"mount": 0, "command": "/bin/sh"}
    for bad in ({field: body[field] for field in body if field != name}, {**body, name: None}):
        with pytest.raises(Invalid, match=f"'{name}' is missing") as caught:
            dialects.read("container", bad)
        assert caught.value.fields["path"] == f"$.{name}"


def test_what_the_server_sets_of_a_container_is_ignored() -> None:
    body: dict[str, Any] = {"mount": 0, "command": "/bin/sh"}
    ours = ("logfile", "refs", "problem", "pid", "exit_code", "created_at", "started_at", "finished_at")
    wanted = dialects.read("container", body).thing
    for value in WRONG:
        assert dialects.read("container", {**body, **dict.fromkeys(ours, value)}).thing == wanted
