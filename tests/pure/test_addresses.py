"""The URIs of a mount: which are taken, and what of them is never shown."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest

from imageapi import records, spec
from imageapi.api import dialects, rules, views
from imageapi.engine.graph import Graph
from imageapi.errors import Invalid
from imageapi.records import Record
from imageapi.spec import MASK, Addresses, Mount, Uri

pytestmark = pytest.mark.pure

SIGNED = "https://me:dear@images.example:8443/a%20b/c.tar?X-Amz-Signature=dear&x=1"
SHOWN = f"https://{MASK}@images.example:8443/a%20b/c.tar?{MASK}"


def asked(uri: Any, **more: Any) -> Any:
    return dialects.read("mount", {"uri": uri, **more}, "uri").thing


def refused(uri: Any) -> Invalid:
    with pytest.raises(Invalid) as refusal:
        asked(uri)
    assert "dear" not in str(refusal.value.to_dict())
    return refusal.value


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (SIGNED, SHOWN),
        ("https://h/a", "https://h/a"),
        ("http://user@h", f"http://{MASK}@h"),
        ("http://h/a@b:c", "http://h/a@b:c"),
        ("http://h?dear", f"http://h?{MASK}"),
        ("http://h/a#dear", f"http://h/a?{MASK}"),
        ("file:///a%20b", "file:///a%20b"),
        ("http://a@dear@h/", f"http://{MASK}@h/"),
        ("dear", MASK),
    ],
)
def test_what_may_be_secret_is_not_shown(uri: str, shown: str) -> None:
    assert spec.without_secrets(uri) == shown


@pytest.mark.parametrize("uri", [SIGNED, [SIGNED, "https://h/a"]])
def test_no_way_of_showing_a_mount_shows_it(uri: str | list[str], caplog: pytest.LogCaptureFixture) -> None:
    graph = Graph()
    record = Record(id=0, spec=asked(uri), token=1, phase=records.Phase.LIVE)
    graph.add(record)
    picture = graph.picture(record.key)
    logging.getLogger().error("%s", record)
    told = [views.encode(views.whole(picture)).decode(), repr(record), str(record.spec), caplog.text]
    assert not any("dear" in text for text in told)
    expected = SHOWN if isinstance(uri, str) else [SHOWN, "https://h/a"]
    assert views.flat(picture, "uri")["uri"] == expected


@pytest.mark.parametrize("uri", [SIGNED, [SIGNED], [SIGNED, "http://h/a"]])
def test_the_store_and_the_worker_get_it_whole(uri: str | list[str]) -> None:
    record = Record(id=0, spec=asked(uri), token=1)
    stored = records.decode("mount", records.encode(record))
    assert stored.definition.uri.reveal() == uri
    assert stored.spec == record.spec
    assert record.definition.uri.each() == ([uri] if isinstance(uri, str) else uri)


def test_equal_is_what_is_equal_in_its_secrets_too() -> None:
    other = SIGNED.replace("dear", "cheap")
    assert asked(SIGNED) == asked(SIGNED) != asked(other)
    assert hash(Addresses([SIGNED])) == hash(Addresses([SIGNED]))
    assert asked([SIGNED]) != asked(SIGNED)


TAKEN = ["https://h", "http://h:80/", "https://[::1]:8443/a?b", "file:///a", "file://localhost/a", "https://h/ü",
         "https://u:p%2F@h/?a=b/c?d", ["https://h/a"], ["https://h/a", "file:///a"]]  # fmt: skip


@pytest.mark.parametrize("uri", TAKEN)
def test_what_is_taken(uri: Any) -> None:
    assert asked(uri).uri.uri.reveal() == uri


FORM = "give https://host/path"
REFUSED: list[tuple[Any, str, str]] = [
    ("dear", "$.uri", FORM),
    ("", "$.uri", FORM),
    ("s3://dear/x", "$.uri", FORM),
    ("ftp://h/dear", "$.uri", FORM),
    ("HTTPS://h/dear", "$.uri", FORM),
    ("https:///dear", "$.uri", FORM),
    ("https://h/a b?dear", "$.uri", FORM),
    ("https://h/a\n?dear", "$.uri", FORM),
    ("https://h\\dear/", "$.uri", FORM),
    ("https://h:dear/", "$.uri", FORM),
    ("https://u:de/ar@h:x/", "$.uri", FORM),
    ("https://u:de\uff1aar@h/", "$.uri", FORM),
    ("https://u:dear@h:70000/", "$.uri", FORM),
    ("https://u:dear@[1:2]/", "$.uri", FORM),
    ("https://h/a#dear", "$.uri", "a # is %23"),
    ("https://h/a\0dear", "$.uri", FORM),
    ("file://host/dear", "$.uri", FORM),
    ("file:/dear", "$.uri", FORM),
    ("file:///dear%00", "$.uri", FORM),
    ("file:///a?dear", "$.uri", "write a ? in its name as %3F"),
    (["https://h/a", "dear"], "$.uri[1]", FORM),
    ([], "$.uri", "give 1 to 16 URIs"),
    (["https://h/a"] * 17, "$.uri", "give 1 to 16 URIs"),
    ("https://h/" + "a" * 9000, "$.uri", "longer than 8192"),
    (SHOWN, "$.uri", "the mask that answers show; give the whole URI, or refer to the mount by id"),
    (["https://h/a", SHOWN], "$.uri[1]", "the mask"),
    (7, "$.uri", "this must be a URI, or an array of URIs"),
    ([7], "$.uri", "this must be a URI, or an array of URIs"),
    ({"a": "dear"}, "$.uri", "this must be a URI, or an array of URIs"),
]  # fmt: skip


@pytest.mark.parametrize(("uri", "path", "words"), REFUSED)
def test_what_is_refused_is_not_repeated(uri: Any, path: str, words: str) -> None:
    problem = refused(uri)
    assert (problem.fields["path"], words in problem.message) == (path, True), problem


def test_null_is_the_field_left_out() -> None:
    assert "'uri' is missing" in refused(None).message


def test_it_is_found_where_the_client_has_it() -> None:
    body = {"mount": {"kind": "overlay", "overlay": {"lower": [{"kind": "uri", "uri": {"uri": ["dear"]}}]}}}
    with pytest.raises(Invalid) as refusal:
        dialects.read("container", {**body, "command": "/x"})
    assert refusal.value.fields["path"] == "$.mount.overlay.lower[0].uri.uri[0]"


def test_the_vocabulary_has_no_third_way_of_showing() -> None:
    uri = Mount(kind="uri", uri=Uri(uri=Addresses(SIGNED)))
    assert msgspec.json.encode(uri, enc_hook=spec.masking_hook).count(b"dear") == 0
    with pytest.raises(TypeError):
        msgspec.json.encode(uri)
    assert rules.MOST_ADDRESSES == 16
