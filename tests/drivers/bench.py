"""Acquires what a test needs, and releases it again in reverse; and every local kind as a recipe."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from imageapi import records
from imageapi.config import Site
from imageapi.drivers.base import Driver, driver
from imageapi.linux import loop, mountinfo
from imageapi.records import AnyRecord, Facts, Record
from imageapi.spec import (
    Addresses,
    Attach,
    Attachment,
    Bind,
    Local,
    Loopback,
    Mount,
    Overlay,
    OverlayOptions,
    Tmpfs,
    Uri,
)
from lab import images
from lab.archives import Member, archive
from tools.images import Format


class Trace(NamedTuple):
    """What of a site stands: mounts, loop devices, directories."""

    mounts: frozenset[tuple[str, str]]
    loops: frozenset[str]
    directories: frozenset[str]


def traces(site: Site) -> Trace:
    mounts = [each for each in mountinfo.read() if each.mountpoint.startswith(os.path.realpath(site.run_dir))]
    return Trace(
        frozenset((each.mountpoint, each.dev) for each in mounts),
        frozenset(loop.marked(site.mark_prefix)),
        frozenset(os.listdir(site.mounts_dir)),
    )


class Made(NamedTuple):
    """A record that is not acquired yet, and the live ones it stands on."""

    record: AnyRecord
    inputs: list[AnyRecord]


class Bench:
    """One test's objects."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._numbers = itertools.count()
        self._acquired: list[AnyRecord] = []

    def plan(self, spec: Any, *inputs: AnyRecord) -> Made:
        number = next(self._numbers)
        return Made(Record(id=number, spec=spec, token=number), list(inputs))

    def acquire(self, made: Made) -> AnyRecord:
        """The record with its facts. What is acquired is released when the test ends."""
        made.record.facts = self.driver(made.record).acquire(made.record, made.inputs, self.site)
        self._acquired.append(made.record)
        return made.record

    def driver(self, record: AnyRecord) -> Driver:
        return driver(record.key.collection, record.kind)

    def release(self, record: AnyRecord) -> None:
        self.driver(record).release(record, self.site)

    def observe(self, record: AnyRecord) -> Facts | None:
        return self.driver(record).observe(record, self.site)

    def release_all(self) -> None:
        while self._acquired:
            self.release(self._acquired.pop())

    # ------------------------------------------------------------------------------------------ the kinds

    def loopback(self, format: Format = "squashfs", **options: Any) -> Made:
        options = {"path": str(images.small_image(format)), "base": "root", "ro": True, **options}
        return self.plan(Attachment(kind="loopback", loopback=Loopback(**options)))

    def loopback_inside(self, mount: AnyRecord, path: str, **options: Any) -> Made:
        definition = Loopback(path, "mount", Mount(id=mount.id), **options)
        return self.plan(Attachment(kind="loopback", loopback=definition), mount)

    def local(self, path: str, **options: Any) -> Made:
        return self.plan(Attachment(kind="local", local=Local(path, **options)))

    def attach(
        self, on: AnyRecord, fs_type: str = "squashfs", options: list[str] | None = None, partition: int | None = None
    ) -> Made:
        definition = Attach(Attachment(id=on.id), fs_type, options or [], partition)
        return self.plan(Mount(kind="attach", attach=definition), on)

    def overlay(self, *lower: AnyRecord, upper: AnyRecord | None = None, **options: Any) -> Made:
        """`options` are fields of the overlay's definition, or of its options."""
        inputs = [*lower, *([upper] if upper else [])]
        *lowers, last = (Mount(id=each.id) for each in inputs)
        asked = {name: options.pop(name) for name in OverlayOptions.__struct_fields__ if name in options}
        definition = Overlay(
            lowers if upper else [*lowers, last], last if upper else None, options=OverlayOptions(**asked), **options
        )
        return self.plan(Mount(kind="overlay", overlay=definition), *inputs)

    def tmpfs(self, size: str = "16M") -> Made:
        return self.plan(Mount(kind="tmpfs", tmpfs=Tmpfs(size)))

    def bind(self, path: str, **options: Any) -> Made:
        return self.plan(Mount(kind="bind", bind=Bind(path, "root", **options)))

    def bind_inside(self, mount: AnyRecord, path: str, **options: Any) -> Made:
        return self.plan(Mount(kind="bind", bind=Bind(path, "mount", Mount(id=mount.id), **options)), mount)

    def uri(self, uri: str | list[str], **options: Any) -> Made:
        return self.plan(Mount(kind="uri", uri=Uri(Addresses(uri), **options)))

    # ---------------------------------------------------------------------------- what stands, in one word

    def mounted(self, format: Format = "squashfs") -> AnyRecord:
        """The small image, mounted read-only."""
        return self.acquire(self.attach(self.acquire(self.loopback(format)), format))

    def disk(self, fs_type: str = "ext4") -> AnyRecord:
        """A disk of this test's own, mounted to be written."""
        image = Path(f"{self.site.run_dir}/disk-{next(self._numbers)}")
        if fs_type == "ext4":
            shutil.copyfile(images.small_image("ext4"), image)
        else:
            images.formatted(image, fs_type, "300M")
        return self.acquire(self.attach(self.acquire(self.loopback(path=str(image), ro=False)), fs_type))

    def layered(self, *below: AnyRecord) -> AnyRecord:
        """An overlay over these, or over the small image."""
        return self.acquire(self.overlay(*(below or (self.mounted(),))))


