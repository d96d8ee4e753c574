"""The graph: references, names, ids and what is shown, without a kernel."""

from __future__ import annotations

import pytest

from imageapi.engine.graph import Graph
from imageapi.errors import NotFound
from imageapi.records import AnyRecord, Key, Phase, Record
from imageapi.spec import Attachment, Mount, Object
from pure.nests import container, on, overlay, rbd

pytestmark = pytest.mark.pure

IMAGE, LOWER, TOP, BOX = Key("attach", 0), Key("mount", 0), Key("mount", 1), Key("container", 0)


@pytest.fixture
def graph() -> Graph:
    """A container on an overlay on a file system on an image, made by one request."""
    graph = Graph()
    for number, spec in ((0, rbd()), (0, on(Attachment(id=0))), (1, overlay(Mount(id=0)))):
        graph.add(_record(number, spec))
    graph.add(_record(0, container(Mount(id=1), "web")))
    graph.get(BOX).pinned = True
    return graph


def _record(number: int, spec: Object) -> AnyRecord:
    return Record(id=number, spec=spec, token=id(spec), phase=Phase.LIVE)


def test_references_count_holders_and_the_own_post(graph: Graph) -> None:
    assert [graph.refs(key) for key in (IMAGE, LOWER, TOP, BOX)] == [1, 1, 1, 1]
    graph.get(TOP).pinned = True
    graph.add(_record(1, container(Mount(id=1))))
    assert graph.refs(TOP) == 3
    assert [record.key for record in graph.holders(TOP)] == [BOX, Key("container", 1)]


def test_reading_changes_no_count(graph: Graph) -> None:
    before = graph.picture(BOX).refs
    for _ in range(3):
        graph.picture(BOX)
        list(graph.below(BOX))
    assert graph.picture(BOX).refs == before


def test_a_picture_shows_all_the_way_down(graph: Graph) -> None:
    picture = graph.picture(BOX)
    assert list(picture.records) == [BOX, TOP, LOWER, IMAGE]
    assert picture.refs == {BOX: 1, TOP: 1, LOWER: 1, IMAGE: 1}


def test_what_was_taken_away_below_is_left_out(graph: Graph) -> None:
    graph.remove(LOWER)
    assert list(graph.picture(BOX).records) == [BOX, TOP]


def test_a_name_goes_with_its_container(graph: Graph) -> None:
    assert graph.named("web") == BOX
    graph.remove(BOX)
    assert graph.named("web") is None


def test_a_name_that_was_freed_can_be_taken_while_the_old_one_goes(graph: Graph) -> None:
    graph.free_name(graph.get(BOX))
    graph.add(_record(5, container(Mount(id=1), "web")))
    graph.remove(BOX)
    assert graph.named("web") == Key("container", 5)


def test_what_is_being_made_is_not_shown(graph: Graph) -> None:
    key = Key("attach", 1)
    graph.add(_record(1, rbd("b")), hidden=True)
    assert [record.key for record in graph.shown("attach")] == [IMAGE]
    with pytest.raises(NotFound, match="no attach 1"):
        graph.picture(key)
    graph.show(key)
    assert graph.picture(key).record.id == 1


def test_kinds_of_an_attach_mount_are_its_own_and_its_attachments(graph: Graph) -> None:
    assert graph.kinds(graph.get(LOWER)) == {"attach", "rbd"}
    assert graph.kinds(graph.get(TOP)) == {"overlay"}


def test_ids_go_on_where_the_last_server_stopped() -> None:
    graph = Graph(first_id=1)
    graph.count_on({"attach": 7, "mount": 0})
    assert (graph.following("attach"), graph.following("mount")) == (7, 1)
