"""The two dialects: every form that the contract names becomes the canonical one, or is refused in its own words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageapi import spec
from imageapi.api import dialects, views
from imageapi.engine.graph import Graph, Picture
from imageapi.engine.plan import Plan, plan
from imageapi.errors import Conflict, Invalid, NotFound, Problem, Unsupported
from imageapi.records import AnyRecord, Phase, Record, Run
from imageapi.spec import MASK, Attach, Attachment, Container, Loopback, Mount, Object, Overlay, Rbd
from pure.nests import answers, container, on, overlay, rbd, things

pytestmark = pytest.mark.pure

RBD: dict[str, Any] = {"monitors": ["127.0.0.1"], "pool": "rbd", "image": "image", "options": {"ro": True}}
CANONICAL = on(rbd())
LOOP: dict[str, Any] = {"path": "/a", "base": "root"}
FLAT = {"fs_type": "squashfs", "rbd": RBD}


def read(collection: str, body: Any, kind: str | None = None) -> Object:
    return dialects.read(collection, body, kind).thing


def refuse(collection: str, body: Any, kind: str | None = None, problem: type[Problem] = Invalid) -> Problem:
    with pytest.raises(problem) as caught:
        dialects.read(collection, body, kind)
    return caught.value


SAME_MOUNT: dict[str, tuple[Any, str | None]] = {
    "canonical": ({"kind": "attach", "attach": {"fs_type": "squashfs", "attach": {"kind": "rbd", "rbd": RBD}}}, None),
    "without kinds": ({"attach": {"fs_type": "squashfs", "attach": {"rbd": RBD}}}, None),
    "a kind beside": ({"attach": {"fs_type": "squashfs", "kind": "rbd", "attach": {"rbd": RBD}}}, None),
    "by the attachment's kind": ({"kind": "rbd", "rbd": FLAT}, None),
    "by the attachment's kind alone": ({"rbd": FLAT}, None),
    "a kind in the flat": ({"kind": "rbd", "rbd": {"kind": "rbd", **FLAT}}, None),
    "on the kind's route": (FLAT, "rbd"),
    "on the route of attach": ({"fs_type": "squashfs", "attach": {"kind": "rbd", "rbd": RBD}}, "attach"),
    "with nulls": ({"kind": "rbd", "overlay": None, "rbd": {**FLAT, "mount_options": None, "rbd_id": None}}, None),
    "with what the server sets": (
        {"kind": "rbd", "refs": 7, "mountpoint": "/m", "problem": "p",
         "rbd": {**FLAT, "mountpoint": "/m", "rbd": {**RBD, "device_id": 3, "refs": 1, "device_file": "/dev/rbd0"}}},
        None,
    ),
    "with empty strings": (
        {"rbd": {**FLAT, "rbd": {**RBD, "snapshot": "", "options": {"ro": True, "name": ""}}}},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_MOUNT)
def test_all_ways_to_say_one_mount_are_one(name: str) -> None:
    body, kind = SAME_MOUNT[name]
    assert read("mount", body, kind) == CANONICAL


REFERENCES: dict[str, Any] = {
    "an object": {"id": 3},
    "a bare number": 3,
    "v0.1's": {"mount_id": 3},
    "both alike": {"id": 3, "mount_id": 3},
    "with what the server sets": {"id": 3, "refs": 2, "mountpoint": "/m"},
}


@pytest.mark.parametrize("name", REFERENCES)
def test_all_ways_to_refer_to_a_mount_are_one(name: str) -> None:
    assert read("mount", {"lower": [REFERENCES[name]]}, "overlay") == overlay(Mount(id=3))
    assert read("container", {"mount": REFERENCES[name], "command": "/x"}) == Container(mount=Mount(id=3), command="/x")


def test_beside_an_id_a_definition_is_not_read_but_for_its_kind() -> None:
    whole = {"id": 3, "kind": "overlay", "overlay": {"no such field": MASK}}
    assert read("mount", {"lower": [whole]}, "overlay") == overlay(Mount(id=3, kind="overlay"))
    assert read("mount", {"lower": [{"id": 3, "overlay": {}}]}, "overlay") == overlay(Mount(id=3, kind="overlay"))
    problem = refuse("mount", {"lower": [{"id": 3, "kind": "bind", "overlay": {}}]}, "overlay")
    assert problem.fields["path"] == "$.lower[0].kind"


@pytest.mark.parametrize(
    "body",
    [{"rbd_id": 5, "fs_type": "squashfs"}, {"id": 5, "fs_type": "squashfs"}, {"rbd": {"id": 5}, "fs_type": "squashfs"},
     {"rbd": 5, "fs_type": "squashfs"}, {"rbd_id": 5, "rbd": {"unread": True}, "fs_type": "squashfs"}],
)  # fmt: skip
def test_the_flat_attach_mount_names_its_attachment(body: dict[str, Any]) -> None:
    assert read("mount", body, "rbd") == on(Attachment(id=5, kind="rbd"))


def test_in_a_nested_flat_an_id_is_not_the_attachments() -> None:
    problem = refuse("mount", {"lower": [{"kind": "rbd", "rbd": {"id": 0, "fs_type": "squashfs"}}]}, "overlay")
    assert (problem.fields["path"], "rbd_id" in problem.message) == ("$.lower[0].rbd", True)


@pytest.mark.parametrize("kind", dialects.ATTACHMENTS)
def test_every_attachment_kind_is_a_mount_too(kind: str) -> None:
    thing = read("mount", {"kind": kind, kind: {"fs_type": "ext4", f"{kind}_id": 1}})
    assert thing == Mount(kind="attach", attach=Attach(attach=Attachment(id=1, kind=kind), fs_type="ext4"))


def test_the_iscsi_commands_have_two_spellings() -> None:
    base = {"initiator": "a", "target": "b", "host": "c"}
    for spelling in ("max_comands", "max_commands"):
        thing = read("attach", {**base, spelling: 7}, "iscsi")
        assert isinstance(thing, Attachment)
        assert thing.iscsi is not None
        assert thing.iscsi.max_comands == 7


def test_a_loop_device_within_a_mount() -> None:
    inner = {"path": "/image", "base": "mount", "mount": {"kind": "rbd", "rbd": FLAT}}
    wanted = Attachment(kind="loopback", loopback=Loopback(path="/image", base="mount", mount=CANONICAL))
    assert read("attach", inner, "loopback") == wanted
    assert read("attach", {"loopback": inner}) == wanted


REFUSED: dict[str, tuple[str, Any, str | None, str, str]] = {
    # name: collection, body, kind, path, words
    "no object": ("mount", [], None, "$", "array"),
    "an id at the top": ("mount", {"id": 3, "rbd": FLAT}, None, "$.id", "leave it out"),
    "an id at the top of a kind": ("attach", {"id": 3, **LOOP}, "loopback", "$.id", "leave it out"),
    "an id beside the attachment's": ("mount", {"id": 3, "rbd_id": 1, "fs_type": "x"}, "rbd", "$.id", "rbd_id"),
    "two ids that differ": ("mount", {"lower": [{"id": 1, "mount_id": 2}]}, "overlay", "$.lower[0].mount_id", "differ"),
    "nothing": ("mount", {}, None, "$", "kinds are"),
    "no definition": ("mount", {"kind": "overlay"}, None, "$", "'overlay'"),
    "two definitions": ("mount", {"rbd": FLAT, "overlay": {"lower": [1]}}, None, "$", "one kind only"),
    "another's definition": ("mount", {"kind": "rbd", "rbd": FLAT, "overlay": {}}, None, "$.overlay", "not belong"),
    "an unknown kind": ("mount", {"kind": "overlai", "overlai": {}}, None, "$.kind", "did you mean 'overlay'"),
    "another attachment's kind": ("mount", {"rbd": {**FLAT, "kind": "iscsi"}}, None, "$.rbd.kind", "iscsi"),
    "a kind that does not agree": (
        "mount", {"attach": {"fs_type": "x", "kind": "iscsi", "attach": {"rbd": RBD}}}, None, "$.attach.kind", "rbd"),
    "an unknown field": ("mount", {**FLAT, "fstype": "x"}, "rbd", "$.fstype", "did you mean 'fs_type'"),
    "an unknown field, deep": (
        "mount", {"lower": [{"rbd": {**FLAT, "rbd": {**RBD, "imge": "i"}}}]}, "overlay", "$.lower[0].rbd.rbd.imge",
        "did you mean 'image'"),
    "an unknown option": ("attach", {**RBD, "options": {"readonly": True}}, "rbd", "$.options.readonly", "readonly"),
    "a missing field": ("attach", {"path": "/a"}, "loopback", "$.base", "missing"),
    "a wrong type": ("mount", {"rbd": {**FLAT, "rbd": {**RBD, "pool": 3}}}, None, "$.rbd.rbd.pool", "str"),
    "a wrong type in a nested flat": ("mount", {"lower": [{"rbd": {**FLAT, "fs_type": 3}}]}, "overlay",
                                      "$.lower[0].rbd.fs_type", "a string"),
    "a wrong type in a list": ("attach", {**RBD, "monitors": ["a", 3]}, "rbd", "$.monitors[1]", "str"),
    "no monitors": ("attach", {**RBD, "monitors": []}, "rbd", "$.monitors", "at least one"),
    "no lower": ("mount", {"lower": []}, "overlay", "$.lower", "at least one"),
    "no list": ("mount", {"lower": {"id": 1}}, "overlay", "$.lower", "an array, not an object"),
    "lists in lists": ("mount", {"lower": [[[1]]]}, "overlay", "$.lower[0]", "an object, not an array"),
    "an id that is a string": ("mount", {"lower": [{"id": "1"}]}, "overlay", "$.lower[0].id", "a whole number"),
    "an id that is a fraction": ("mount", {"lower": [{"id": 1.5}]}, "overlay", "$.lower[0].id", "a whole number"),
    "a negative id": ("mount", {"rbd_id": -1, "fs_type": "x"}, "rbd", "$.rbd_id", "0 or more"),
    "a negative id, the tutorial's way": ("mount", {"id": -1, "fs_type": "x"}, "rbd", "$.id", "0 or more"),
    "a reference at the top": ("mount", {"mount_id": 3}, None, "$.mount_id", "leave it out"),
    "a reference at the top of a kind": (
        "mount", {"mount_id": 3, "lower": [1]}, "overlay", "$.mount_id", "leave it out"),
    "an id in a definition": ("mount", {"overlay": {"id": 3, "lower": [1]}}, None, "$.overlay.id", "beside the kind"),
    "an id in a nested flat": (
        "mount", {"lower": [{"rbd": {"id": 3, "rbd_id": 1, "fs_type": "x"}}]}, "overlay", "$.lower[0].rbd.id",
        "rbd_id"),
    "another kind in a flat's reference": (
        "mount", {"rbd": {"id": 3, "kind": "iscsi"}, "fs_type": "x"}, "rbd", "$.rbd.kind", "rbd"),
    "neither, on the route": ("mount", {"fs_type": "x"}, "rbd", "$", "'rbd_id'"),
    "an attachment that is none": ("mount", {"rbd": "x", "fs_type": "x"}, "rbd", "$.rbd", "an object, not a string"),
    "an unknown field of the attachment, deep on the route of attach": (
        "mount", {"fs_type": "x", "attach": {"rbd": {**RBD, "imge": 1}}}, "attach", "$.attach.rbd.imge", "'image'"),
    "a kind that is no string": ("mount", {"kind": 3, "overlay": {}}, None, "$.kind", "a string"),
    "a kind that is no string, beside an id": ("mount", {"lower": [{"id": 1, "kind": []}]}, "overlay",
                                               "$.lower[0].kind", "a string"),
    "a base": ("attach", {"path": "/a", "base": "rooot"}, "loopback", "$.base", "not one of root, mount"),
    "an option of another value": (
        "attach", {**RBD, "options": {"ms_mode": "fast"}}, "rbd", "$.options.ms_mode", "prefer-secure"),
    "a port": ("attach", {"initiator": "a", "target": "b", "host": "c", "port": 70000}, "iscsi", "$.port", "65535 or"),
    "two spellings that differ": (
        "attach", {"initiator": "a", "target": "b", "host": "c", "max_commands": 1, "max_comands": 2}, "iscsi",
        "$.max_commands", "differ"),
    "a bad value by the other spelling": (
        "attach", {"initiator": "a", "target": "b", "host": "c", "max_commands": 0}, "iscsi", "$.max_commands", "1 or"),
    "an empty secret": (
        "attach", {"initiator": "a", "target": "b", "host": "c", "chap": {"user": "u", "secret": ""}}, "iscsi",
        "$.chap.secret", "empty"),
    "a checksum that ends a line": (
        "mount", {"uri": "http://x", "sha256": "a" * 64 + "\n"}, "uri", "$.sha256", "64 hexadecimal"),
    "a checksum": ("mount", {"uri": "http://x", "sha256": "abc"}, "uri", "$.sha256", "64 hexadecimal"),
    "a state that is no word": ("container", {"mount": 1, "command": "/x", "state": "flying"}, None, "$.state",
                                "'created' or 'running'"),
    "a long command": ("container", {"mount": 1, "command": "x" * 5000}, None, "$.command", "longer than 4096"),
    "a NUL in an option": (
        "mount", {"fs_type": "x", "attach": 1, "mount_options": ["a", "b\0c"]}, "attach", "$.mount_options[1]", "NUL"),
    "a NUL in a name": ("attach", {**RBD, "options": {"name": "a\0"}}, "rbd", "$.options.name", "NUL"),
    "a name that ends a line": ("container", {"mount": 1, "command": "/x", "name": "a\n"}, None, "$.name", "letters"),
    "a name that is a directory": ("container", {"mount": 1, "command": "/x", "name": ".."}, None, "$.name", "'..'"),
    "a field with a long name": (
        "container", {"mount": 1, "command": "/x", "y" * 200: 1}, None, "$." + "y" * 200, "yyy..."),
    "a field that reads like a place": (
        "container", {"mount": 1, "command": "/x", "y - at `$.mount": 1}, None, "$.y - at `$.mount", "there are id"),
    "a field that reads like a place that is none": (
        "container", {"mount": 1, "command": "/x", "y` - at `evil": 1}, None, "$.y` - at `evil", "there are id"),
    "a field that reads like a place, deep": (
        "mount", {"lower": [{"id": 1, "y - at `$": 1}]}, "overlay", "$.lower[0].y - at `$", "there are id"),
    "a boolean for an id": ("mount", {"lower": [True]}, "overlay", "$.lower[0]", "object"),
    "a masked secret": ("attach", {**RBD, "options": {"secret": MASK}}, "rbd", "$.options.secret", "by id"),
    "a secret that is none": ("attach", {**RBD, "options": {"secret": "%%%"}}, "rbd", "$.options.secret", "base64"),
    "a masked CHAP secret": (
        "attach", {"initiator": "a", "target": "b", "host": "c", "chap": {"user": "u", "secret": MASK}}, "iscsi",
        "$.chap.secret", "by id"),
    "no mount for its base": ("attach", {"path": "/a", "base": "mount"}, "loopback", "$.mount", "say which"),
    "a mount for the root": ("mount", {**LOOP, "mount": 1}, "bind", "$.mount", "leave 'mount' out"),
    "a relative path": ("attach", {"path": "a", "base": "root"}, "loopback", "$.path", "absolute"),
    "a bad name": ("container", {"mount": 1, "command": "/x", "name": "a/b"}, None, "$.name", "letters, digits"),
    "a state": ("container", {"mount": 1, "command": "/x", "state": "exited"}, None, "$.state", "running"),
    "no command": ("container", {"mount": 1, "command": ""}, None, "$.command", "empty"),
    "a NUL in a path": ("attach", {"path": "/a\0b", "base": "root"}, "loopback", "$.path", "NUL"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_in_the_clients_own_place(name: str) -> None:
    collection, body, kind, path, words = REFUSED[name]
    problem = refuse(collection, body, kind)
    assert (problem.fields["path"], words in problem.message) == (path, True), problem.message


NOWHERE: list[tuple[str, Any, str | None, str, str]] = [
    ("mount", {"lower": [0, 2**80]}, "overlay", "$.lower[1]", "there is no mount"),
    ("mount", {"lower": [{"id": 2**31}]}, "overlay", "$.lower[0].id", "there is no mount"),
    ("mount", {"rbd_id": 2**31, "fs_type": "x"}, "rbd", "$.rbd_id", "there is no attach"),
    ("container", {"mount": 2**31, "command": "/x"}, None, "$.mount", "there is no mount"),
]


@pytest.mark.parametrize(("collection", "body", "kind", "path", "words"), NOWHERE)
def test_an_id_that_no_object_can_have_is_not_found(
    collection: str, body: Any, kind: str | None, path: str, words: str
) -> None:
    problem = refuse(collection, body, kind, NotFound)
    assert (problem.fields["path"], words in problem.message) == (path, True)


@pytest.mark.parametrize("namespaces", [None, ["mnt", "pid", "uts", "ipc"], ["ipc", "mnt", "pid", "uts"]])
def test_the_default_namespaces_are_taken(namespaces: list[str] | None) -> None:
    read("container", {"mount": 1, "command": "/x", "namespaces": namespaces})


@pytest.mark.parametrize("namespaces", [[], ["net"], ["mnt", "pid", "uts", "ipc", "net"], ["mnt", "mnt", "pid", "uts"]])
def test_other_namespaces_are_not_there_yet(namespaces: list[str]) -> None:
    body = {"mount": 1, "command": "/x", "namespaces": namespaces}
    assert refuse("container", body, problem=Unsupported).fields["path"] == "$.namespaces"


def nest(depth: int, body: Any, key: str = "overlay") -> Any:
    for _ in range(depth):
        body = {key: {"lower": [body]}}
    return body


def test_a_bomb_of_nests_is_refused() -> None:
    deep = nest(5000, {})
    for bomb in ({"lower": [{"id": deep, "mount_id": nest(5000, {})}]}, {"id": deep}):
        assert refuse("mount", bomb, "overlay").fields["path"].startswith("$")
    for bomb in (nest(5000, {"id": 1}), {"kind": nest(900, {}), "overlay": {}}, {"overlay": nest(5000, {}, "x")}):
        assert refuse("mount", bomb).fields["path"].startswith("$")
    assert "nested" in refuse("mount", nest(5000, {"id": 1})).message


def test_nests_are_as_deep_as_the_limit() -> None:
    read("mount", nest(dialects.DEEPEST, 1))
    assert "nested more than" in refuse("mount", nest(dialects.DEEPEST + 1, 1)).message


def test_the_deepest_nest_can_be_planned_and_shown() -> None:
    image: Any = 1
    for _ in range(dialects.DEEPEST):
        image = (
            {"rbd": {**FLAT, "rbd": RBD}}
            if image == 1
            else {"loopback": {"fs_type": "squashfs", "loopback": {"path": "/image", "base": "mount", "mount": image}}}
        )
    graph, planned = _made(read("container", {"mount": image, "command": "/x"}))
    assert len(planned.steps) == 2 * dialects.DEEPEST + 1
    assert _whole(graph.picture(planned.root.key))["command"] == "/x"


@pytest.mark.parametrize("empty", [None, ""])
def test_what_is_optional_may_be_empty(empty: Any) -> None:
    """Go clients send all their fields."""
    body = {"name": empty, "mount": {"kind": empty, "id": 1}, "command": "/x", "state": empty, "namespaces": None}
    assert read("container", body) == Container(mount=Mount(id=1), command="/x")
    options = dict.fromkeys(("name", "secret", "namespace", "fsid", "ip", "crush_location", "ms_mode"), empty)
    assert read("attach", {**RBD, "snapshot": empty, "options": {**options, "ro": True}}, "rbd") == rbd()
    assert read("mount", {**FLAT, "mount_options": [""], "kind": empty}, "rbd") == CANONICAL


def test_what_is_not_optional_text_may_not_be_empty() -> None:
    for body, path in (({"path": "", "base": "root"}, "$.path"), ({**LOOP, "ro": ""}, "$.ro")):
        assert refuse("attach", body, "loopback").fields["path"] == path


WORDS = sorted({name for struct in (Mount, Attach, Overlay, Attachment, Rbd, Loopback, Container)
                for name in struct.__struct_fields__} | {"rbd_id", "mount_id", "max_commands", "nonsense"})  # fmt: skip
scalars = st.none() | st.booleans() | st.integers(-2, 2**40) | st.sampled_from(["", "rbd", "attach", "/a", MASK, "\0"])
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=25,
)  # fmt: skip
routes = st.sampled_from([("attach", None), ("mount", None), ("container", None), ("attach", "rbd"), ("mount", "rbd"),
                          ("mount", "attach"), ("mount", "overlay"), ("attach", "loopback")])  # fmt: skip


@given(routes, anything)
def test_anything_is_an_object_or_a_problem_at_a_place_of_its_own(route: tuple[str, str | None], body: Any) -> None:
    """Nothing but a problem is raised; its place is one that the body has, or the field that it lacks there."""
    try:
        thing = read(route[0], body, route[1])
    except Problem as problem:
        place, lacking = problem.fields["path"], True
    else:
        assert isinstance(thing, spec.COLLECTIONS[route[0]])
        return
    for step in re.findall(r"\.(\w+)|\[(\d+)\]", place):
        assert lacking, f"{place} is below what is not there"
        lacking = step[0] in body if step[0] and isinstance(body, dict) else bool(step[1]) and isinstance(body, list)
        body = (body[step[0]] if step[0] else body[int(step[1])]) if lacking else None


# -------------------------------------------------------------------------------------------------- the way back


def _made(thing: Object) -> tuple[Graph, Plan]:
    graph = Graph()
    planned = plan(thing, graph, iter(range(10**6)).__next__, answers)
    assert isinstance(planned, Plan)
    for record in planned.steps:
        record.phase = Phase.LIVE
        if isinstance(record.spec, Container):
            record.run = Run(created_at="2026-01-01T00:00:00Z")
        graph.add(record)
    planned.root.pinned = True
    return graph, planned


def _without_ids(view: Any) -> Any:
    """A view as a definition of new objects: with the ids it would refer to what is there."""
    if isinstance(view, dict):
        return {name: _without_ids(value) for name, value in view.items() if name not in ("id", "state")}
    return [_without_ids(item) for item in view] if isinstance(view, list) else view


@given(st.text(st.sampled_from("x$.[0]`' -at\n"), max_size=12), st.booleans(), st.booleans())
def test_no_name_of_a_field_is_taken_for_a_place(name: str, as_path: bool, deep: bool) -> None:
    name = f"x` - at `{name}" if as_path else f"x{name}"
    mount = {"id": 1, name: 1} if deep else {"id": 1}
    problem = refuse("container", {"mount": mount, "command": "/x", **({} if deep else {name: 1})})
    assert problem.fields["path"] == f"${'.mount' if deep else ''}.{name}"
    assert problem.message.startswith(f"there is no field '{name}' here")


@given(things)
def test_what_is_shown_whole_can_be_sent_back(thing: Object) -> None:
    try:
        graph, planned = _made(thing)
    except Conflict:
        return
    view = _whole(graph.picture(planned.root.key))
    again = read(planned.root.key.collection, _without_ids(view))
    second = plan(again, Graph(), iter(range(10**6)).__next__, answers)
    assert isinstance(second, Plan)
    assert [record.spec for record in second.steps] == [record.spec for record in planned.steps]


@given(things)
def test_a_view_without_its_own_id_is_one_more_of_the_same(thing: Object) -> None:
    """In either form; what it stands on is named by its id, and so is the same."""
    try:
        graph, planned = _made(thing)
    except Conflict:
        return
    for record in planned.steps:
        picture = graph.picture(record.key)
        for kind, view in _views(picture):
            sent = {name: value for name, value in view.items() if name not in ("id", "state")}
            again = Record(id=record.id, token=0, spec=read(record.key.collection, sent, kind))
            assert again.edges() == record.edges()
            assert msgspec.structs.replace(again.definition, **_needs(record)) == record.definition


def _whole(picture: Picture) -> Any:
    return msgspec.json.decode(views.whole(picture))


def _views(picture: Picture) -> Iterator[tuple[str | None, Any]]:
    """The forms of one object, each with the kind of its route."""
    record = picture.record
    yield None, _whole(picture)
    if not isinstance(record.spec, Container):
        attachments = {picture.records[edge].kind for edge in record.edges()} if record.kind == "attach" else set()
        for kind in {record.kind, *attachments}:
            yield kind, views.flat(picture, kind)


def _needs(record: AnyRecord) -> dict[str, Any]:
    """The fields that refer to objects: a reference may name a kind, or not."""
    part = record.definition
    struct: Any = type(part)
    names = [name for name, hint in spec.hints(struct).items() if spec.struct_of(hint) in (Attachment, Mount)]
    return {name: getattr(part, name) for name in names}


def test_the_flat_form_has_plain_ids() -> None:
    graph, planned = _made(container(overlay(on(rbd()))))
    attachment, mount, top, box = (graph.picture(record.key) for record in planned.steps)
    assert views.flat(attachment, "rbd") == {"id": 0, **RBD, "readPartitions": False, "refs": 1}
    flat = {"id": 0, "fs_type": "squashfs", "mount_options": [], "refs": 1}
    assert views.flat(mount, "rbd") == {**flat, "rbd_id": 0}
    assert views.flat(mount, "attach") == {**flat, "attach": 0}
    assert views.flat(top, "overlay") == {"id": 1, "lower": [0], "ro": False, "refs": 1}
    shown = _whole(box)
    nulls = ("pid", "exit_code", "started_at", "finished_at", "namespaces")
    assert [shown[name] for name in nulls] == [None] * len(nulls)
    assert "problem" not in shown


def test_secrets_are_never_shown() -> None:
    body = {**RBD, "options": {"secret": "c2VjcmV0"}}
    graph, planned = _made(read("mount", {"fs_type": "squashfs", "rbd": body}, "rbd"))
    for record in planned.steps:
        picture = graph.picture(record.key)
        for view in (_whole(picture), views.flat(picture, record.kind)):
            assert "c2VjcmV0" not in str(view)
    assert views.flat(graph.picture(planned.steps[0].key), "rbd")["options"]["secret"] == MASK


def test_every_kind_of_the_contract_is_known() -> None:
    assert set(spec.kinds(Attachment)) == {"rbd", "loopback", "local", "iscsi"}
    assert set(spec.kinds(Mount)) == {"attach", "overlay", "bind", "tmpfs", "nfs", "uri"}
    assert {spec.kinds(Mount)["overlay"], spec.kinds(Attachment)["rbd"]} == {Overlay, Rbd}
