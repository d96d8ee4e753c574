"""A view over other mounts (the kernel's filesystems/overlayfs.rst). What is written goes when it goes, or stays in
another mount."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from imageapi.config import Site
from imageapi.drivers import mounts
from imageapi.drivers.audit import DELETE, Host, Wrong
from imageapi.drivers.mounts import MountDriver
from imageapi.drivers.overlayfs import mounting, options, upper
from imageapi.drivers.overlayfs.mounting import Layers
from imageapi.drivers.overlayfs.upper import Upper
from imageapi.errors import Invalid, Unsupported
from imageapi.linux import filesystems, mount
from imageapi.linux.mountinfo import Mount
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Overlay

MAX_STACK_DEPTH = 2
"""FILESYSTEM_MAX_STACK_DEPTH of <linux/fs.h>: an overlay over an overlay is the last that can be."""
MAX_LOWER = 500
"""OVL_MAX_STACK of fs/overlayfs."""


class Driver(MountDriver):
    """The kind `overlay`. `detail["depth"]` is how many overlays lie on one another here, this one included."""

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        if filesystems.needs_device("overlay") is None:
            raise Unsupported(filesystems.lack("overlay"))
        definition: Overlay = record.definition
        lowers = _check_lowers(inputs[: len(definition.lower)])
        with ExitStack() as undo, ExitStack() as opened:
            path = mounts.make_directory(undo, site.mountpoint(record.token))
            layers = _layers(undo, opened, record, lowers, inputs[len(lowers) :], site)
            mounting.make(site.mark(record.key), path, layers)
            undo.callback(mount.umount, path)
            detail = {**mounts.made(record, site), "depth": _depth(inputs), "staging": mounting.ATTRIBUTES}
            _check_options(record, site)
            undo.pop_all()
        return _facts(path, None if definition.ro else layers.upper, detail)

    def release(self, record: AnyRecord, site: Site) -> None:
        definition: Overlay = record.definition
        written = _upper(record, site)
        mounts.release(record, site)
        mounts.check_gone(f"the overlay {record.key}", site.mark(record.key), record.facts.detail.get("dev"))
        if definition.upper is None:
            upper.remove(_own(record, site))
        elif written is not None and options.is_volatile(definition):
            upper.settle(written.work)

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        return mounts.observe(record, site, lambda found: _observed(record, site, found))

    def audit(self, record: AnyRecord, site: Site, host: Host) -> Wrong | None:
        """The directories of its own are this host's: in another mount nobody looks for them, who might wait there."""
        definition: Overlay = record.definition
        wrong = super().audit(record, site, host)
        if wrong is not None or definition.ro or definition.upper is not None:
            return wrong
        missing = [path for path in _own(record, site) if not os.path.isdir(path)]
        if not missing:
            return None
        lost = f"{missing[0]} was removed by somebody, and what was written is lost"
        return Wrong(f"{lost}: delete this, and make it again", DELETE, f"has lost {missing[0]}")


def _facts(path: str, written: Upper | None, detail: dict[str, Any]) -> Facts:
    upperdir, workdir = written or (None, None)
    return Facts(mountpoint=path, upperdir=upperdir, workdir=workdir, detail=detail)


def _observed(record: AnyRecord, site: Site, found: Mount) -> Facts:
    detail = {"dev": found.dev, "depth": record.facts.detail.get("depth", 1)}
    return _facts(site.mountpoint(record.token), _upper(record, site), detail)


# ------------------------------------------------------------------------------------------------- its layers


def _layers(
    undo: ExitStack, opened: ExitStack, record: AnyRecord, lowers: list[str], above: Sequence[AnyRecord], site: Site
) -> Layers:
    """What to mount, the directories for the writes being there. The kernel wants two lowers where nothing is
    written: an empty directory is the second."""
    definition: Overlay = record.definition
    asked = options.of(definition)
    if definition.ro:
        empty = [mounts.make_tree(undo, site.upperdir(record.token))] if len(lowers) == 1 else []
        return Layers([*lowers, *empty], None, asked)
    if not above:
        return Layers(lowers, upper.make(undo, _own(record, site), lowers[0]), asked)
    return Layers(lowers, upper.inside(undo, opened, definition, above[0], lowers), asked)


def _own(record: AnyRecord, site: Site) -> Upper:
    return Upper(site.upperdir(record.token), site.workdir(record.token))


def _upper(record: AnyRecord, site: Site) -> Upper | None:
    """Where the overlay writes, as far as that is known: a crash may have come before it was written down."""
    definition, facts = record.definition, record.facts
    if definition.ro:
        return None
    if definition.upper is None:
        return _own(record, site)
    if facts.upperdir is not None and facts.workdir is not None:
        return Upper(facts.upperdir, facts.workdir)
    found = mounts.find(record, site)
    return None if found is None else upper.shown(found)


def _check_options(record: AnyRecord, site: Site) -> None:
    """Mostly nobody asks for any, and then nothing is read."""
    if record.definition.options and (found := mounts.find(record, site)):
        options.check_taken(record.definition, found)


# --------------------------------------------------------------------------------------------- before the mount


def _depth(inputs: Sequence[AnyRecord]) -> int:
    return 1 + max(int(each.facts.detail.get("depth", 0)) for each in inputs)


def _check_lowers(inputs: Sequence[AnyRecord]) -> list[str]:
    """The directories of the layers, topmost first.

    Raises: errors.Invalid for what overlayfs refuses without a word.
    """
    if len(inputs) > MAX_LOWER:
        raise Invalid(f"{len(inputs)} lower mounts are more than the {MAX_LOWER} that can be", path="$.lower")
    if _depth(inputs) > MAX_STACK_DEPTH:
        deep = next(at for at, each in enumerate(inputs) if each.facts.detail.get("depth", 0) >= MAX_STACK_DEPTH)
        raise Invalid(
            f"{inputs[deep].key} is an overlay over an overlay, and the kernel stacks no more than {MAX_STACK_DEPTH}; "
            "give its own lower mounts instead",
            path=f"$.lower[{deep}]",
        )
    _check_distinct(inputs)
    return [_directory(each, at) for at, each in enumerate(inputs)]


def _directory(record: AnyRecord, at: int) -> str:
    if record.facts.mountpoint is None:
        raise Invalid(f"{record.key} is not mounted", path=f"$.lower[{at}]")
    return record.facts.mountpoint


def _check_distinct(inputs: Sequence[AnyRecord]) -> None:
    seen: dict[tuple[int, int], AnyRecord] = {}
    for at, each in enumerate(inputs):
        found = os.stat(_directory(each, at))
        place = found.st_dev, found.st_ino
        if place in seen:
            raise Invalid(
                f"{each.key} is the same directory as {seen[place].key}, and a layer can be there only once: leave "
                "one out",
                path=f"$.lower[{at}]",
            )
        seen[place] = each