@contextmanager
def bench_on(site: Site) -> Iterator[Bench]:
    bench = Bench(site)
    try:
        yield bench
    finally:
        bench.release_all()


def _loopback_in_a_mount(bench: Bench) -> Made:
    layered = bench.layered()
    assert layered.facts.mountpoint is not None
    with open(f"{layered.facts.mountpoint}/inner", "wb") as file:
        file.write(images.small_image("erofs").read_bytes())
    return bench.loopback_inside(layered, "/inner")


def _local(bench: Bench) -> Made:
    device = bench.acquire(bench.loopback()).facts.device_file
    assert device is not None
    return bench.local(device)


def _bind_recursively(bench: Bench) -> Made:
    directory = f"{bench.site.run_dir}/source"
    os.mkdir(directory)
    return bench.bind(directory, recursive=True)


def _uri_tar(bench: Bench) -> Made:
    file = f"{bench.site.run_dir}/small.tar.gz"
    with open(file, "wb") as written:
        written.write(archive(Member("etc/hello", b"hello\n"), Member("hello", link="etc/hello"), compression="gz"))
    return bench.uri(f"file://{file}")


KINDS: dict[str, Callable[[Bench], Made]] = {
    "loopback": lambda bench: bench.loopback(),
    "loopback, writable": lambda bench: bench.loopback("ext4", ro=False),
    "loopback in a mount": _loopback_in_a_mount,
    "local": _local,
    "attach squashfs": lambda bench: bench.attach(bench.acquire(bench.loopback())),
    "attach erofs": lambda bench: bench.attach(bench.acquire(bench.loopback("erofs")), "erofs"),
    "attach ext4": lambda bench: bench.attach(bench.acquire(bench.loopback("ext4", ro=False)), "ext4"),
    "overlay": lambda bench: bench.overlay(bench.mounted()),
    "overlay of two": lambda bench: bench.overlay(bench.mounted(), bench.mounted("erofs")),
    "overlay over an overlay": lambda bench: bench.overlay(bench.layered()),
    "overlay, read-only": lambda bench: bench.overlay(bench.mounted(), bench.mounted("erofs"), ro=True),
    "overlay of one, read-only": lambda bench: bench.overlay(bench.mounted(), ro=True),
    "overlay on a disk": lambda bench: bench.overlay(
        bench.mounted(), upper=bench.disk(), upper_path="/a/b", volatile=True
    ),
    "tmpfs": lambda bench: bench.tmpfs(),
    "bind": lambda bench: bench.bind("/etc", ro=True),
    "bind in a mount": lambda bench: bench.bind_inside(bench.layered(), "/data"),
    "bind, recursive": _bind_recursively,
    "uri tar": _uri_tar,
    "uri squashfs": lambda bench: bench.uri(f"file://{images.small_image()}", format="squashfs"),
}
"""Every local kind, in every form whose acquire goes another way."""


def stored(record: AnyRecord) -> AnyRecord:
    """The record as another process reads it from the state directory."""
    return records.decode(record.key.collection, records.encode(record))


def place(record: AnyRecord) -> Path:
    """Where a mount is seen."""
    assert record.facts.mountpoint is not None
    return Path(record.facts.mountpoint)


def standing(record: AnyRecord) -> mountinfo.Mount:
    """A mount as the kernel has it."""
    found = mountinfo.at(str(place(record)))
    assert found is not None
    return found
