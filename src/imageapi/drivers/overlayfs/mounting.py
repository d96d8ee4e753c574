"""The mount of an overlay, and what the kernel's refusal of one means."""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from imageapi.drivers.overlayfs import upper
from imageapi.drivers.overlayfs.options import Options
from imageapi.drivers.overlayfs.upper import Upper
from imageapi.errors import Conflict, Invalid, Problem, Unsupported
from imageapi.linux import kmsg, libc, mount

FLAGS = mount.MS_NODEV | mount.MS_NOSUID
ATTRIBUTES = mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOSUID
"""What is taken away in the place where the host's users see it: the same, as mount(2) and as fsmount(2) call it."""


class Layers(NamedTuple):
    """What an overlay is mounted of: directories, the topmost first, and where the writes go; None for nowhere."""

    lowers: list[str]
    upper: Upper | None
    options: Options


def make(source: str, path: str, layers: Layers) -> None:
    """Mount the overlay at `path`.

    Raises: errors.Problem; OSError for what says all there is to say.
    """
    try:
        _mount_either_way(source, path, layers)
    except OSError:
        _mount_again(source, path, layers)


def _mount_again(source: str, path: str, layers: Layers) -> None:
    """The same, with an ear to what the kernel says of it: listening costs half as much as a mount. An upper that has
    been tried with `volatile` is refused for that."""
    if layers.upper is not None and ("volatile", None) in layers.options:
        upper.clear_marker(layers.upper.work)
    with kmsg.Tail() as log:
        try:
            _mount_either_way(source, path, layers)
        except OSError as error:
            refused = _refusal(error, layers, log.about("overlayfs:", "overlay:"))
            if refused is None:
                raise
            raise refused from None


def _mount_either_way(source: str, path: str, layers: Layers) -> None:
    """By mount(2), which is faster, as long as the options fit in its one page."""
    places = [(name, _escape(place)) for name, place in _writable(layers)]
    pairs = [("lowerdir", ":".join(map(_escape, layers.lowers))), *places, *layers.options]
    data = ",".join(name if value is None else f"{name}={value}" for name, value in pairs)
    if len(os.fsencode(data)) < os.sysconf("SC_PAGE_SIZE"):
        mount.mount(source, path, "overlay", FLAGS | mount.MS_RDONLY * (layers.upper is None), data)
    else:
        _mount_layer_by_layer(source, path, layers, places)


def _writable(layers: Layers) -> list[tuple[str, str]]:
    return [] if layers.upper is None else [("upperdir", layers.upper.upper), ("workdir", layers.upper.work)]


def _escape(path: str) -> str:
    """`path` as overlayfs takes it within its options."""
    return re.sub(r"([\\:,])", r"\\\1", path)


def _mount_layer_by_layer(source: str, path: str, layers: Layers, places: list[tuple[str, str]]) -> None:
    """With one `lowerdir+` (Linux 6.7) for each, whose value is taken as it is."""
    context = mount.fsopen("overlay")
    try:
        lowers: Options = [("lowerdir+", lower) for lower in layers.lowers]
        mount.configure(context, source, [*lowers, *places, *layers.options])
        tree = mount.fsmount(context, ATTRIBUTES | mount.MOUNT_ATTR_RDONLY * (layers.upper is None))
    finally:
        os.close(context)
    try:
        mount.move_mount(tree, "", libc.AT_FDCWD, path, mount.MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


# ---------------------------------------------------------------------------------------------------- refusals


def _refusal(error: OSError, layers: Layers, words: str) -> Problem | None:
    """What the kernel's refusal means, or None when it says all there is to say."""
    words = "; ".join(filter(None, (words, getattr(error, "detail", ""))))
    fields = {"errno": errno.errorcode.get(error.errno or 0, ""), "detail": words}
    if "lowerdir+" in words or "Cumulative options too large" in words:  # the latter is said below Linux 6.5
        return Unsupported("so many lower mounts need Linux 6.7 or later; give fewer", path="$.lower", **fields)
    if found := re.search(r"filesystem on '?(.+?)'? not supported|upper fs missing required features", words):
        return _unsuitable(found[1], layers, fields)
    match error.errno:
        case errno.ELOOP:
            sentence = "one of the mounts lies within another; leave it out"
            return Invalid(sentence, path="$.upper" if "upperdir" in words else "$.lower", **fields)
        case errno.EBUSY:
            return Conflict(f"another overlay on this host uses the upper: {words}", path="$.upper", **fields)
        case errno.ESTALE:
            sentence = "the upper was first used over other lowers, and 'index' holds on to those; use them, another "
            return Invalid(f"{sentence}upper_path, or set index to false", path="$.upper", **fields)
        case errno.EINVAL if words:
            return Invalid(f"the kernel makes no overlay of these: {words}", path=_about(words), **fields)
    return None


def _unsuitable(place: str | None, layers: Layers, fields: dict[str, str]) -> Problem:
    """The refusal of a file system: names in it must be what they are, byte for byte, and nobody else may write it."""
    if place in layers.lowers:
        sentence = "the kernel makes no overlay over this file system; copy what is on it to another"
        return Invalid(sentence, path=f"$.lower[{layers.lowers.index(place)}]", **fields)
    sentence = "the kernel writes to no upper on this file system: use ext4, xfs, btrfs or tmpfs (in NFS, an image of "
    return Invalid(f"{sentence}one, attached as loopback)", path="$.upper", **fields)


def _about(words: str) -> str:
    """The field that the kernel speaks of."""
    if "option" in words:
        return "$.options"
    return "$.upper" if "upper" in words else "$.lower"
