"""The planner: what a request becomes, what is shared, and what is refused."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageapi.drivers.base import driver
from imageapi.engine.graph import Graph
from imageapi.engine.plan import Later, Plan, plan
from imageapi.errors import Conflict, Invalid, NotFound, Problem, Unsupported
from imageapi.records import Key, Phase
from imageapi.spec import Addresses, Attachment, Mount, Object, Overlay, Rbd, Uri
from pure.nests import answers, container, loopback, on, overlay, rbd, things

pytestmark = pytest.mark.pure

ATTACH, MOUNT, CONTAINER = "attach", "mount", "container"


@pytest.fixture
def graph() -> Graph:
    return Graph()


_numbers = itertools.count(1)


def ask(graph: Graph, thing: Object) -> Plan:
    planned = plan(thing, graph, lambda: next(_numbers), answers)
    assert isinstance(planned, Plan)
    return planned


def make(graph: Graph, thing: Object) -> Key:
    """Plan `thing`, and enter it as if every step had succeeded."""
    planned = ask(graph, thing)
    for record in planned.steps:
        record.phase = Phase.LIVE
        graph.add(record)
    planned.root.pinned = True
    return planned.root.key


def refuse(graph: Graph, thing: Object, problem: type[Problem]) -> Problem:
    with pytest.raises(problem) as caught:
        ask(graph, thing)
    return caught.value


def test_a_nest_becomes_steps_children_first_with_their_places(graph: Graph) -> None:
    planned = ask(graph, container(overlay(on(rbd()))))
    assert [record.key for record in planned.steps] == [(ATTACH, 0), (MOUNT, 0), (MOUNT, 1), (CONTAINER, 0)]
    assert list(planned.paths.values()) == [
        "$.mount.overlay.lower[0].attach.attach",
        "$.mount.overlay.lower[0]",
        "$.mount",
        "$",
    ]
    assert [record.edges() for record in planned.steps] == [[], [(ATTACH, 0)], [(MOUNT, 0)], [(MOUNT, 1)]]


def test_a_plan_changes_nothing(graph: Graph) -> None:
    ask(graph, container(overlay(on(rbd()))))
    assert graph.all() == []
    assert graph.following(MOUNT) == 0


def test_ids_continue_after_those_in_use(graph: Graph) -> None:
    assert make(graph, rbd("a")) == (ATTACH, 0)
    assert make(graph, rbd("b")) == (ATTACH, 1)
    graph.remove(Key(ATTACH, 1))
    assert make(graph, rbd("c")) == (ATTACH, 2)


def test_ids_of_a_failed_create_are_free_again() -> None:
    graph = Graph(first_id=1)
    planned = ask(graph, container(overlay(on(rbd()))))
    for record in planned.steps:
        graph.add(record, hidden=True)
    for record in reversed(planned.steps):
        graph.remove(record.key)
    assert [graph.following(one) for one in (ATTACH, MOUNT, CONTAINER)] == [1, 1, 1]


def test_ids_of_a_failed_create_stay_used_while_later_ones_live(graph: Graph) -> None:
    failed = ask(graph, rbd("a"))
    graph.add(failed.root, hidden=True)
    make(graph, rbd("b"))
    graph.remove(failed.root.key)
    assert graph.following(ATTACH) == 2


def test_a_nested_read_only_image_is_shared(graph: Graph) -> None:
    make(graph, container(overlay(on(rbd()))))
    second = ask(graph, container(overlay(on(rbd()))))
    assert [record.key for record in second.steps] == [(MOUNT, 2), (CONTAINER, 1)]
    assert second.steps[0].edges() == [(MOUNT, 0)]


def test_an_image_named_twice_in_one_request_is_one(graph: Graph) -> None:
    planned = ask(graph, overlay(on(rbd()), on(rbd(), "erofs")))
    assert [record.key for record in planned.steps] == [(ATTACH, 0), (MOUNT, 0), (MOUNT, 1), (MOUNT, 2)]


def test_a_post_of_its_own_is_always_new(graph: Graph) -> None:
    make(graph, rbd())
    assert make(graph, rbd()) == (ATTACH, 1)


def test_what_can_be_written_is_not_shared(graph: Graph) -> None:
    make(graph, on(loopback("/a", ro=False)))
    assert len(ask(graph, on(loopback("/a", ro=False))).steps) == 2


def test_what_differs_in_one_field_is_not_shared(graph: Graph) -> None:
    make(graph, on(loopback("/a")))
    assert len(ask(graph, on(loopback("/b"))).steps) == 2


def test_what_is_being_released_is_waited_for(graph: Graph) -> None:
    make(graph, on(rbd()))
    graph.get(Key(MOUNT, 0)).phase = Phase.RELEASING
    assert plan(overlay(on(rbd())), graph, lambda: 99, answers) == Later(Key(MOUNT, 0))


def test_what_cannot_be_released_is_not_waited_for(graph: Graph) -> None:
    make(graph, on(rbd()))
    stuck = graph.get(Key(MOUNT, 0))
    stuck.phase, stuck.problem = Phase.RELEASING, "busy"
    assert [record.key for record in ask(graph, overlay(on(rbd()))).steps] == [(MOUNT, 1), (MOUNT, 2)]


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_a_second_attachment_of_an_image_that_can_be_written_is_refused(
    graph: Graph, first: bool, second: bool
) -> None:
    make(graph, rbd(ro=first))
    problem = refuse(graph, rbd(ro=second), Conflict)
    assert "attach 0" in problem.message
    assert problem.fields["path"] == "$.rbd"
    assert ask(graph, rbd(ro=second, force=True)).root.key == (ATTACH, 1)


def test_references_must_be_there(graph: Graph) -> None:
    problem = refuse(graph, overlay(Mount(id=7)), NotFound)
    assert (problem.message[:19], problem.fields["path"]) == ("there is no mount 7", "$.overlay.lower[0]")


def test_an_object_cannot_stand_on_itself(graph: Graph) -> None:
    refuse(graph, overlay(Mount(id=graph.following(MOUNT))), NotFound)


def test_an_object_that_is_just_being_made_is_no_reference(graph: Graph) -> None:
    graph.add(ask(graph, on(rbd())).steps[0], hidden=True)
    refuse(graph, on(Attachment(id=0)), NotFound)


@pytest.mark.parametrize("kind", ["attach", "rbd"])
def test_a_reference_may_name_either_kind_of_an_attach_mount(graph: Graph, kind: str) -> None:
    make(graph, on(rbd()))
    ask(graph, overlay(Mount(id=0, kind=kind)))


def test_a_reference_of_another_kind_is_refused(graph: Graph) -> None:
    make(graph, on(rbd()))
    problem = refuse(graph, overlay(Mount(id=0, kind="overlay")), Invalid)
    assert problem.fields["path"] == "$.overlay.lower[0].kind"
    assert "attach or rbd, not overlay" in problem.message


def test_neither_reference_nor_definition(graph: Graph) -> None:
    assert refuse(graph, overlay(Mount()), Invalid).fields["path"] == "$.overlay.lower[0]"


def test_what_is_being_deleted_is_no_reference(graph: Graph) -> None:
    make(graph, on(rbd()))
    graph.get(Key(MOUNT, 0)).phase = Phase.RELEASING
    refuse(graph, overlay(Mount(id=0)), Conflict)


def test_what_has_a_problem_is_no_reference(graph: Graph) -> None:
    make(graph, on(rbd()))
    graph.get(Key(MOUNT, 0)).problem = "it is gone"
    assert "it is gone" in refuse(graph, overlay(Mount(id=0)), Conflict).message


def test_what_is_wrong_with_a_monitor_is_told_by_its_place(graph: Graph) -> None:
    wrong = Attachment(kind="rbd", rbd=Rbd(monitors=["10.0.0.1", "http://b"], pool="rbd", image="image"))
    with pytest.raises(Invalid) as refusal:
        plan(container(overlay(on(wrong))), graph, lambda: 1)
    assert refusal.value.fields["path"] == "$.mount.overlay.lower[0].attach.attach.rbd.monitors[1]"


def test_a_name_is_taken_once(graph: Graph) -> None:
    make(graph, container(on(rbd()), "web"))
    problem = refuse(graph, container(Mount(id=0), "web"), Conflict)
    assert (problem.fields["path"], "container 0" in problem.message) == ("$.name", True)


def test_a_kind_without_a_driver_is_refused_before_anything(graph: Graph) -> None:
    uri = Mount(kind="uri", uri=Uri(uri=Addresses("https://localhost/image.tar")))
    with pytest.raises(Unsupported, match="kind 'urn' has no driver"):
        plan(uri, graph, lambda: 1, lambda collection, kind: driver(collection, "urn"))


# ------------------------------------------------------------------------------------------------------ uppers


def writing(upper: Mount, path: str | None = None) -> Mount:
    return Mount(kind="overlay", overlay=Overlay([on(rbd())], upper, path))


def test_an_upper_is_the_last_that_an_overlay_needs(graph: Graph) -> None:
    planned = ask(graph, writing(on(loopback("/disk", ro=False), "ext4")))
    assert planned.root.edges() == [(MOUNT, 0), (MOUNT, 1)]
    assert planned.paths[Key(MOUNT, 1)] == "$.overlay.upper"


@pytest.mark.parametrize("attachment", [rbd(), loopback("/disk")])
def test_an_upper_that_cannot_be_written_is_refused(graph: Graph, attachment: Attachment) -> None:
    refused = refuse(graph, writing(on(attachment)), Invalid)
    assert refused.fields["path"] == "$.overlay.upper"
    refused = refuse(graph, writing(Mount(id=make(graph, on(attachment)).id)), Invalid)
    assert refused.fields["path"] == "$.overlay.upper"


@pytest.mark.parametrize(
    ("first", "second", "free"),
    [
        (None, None, False),
        (None, "/", False),
        ("/a", "a/./", False),
        ("/a", "/a/upper/b", False),
        ("/a/work", "/a", False),
        (None, "/upper", False),
        ("/a", "/b", True),
        ("/a", "/a/b", True),
        ("/a", "/a/upper2", True),
        (None, "/a", True),
    ],
)
def test_a_place_is_written_by_one_overlay(graph: Graph, first: str | None, second: str | None, free: bool) -> None:
    upper = Mount(id=make(graph, on(loopback("/disk", ro=False), "ext4")).id)
    holder = make(graph, writing(upper, first))
    if free:
        ask(graph, writing(upper, second))
        return
    assert refuse(graph, writing(upper, second), Conflict).fields["holders"] == [f"{holder} (overlay)"]
    graph.get(holder).phase = Phase.RELEASING
    assert plan(writing(upper, second), graph, lambda: 99, answers) == Later(holder)


def test_two_uppers_are_two_places(graph: Graph) -> None:
    for _ in range(2):
        make(graph, writing(Mount(id=make(graph, on(loopback("/disk", ro=False), "ext4")).id)))


# ------------------------------------------------------------------------------------------------ any request


@given(things)
def test_any_plan_is_in_order_and_complete(thing: Object) -> None:
    graph = Graph()
    try:
        planned = ask(graph, thing)
    except Conflict:
        return
    done: set[Key] = set()
    for record in planned.steps:
        assert set(record.edges()) <= done
        done.add(record.key)
    needed = {edge for record in planned.steps for edge in record.edges()}
    assert needed == done - {planned.root.key}
    assert len({record.token for record in planned.steps}) == len(planned.steps)


@given(st.lists(things, max_size=4), st.randoms(use_true_random=False))
def test_any_order_of_deletes_ends_with_nothing(requests: list[Object], random: Random) -> None:
    """References are what says when an object goes: deleting what is free, in any order, takes all of it away."""
    graph = Graph()
    for thing in requests:
        try:
            make(graph, thing)
        except Conflict:
            continue
    while roots := [record.key for record in graph.all() if record.pinned and not graph.holders(record.key)]:
        root = random.choice(roots)
        graph.get(root).pinned = False
        _collect(graph, root)
        _check_references(graph)
    assert graph.all() == []


def _collect(graph: Graph, key: Key) -> None:
    if graph.find(key) is None or graph.held(key):
        return
    edges = graph.get(key).edges()
    graph.remove(key)
    for edge in edges:
        _collect(graph, edge)


def _check_references(graph: Graph) -> None:
    """What the graph computes is what a walk over all records counts."""
    for record in graph.all():
        holders = [other for other in graph.all() if record.key in other.edges()]
        assert graph.refs(record.key) == len(holders) + record.pinned
        assert graph.held(record.key), f"{record.key} is held by nothing and was not collected"
