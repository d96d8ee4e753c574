"""An archive or an image, fetched into memory: a tar is unpacked into a tmpfs of its own, which may be written to; an
image is kept as a file in one, and mounted read-only. Nothing is seen of it before it is whole and checked.

The tmpfs is mounted nowhere until then: a process that dies takes it along. Under an image it never is: the loop device
holds its file, and lets go of all memory with it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from typing import Any

from imageapi.config import Site
from imageapi.drivers import block, mounts, paths
from imageapi.drivers.attach import loopback
from imageapi.drivers.base import LOCAL_STORE
from imageapi.drivers.mounts import MountDriver
from imageapi.drivers.progress import LeftOff
from imageapi.drivers.uri import room
from imageapi.drivers.uri.room import Room
from imageapi.errors import Invalid, Problem, Unsupported
from imageapi.linux import filesystems, kmsg, libc, loop, mount, superblock
from imageapi.linux.mountinfo import Mount
from imageapi.linux.whole import write_all
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Loopback, Uri, without_secrets

log = logging.getLogger(__name__)

IMAGE = "image"
"""The name of an image in its tmpfs, which is mounted nowhere: so this is all of its path."""
FIRST_LOOK = 4096
"""Bytes of an image by which it is known what it is."""
AGAIN = 2
"""How often an address may begin anew that could not go on from where it broke off."""


class Driver(MountDriver):
    """The kind `uri`. `detail["device"]` is the loop device of an image."""

    copies = True

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        definition: Uri = record.definition
        mark, path = site.mark(record.key), site.mountpoint(record.token)
        fs_type = image_type(definition)
        if fs_type:
            _check_kernel(fs_type)
        with ExitStack() as undo, ExitStack() as opened:
            tree = _fetched(definition, mark)
            opened.callback(os.close, tree)
            detail = _show_image(undo, tree, path, mark, fs_type) if fs_type else _show_tree(undo, tree, path)
            detail |= mounts.made(record, site)
            undo.pop_all()
        return Facts(mountpoint=path, detail=detail)

    def release(self, record: AnyRecord, site: Site) -> None:
        mark = site.mark(record.key)
        mounts.release(record, site)
        if not image_type(record.definition):
            mounts.check_gone(f"the mount {record.key}", mark, record.facts.detail.get("dev"))
        elif device := block.find_loop(mark, record.facts.detail.get("device"), only=f"/{IMAGE}"):
            block.detach_loop(device, mark)

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        return mounts.observe(record, site, lambda found: _facts(site.mountpoint(record.token), found))

    def read_only(self, definition: Uri) -> bool:
        return image_type(definition) is not None

    def store(self, definition: Uri) -> str:
        """The first server; for a file its own storage, which may be another host's, too."""
        from urllib.parse import urlsplit

        parts = urlsplit(definition.uri.each()[0])
        local = paths.store(os.path.dirname(parts.path))
        return local if parts.scheme == "file" else parts.hostname or LOCAL_STORE


def image_type(definition: Uri) -> str | None:
    """The type of its file system; None for an archive."""
    return None if definition.format == "tar" else definition.format


def _facts(path: str, found: Mount) -> Facts:
    device = {"device": found.source} if found.source.startswith("/dev/") else {}
    return Facts(mountpoint=path, detail={"dev": found.dev, **device})


def _check_kernel(fs_type: str) -> None:
    if filesystems.needs_device(fs_type) is None:
        raise Unsupported(filesystems.lack(fs_type), path="$.format")


# ---------------------------------------------------------------------------------------------- the fetching


def _fetched(definition: Uri, mark: str) -> int:
    """A tmpfs with the content of the first address that serves it: a descriptor.

    Raises: errors.Problem, when none does; OSError.
    """
    from imageapi.drivers.uri.source import Fetch, Interrupted

    addresses, refused, bounds = definition.uri.each(), dict[int, Problem](), room.room(definition.max_size)
    at, again = 0, AGAIN
    while at < len(addresses):
        fetch = Fetch(addresses, at, definition.sha256, bounds, refused)
        try:
            return _filled(mark, bounds, fetch.pieces(), definition)
        except LeftOff:
            raise
        except Problem as problem:
            refused[fetch.at] = problem
            anew = isinstance(problem, Interrupted) and again > 0
            again -= anew
            at = fetch.at if anew else fetch.at + 1
    raise _none_serves(definition, refused)


