"""open-iscsi's records as we write them, in a place of the test's own."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import msgspec
import pytest

from imageapi import errors
from imageapi.config import Site
from imageapi.drivers.attach.iscsi import check
from imageapi.drivers.deadline import Deadline
from imageapi.drivers.iscsi import database, kernel, portals
from imageapi.drivers.iscsi.portals import Portal
from imageapi.records import Key
from imageapi.spec import Chap, Iscsi, Secret

pytestmark = pytest.mark.pure

NAME = database.mark(Site(instance="0123abcd"), Key("attach", 3))
PORTAL = Portal("10.0.0.1", 3260, 2)
CHAP = Chap("node", Secret("s3cret"), "storage", Secret("pr00f"))
WHAT = Iscsi(initiator="iqn.a:me", target="iqn.b:it", host="h", chap=CHAP, max_comands=64, queue_depth=8)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(database, "PLACES", (str(tmp_path / "nowhere"), str(tmp_path)))
    return tmp_path


def files(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def test_the_records_are_there_while_they_are_needed_and_for_root_alone(place: Path) -> None:
    with database.node(NAME, WHAT, PORTAL):
        interface, node = files(place)
        assert (interface, node) == (f"ifaces/{NAME}", f"nodes/iqn.b:it/10.0.0.1,3260,2/{NAME}")
        assert {(place / name).stat().st_mode & 0o777 for name in (interface, node)} == {0o600}
        assert "s3cret" not in (place / interface).read_text()
        said = dict(line.split(" = ") for line in (place / node).read_text().splitlines())
        assert database.left(NAME)
    assert (files(place), [*(place / "nodes").iterdir()], database.left(NAME)) == ([], [], False)
    assert said["iface.iscsi_ifacename"] == NAME == "imageapi-0123abcd-attach-3"
    assert (said["iface.initiatorname"], said["node.session.scan"]) == ("iqn.a:me", "manual")
    assert (said["node.session.cmds_max"], said["node.session.queue_depth"]) == ("64", "8")
    assert (said["node.session.auth.password"], said["node.session.auth.password_in"]) == ("s3cret", "pr00f")
    assert (said["node.session.auth.username"], said["node.session.auth.username_in"]) == ("node", "storage")


def test_what_a_death_leaves_is_forgotten_and_nothing_else(place: Path) -> None:
    with database.node("another", WHAT, PORTAL):
        died = database.node(NAME, WHAT, PORTAL)
        died.__enter__()
        assert database.marked("imageapi-0123abcd-") == [NAME]
        database.forget(NAME)
        assert files(place) == ["ifaces/another", "nodes/iqn.b:it/10.0.0.1,3260,2/another"]
        database.forget(NAME)


def test_without_chap_none_is_offered() -> None:
    said = database.fields(NAME, Iscsi(initiator="i", target="t", host="h"), PORTAL)
    assert said["node.session.auth.authmethod"] == "None"
    assert not any("password" in name for name in said)


def test_a_place_that_cannot_be_written_is_named(place: Path) -> None:
    (place / "ifaces").write_text("in the way")
    with pytest.raises(errors.Unsupported, match=f"{place}, which cannot be written"), database.interface(NAME):
        pass


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (20, errors.Unsupported, "systemctl start iscsid"),
        (18, errors.Unsupported, "systemctl start iscsid"),
        (24, errors.Invalid, "refuses user 'node'"),
        (8, errors.TimedOut, "does not answer iscsid"),
        (6, errors.Problem, "see its log"),
    ],
)
def test_the_end_of_iscsiadm_in_the_users_terms(code: int, kind: type[errors.Problem], words: str) -> None:
    problem = kernel.explain(code, "what it said", WHAT)
    assert (type(problem), words in problem.message) == (kind, True)


def test_a_secret_without_its_interface_is_found_and_removed_though_the_sessions_stay(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release has removed the interface and died, or its logout has failed, once before."""
    died = database.node(NAME, WHAT, PORTAL)
    died.__enter__()
    (place / "ifaces" / NAME).unlink()
    assert database.left(NAME)

    def failing(*_: object) -> None:
        raise errors.TimedOut("iscsid does not answer")

    monkeypatch.setattr(kernel, "_log_out", failing)
    with pytest.raises(errors.TimedOut):
        kernel._end(Key("attach", 3), Site(instance="0123abcd"))
    assert (files(place), database.left(NAME)) == ([], False)


@pytest.mark.parametrize("name", ["iqn.b/../../x", "..", "a b", "iqn.b\nnode.startup = automatic", "i" * 224])
@pytest.mark.parametrize("field", ["target", "initiator"])
def test_what_is_no_name_of_iscsi_is_refused(field: str, name: str) -> None:
    with pytest.raises(errors.Invalid) as refusal:
        check(msgspec.structs.replace(WHAT, **{field: name}))
    assert refusal.value.fields["path"] == f"$.{field}"


@pytest.mark.parametrize("field", ["user", "mutual_user"])
def test_a_line_break_is_no_part_of_an_account(field: str) -> None:
    with pytest.raises(errors.Invalid) as refusal:
        check(msgspec.structs.replace(WHAT, chap=msgspec.structs.replace(CHAP, **{field: "a\nb = c"})))
    assert refusal.value.fields["path"] == f"$.chap.{field}"
    check(WHAT)


def test_portals_that_cannot_be_reached_do_not_keep_an_attachment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target names its portals in networks that this host is not in, too."""
    tried: list[str] = []

    def run(_: object, deadline: Deadline, *words: str) -> None:
        tried.append(words[words.index("--portal") + 1])
        if len(tried) > 1:
            raise errors.TimedOut("it does not answer")

    monkeypatch.setattr(kernel, "_run", run)
    monkeypatch.setattr(portals, "PROBE_TIMEOUT", 0.2)
    with contextlib.ExitStack() as opened:
        servers = [opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0)) for _ in range(3)]
        known, away, full = (Portal("127.0.0.1", server.getsockname()[1], 1) for server in servers)
        servers[1].close()
        for _ in range(4):  # more than wait to be accepted: it answers nobody else
            client = opened.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full[:2])
        kernel._log_in(NAME, WHAT, [PORTAL, away, full, known], Deadline(20))
        assert tried == [f"{PORTAL},2", f"{known},1"]
        tried.clear()
        kernel._log_in(NAME, WHAT, [PORTAL, known], Deadline(kernel.FOR_OTHERS / 2))
    assert tried == [f"{PORTAL},2"]


def test_a_time_that_has_passed_is_a_time_out() -> None:
    with pytest.raises(TimeoutError) as late:
        Deadline(-1).left()
    assert isinstance(errors.from_oserror(late.value, "acquire"), errors.TimedOut)
