"""A writable view over other mounts (the kernel's filesystems/overlayfs.rst); what is written goes when it goes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from imageapi.config import Site
from imageapi.drivers import mounts
from imageapi.drivers.base import LocalDriver
from imageapi.errors import Conflict, Invalid, Problem, Unsupported
from imageapi.linux import filesystems, kmsg, libc, mount
from imageapi.linux.mountinfo import Mount
from imageapi.linux.tree import remove_tree
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Overlay

MAX_STACK_DEPTH = 2
"""FILESYSTEM_MAX_STACK_DEPTH of <linux/fs.h>: an overlay over an overlay is the last that can be."""
MAX_LOWER = 500
"""OVL_MAX_STACK of fs/overlayfs."""


class Driver(LocalDriver):
    """The kind `overlay`. `detail["depth"]` is how many overlays lie on one another here, this one included."""

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        if filesystems.needs_device("overlay") is None:
            raise Unsupported("this kernel has no overlay file system; 'modprobe overlay' must succeed")
        lowers = _check_lowers(inputs)
        with ExitStack() as undo:
            path = mounts.make_directory(undo, site.mountpoint(record.token))
            upper = mounts.make_tree(undo, site.upperdir(record.token))
            work = mounts.make_tree(undo, site.workdir(record.token))
            _look_like(upper, lowers[0])
            _mount(site.mark(record.key), path, lowers, upper, work)
            undo.callback(mount.umount, path)
            detail = {**mounts.made(record, site), "depth": _depth(inputs)}
            undo.pop_all()
        return _facts(record, site, detail)

    def release(self, record: AnyRecord, site: Site) -> None:
        mounts.release(record, site)
        mounts.check_gone(f"the overlay {record.key}", site.mark(record.key), record.facts.detail.get("dev"))
        work = site.workdir(record.token)
        _clear_work(work)
        for path in (site.upperdir(record.token), work):
            _remove(path)

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        return mounts.observe(record, site, lambda found: _facts(record, site, _observed(record, found)))

    def read_only(self, definition: Overlay) -> bool:
        return False


def _facts(record: AnyRecord, site: Site, detail: dict[str, Any]) -> Facts:
    return Facts(
        mountpoint=site.mountpoint(record.token),
        upperdir=site.upperdir(record.token),
        workdir=site.workdir(record.token),
        detail=detail,
    )


def _observed(record: AnyRecord, found: Mount) -> dict[str, Any]:
    return {"dev": found.dev, "depth": record.facts.detail.get("depth", 1)}


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
            f"{inputs[deep].key} is an overlay over an overlay, over which the kernel makes no third; "
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


def _look_like(upper: str, lower: str) -> None:
    """The root directory of an overlay is its upper's: give it the mode and owner of the topmost layer's."""
    found = os.stat(lower)
    os.chown(upper, found.st_uid, found.st_gid)
    os.chmod(upper, found.st_mode & 0o7777)


# -------------------------------------------------------------------------------------------------- the mount


def _mount(source: str, path: str, lowers: list[str], upper: str, work: str) -> None:
    try:
        _mount_either_way(source, path, lowers, upper, work)
    except OSError:
        _mount_again(source, path, lowers, upper, work)


def _mount_again(source: str, path: str, lowers: list[str], upper: str, work: str) -> None:
    """The same, with an ear to what the kernel says of it: listening costs half as much as a mount. The work
    directory is made anew: one that has been tried with `volatile` is refused for that."""
    remove_tree(work)
    os.mkdir(work, 0o755)
    with kmsg.Tail() as log:
        try:
            _mount_either_way(source, path, lowers, upper, work)
        except OSError as error:
            refused = _refusal(error, log.about("overlayfs"))
            if refused is None:
                raise
            raise refused from None


def _mount_either_way(source: str, path: str, lowers: list[str], upper: str, work: str) -> None:
    """By mount(2), which is faster, as long as the options fit in its one page."""
    lowerdir = ":".join(map(_escape, lowers))
    data = f"lowerdir={lowerdir},upperdir={_escape(upper)},workdir={_escape(work)},volatile"
    if len(os.fsencode(data)) < os.sysconf("SC_PAGE_SIZE"):
        mount.mount(source, path, "overlay", 0, data)
    else:
        _mount_layer_by_layer(source, path, lowers, upper, work)


def _escape(path: str) -> str:
    """`path` as overlayfs takes it within its options."""
    return re.sub(r"([\\:,])", r"\\\1", path)


def _mount_layer_by_layer(source: str, path: str, lowers: list[str], upper: str, work: str) -> None:
    """With one `lowerdir+` (Linux 6.7) for each, whose value is taken as it is."""
    context = mount.fsopen("overlay")
    try:
        layers = [("lowerdir+", lower) for lower in lowers]
        places = [("upperdir", _escape(upper)), ("workdir", _escape(work))]
        mount.configure(context, source, [*layers, *places, ("volatile", None)])
        tree = mount.fsmount(context)
    finally:
        os.close(context)
    try:
        mount.move_mount(tree, "", libc.AT_FDCWD, path, mount.MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def _refusal(error: OSError, words: str) -> Problem | None:
    """What the kernel's refusal means, or None when it says all there is to say."""
    words = "; ".join(filter(None, (words, getattr(error, "detail", ""))))
    name = errno.errorcode.get(error.errno or 0, "")
    if "lowerdir+" in words:
        return Unsupported("so many lower mounts need Linux 6.7 or later; give fewer", path="$.lower", detail=words)
    if error.errno == errno.ELOOP:
        sentence = "one of the lower mounts lies within another; leave it out"
        return Invalid(sentence, path="$.lower", errno=name, detail=words)
    if error.errno == errno.EINVAL and words:
        return Invalid(f"the kernel makes no overlay of these: {words}", path="$.lower", errno=name, detail=words)
    return None


# -------------------------------------------------------------------------------------------------- the release


def _clear_work(path: str) -> None:
    """Remove what overlayfs leaves of itself, which is nearly always all there is: so nothing need be searched."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(path, "work/incompat/volatile/dirty"))
        for directory in ("work/incompat/volatile", "work/incompat", "work"):
            os.rmdir(os.path.join(path, directory))


def _remove(path: str) -> None:
    try:
        remove_tree(path)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        sentence = f"something is mounted in {path}, and not by this server; umount it there, and delete again"
        raise Conflict(sentence, holders=[f"mounts in {path}"]) from None
