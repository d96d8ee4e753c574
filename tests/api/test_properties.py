"""Any nest, made for real, any order of deletes: references are right at every step; the kernel ends as it began."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.images import small_image
from lab.server import FOREVER, Server, copy_of_small_image

pytestmark = pytest.mark.api

Json = dict[str, Any]
Key = tuple[str, int]
REFUSED = (409, 422)
"""What the kernel cannot do (a third overlay, the same layer twice) is refused whole."""


def _on(attachment: Json, fs_type: str) -> Json:
    return {"kind": "loopback", "loopback": {"fs_type": fs_type, "mount_options": ["ro"], "loopback": attachment}}


def _file(format: Any) -> Json:
    return _on({"path": str(small_image(format)), "base": "root", "ro": True}, format)


def _bind(mount: Json, ro: bool) -> Json:
    return {"kind": "bind", "bind": {"path": "/data", "base": "mount", "mount": mount, "ro": ro}}


def _overlay(lower: list[Json]) -> Json:
    return {"kind": "overlay", "overlay": {"lower": lower}}


def _within(store: str) -> Json:
    """A squashfs on a file in a directory that is itself a mount."""
    directory = {"kind": "bind", "bind": {"path": store, "base": "root", "ro": True}}
    return _on({"path": "image.sqsh", "base": "mount", "mount": directory, "ro": True}, "squashfs")


def _container(mount: Json, state: str) -> Json:
    return {"mount": mount, "command": FOREVER, "state": state}


def requests(store: str) -> st.SearchStrategy[tuple[str, Json]]:
    """A collection, and what is asked of it."""
    files = st.sampled_from(["squashfs", "erofs", "ext4"]).map(_file)
    mounts = st.recursive(
        files | st.just(_within(store)),
        lambda inner: st.builds(_bind, inner, st.booleans()) | st.lists(inner, min_size=1, max_size=2).map(_overlay),
        max_leaves=4,
    )
    writable = st.lists(files, min_size=1, max_size=2).map(_overlay)
    containers = st.builds(_container, writable, st.sampled_from(["created", "running"]))
    return st.tuples(st.just("mount"), mounts) | st.tuples(st.just("container"), containers)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), order=st.randoms(use_true_random=False))
def test_any_nest_in_any_order(server: Server, tmp_path: Path, data: st.DataObject, order: Random) -> None:
    copy_of_small_image(tmp_path)
    wanted = data.draw(st.lists(requests(str(tmp_path)), min_size=1, max_size=4))
    try:
        _take_away(server, _make(server, wanted), order)
        assert server.everything() == []
        assert os.listdir(server.run_dir / "mounts") == []
    finally:
        server.clear()


def _make(server: Server, wanted: list[tuple[str, Json]]) -> set[Key]:
    """Ask for all of it; what was made has a reference of its own."""
    own: set[Key] = set()
    for collection, body in wanted:
        answer = server.http.post(f"/{collection}", json=body)
        assert answer.status_code == 201 or answer.status_code in REFUSED, answer.text
        if answer.status_code == 201:
            own.add((collection, answer.json()["id"]))
        _check(server, own)
    return own


def _take_away(server: Server, own: set[Key], order: Random) -> None:
    """Delete in any order; what is held by others too is refused, and nothing has changed."""
    while own:
        collection, number = chosen = order.choice(sorted(own))
        force = "?force=true" if collection == "container" else ""
        if server.get(f"/{collection}/{number}")["refs"] > 1:
            server.refused("DELETE", f"/{collection}/{number}{force}", 409)
        else:
            server.delete(f"/{collection}/{number}{force}")
            own.discard(chosen)
        _check(server, own)


def _check(server: Server, own: set[Key]) -> None:
    """The references that are shown are those that a walk over all objects counts."""
    objects: dict[Key, Json] = {
        (collection, one["id"]): one
        for collection in ("container", "mount", "attach")
        for one in server.get(f"/{collection}")
    }
    held: dict[Key, int] = dict.fromkeys(objects, 0)
    for one in objects.values():
        for edge in set(_edges(one)):
            held[edge] += 1
    for key, one in objects.items():
        assert one["refs"] == held[key] + (key in own), (key, one)
        assert "problem" not in one


def _edges(one: Json) -> Iterator[Key]:
    """What an object stands on directly."""
    part = one if "command" in one else one[one["kind"]]
    if "attach" in part:
        yield "attach", part["attach"]["id"]
    for mount in [part["mount"]] if "mount" in part else part.get("lower", []):
        yield "mount", mount["id"]
