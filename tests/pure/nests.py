"""Any request a user could make, for property tests; and drivers that answer the planner's questions about kinds."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from imageapi import spec
from imageapi.drivers.base import LocalDriver
from imageapi.spec import Attach, Attachment, Bind, Container, Local, Loopback, Mount, Overlay, Rbd, RbdOptions


class KindAnswers(LocalDriver):
    """What the planner asks of a kind, and nothing else: no verb is ever called by it."""

    acquire = release = observe = None

    def identities(self, definition: Any) -> frozenset[object]:
        if isinstance(definition, Rbd):
            image = definition.pool, definition.image, definition.snapshot
            return frozenset((monitor, *image) for monitor in definition.monitors)
        return frozenset()

    def read_only(self, definition: Any) -> bool:
        if isinstance(definition, Rbd):
            return definition.options.ro or definition.snapshot is not None
        return super().read_only(definition)

    def forced(self, definition: Any) -> bool:
        return isinstance(definition, Rbd) and definition.options.force


def answers(collection: str, kind: str) -> Any:
    return KindAnswers()


def rbd(image: str = "image", *, ro: bool = True, force: bool = False) -> Attachment:
    return Attachment(
        kind="rbd",
        rbd=Rbd(monitors=["127.0.0.1"], pool="rbd", image=image, options=RbdOptions(ro=ro, force=force)),
    )


def on(attachment: Attachment, fs_type: str = "squashfs") -> Mount:
    return Mount(kind="attach", attach=Attach(attach=attachment, fs_type=fs_type))


def overlay(*lower: Mount) -> Mount:
    return Mount(kind="overlay", overlay=Overlay(lower=list(lower)))


def container(mount: Mount, name: str | None = None) -> Container:
    return Container(mount=mount, command="/bin/true", name=name)


def loopback(path: str, mount: Mount | None = None, *, ro: bool = True) -> Attachment:
    base: Any = "mount" if mount else "root"
    return Attachment(kind="loopback", loopback=Loopback(path=path, base=base, mount=mount, ro=ro))


def attachments(mounts: st.SearchStrategy[Mount]) -> st.SearchStrategy[Attachment]:
    """Few images, so that requests meet on the same ones."""
    return st.one_of(
        st.builds(rbd, st.sampled_from(["a", "b"]), ro=st.booleans()),
        st.builds(loopback, st.sampled_from(["/a", "/b"]), ro=st.booleans()),
        st.builds(loopback, st.sampled_from(["/a", "/b"]), mounts),
        st.builds(lambda path: Attachment(kind="local", local=Local(path=path)), st.just("/dev/null")),
    )


def _deeper(mounts: st.SearchStrategy[Mount]) -> st.SearchStrategy[Mount]:
    return st.one_of(
        st.builds(on, attachments(mounts)),
        st.lists(mounts, min_size=1, max_size=3).map(lambda lower: overlay(*lower)),
        st.builds(lambda mount: Mount(kind="bind", bind=Bind(path="/", base="mount", mount=mount)), mounts),
    )


bind_root = st.just(Mount(kind="bind", bind=Bind(path="/srv", base="root")))
mounts: st.SearchStrategy[Mount] = st.recursive(bind_root, _deeper, max_leaves=6)
things: st.SearchStrategy[spec.Object] = st.one_of(mounts, attachments(mounts), st.builds(container, mounts))