def _filled(mark: str, bounds: Room, pieces: Generator[bytes], definition: Uri) -> int:
    """A tmpfs with the content in it. Raises: errors.Problem; OSError."""
    with ExitStack() as undo, closing(pieces):
        tree = room.make(mark, bounds.size)
        undo.callback(os.close, tree)
        try:
            _fill(mark, tree, bounds, pieces, definition)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise bounds.refusal(room.fullness(tree)) from None
        undo.pop_all()
    return tree


def _fill(mark: str, tree: int, bounds: Room, pieces: Generator[bytes], definition: Uri) -> None:
    if fs_type := image_type(definition):
        _keep(tree, bounds, pieces, fs_type)
        return
    from imageapi.drivers.uri.compression import unpacked
    from imageapi.drivers.uri.unpack import unpack

    if left_out := unpack(tree, unpacked(pieces)):
        log.info("%s: %d device nodes of the archive are left out", mark, left_out)


def _keep(tree: int, bounds: Room, pieces: Generator[bytes], fs_type: str) -> None:
    """The image as a file. One that is another's is not fetched to its end."""
    file = os.open(IMAGE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=tree)
    try:
        size = 0
        for piece in pieces:
            write_all(file, piece)
            before, size = size, size + len(piece)
            if before < FIRST_LOOK <= size:
                _check_beginning(file, bounds, fs_type)
        if wrong := superblock.check(file, fs_type):
            raise Invalid(wrong, path="$.format")
    finally:
        os.close(file)


def _check_beginning(file: int, bounds: Room, fs_type: str) -> None:
    found = superblock.identify(file)
    if found is None or found[0] != fs_type:
        raise Invalid(superblock.check(file, fs_type) or f"it holds no {fs_type}", path="$.format")
    bounds.check(found[1])


def _none_serves(definition: Uri, refused: dict[int, Problem]) -> Problem:
    """What went wrong at each address, as one problem."""
    addresses = definition.uri.each()
    told = [f"{without_secrets(addresses[at])}: {problem.message}" for at, problem in sorted(refused.items())]
    types = {type(problem) for problem in refused.values()}
    if len(addresses) == 1:
        fields = refused[0].fields
        place = fields.get("path", "$.uri")
        return types.pop()(told[0], **{**fields, "path": "$.uri" if place == "$.path" else place})
    kind = types.pop() if len(types) == 1 else Invalid
    return kind(f"none of the {len(addresses)} URIs serves it: {'; '.join(told)}", path="$.uri")


# ------------------------------------------------------------------------------------------------- the mount


def _show_tree(undo: ExitStack, tree: int, path: str) -> dict[str, Any]:
    """Mount the tmpfs where it is to be seen; what there is to know of it."""
    mounts.make_directory(undo, path)
    mount.move_mount(tree, "", libc.AT_FDCWD, path, mount.MOVE_MOUNT_F_EMPTY_PATH)
    undo.callback(mount.umount, path)
    return {"staging": room.ATTRIBUTES}


def _show_image(undo: ExitStack, tree: int, path: str, mark: str, fs_type: str) -> dict[str, Any]:
    """Mount the image in the tmpfs; what there is to know of it."""
    device = _attached(tree, mark, undo)
    mounts.make_directory(undo, path)
    _mount(device, path, fs_type)
    undo.callback(mount.umount, path)
    return {"device": device, "staging": mount.MOUNT_ATTR_NOSUID}


def _attached(tree: int, mark: str, undo: ExitStack) -> str:
    """A loop device on the image. Nothing can write to it any more."""
    image = os.open(IMAGE, os.O_RDONLY | os.O_CLOEXEC, dir_fd=tree)
    try:
        device, _ = loopback.attach(image, mark, Loopback(IMAGE, "root", ro=True), read_only=True)
    finally:
        os.close(image)
    undo.callback(loop.detach, device, mark)
    return device


def _mount(device: str, path: str, fs_type: str) -> None:
    try:
        mount.mount(device, path, fs_type, mount.MS_RDONLY | mount.MS_NODEV | mount.MS_NOSUID, "")
    except OSError as error:
        raise _refusal(error, device, fs_type) from None


def _refusal(error: OSError, device: str, fs_type: str) -> Problem:
    """Why the kernel does not mount it: it is asked again, with an ear to what it says."""
    with kmsg.Tail() as log:
        words = mount.explain(fs_type, device, {"ro": None}) or log.about(os.path.basename(device))
    hint = "; run e2fsck on it before it is published" if fs_type == "ext4" else "; make the image again"
    sentence = f"the kernel does not mount it as {fs_type}: {words or error.strerror}{hint}"
    return Invalid(sentence, path="$.format", errno=errno.errorcode.get(error.errno or 0, ""), detail=words)
