"""The kernel's rbd driver through its sysfs files (Documentation/ABI/testing/sysfs-bus-rbd).

`root` is the bus directory. The secret never passes here: the options name a key of the kernel's keyring instead,
because `config_info` shows every option again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from imageapi.linux import sysfs

BUS = "/sys/bus/rbd"

DATA = ("cluster_fsid", "pool_id", "pool_ns", "image_id", "snap_id")
"""The files that `Data` is read from."""


class Image(NamedTuple):
    """The image a device stands for. `monitors` are as they were written; `snapshot` is None for the image itself."""

    monitors: str
    pool: str
    namespace: str
    name: str
    snapshot: str | None


class Data(NamedTuple):
    """What the cluster knows an image by, whatever its names are. `snapshot` is the kernel's number for it."""

    cluster: str
    pool: str
    namespace: str
    image: str
    snapshot: str


class Device(NamedTuple):
    """A mapped image. `image` and `options` are what was asked for, and `data` what was found."""

    id: int
    image: Image
    options: Mapping[str, str]
    data: Data
    read_only: bool

    @property
    def cluster(self) -> str:
        """The cluster's fsid."""
        return self.data.cluster

    @property
    def file(self) -> str:
        return f"/dev/rbd{self.id}"


def available(root: str = BUS) -> bool:
    """Whether the driver is there."""
    return os.path.isdir(root)


def line(monitors: Sequence[str], options: Sequence[str], image: Image) -> str:
    """What `map_image` writes: the fields of the ABI, a blank between them; a snapshot of `-` is none.

    Raises: ValueError naming the field that holds a blank, or the option that holds a comma: they cannot be written.
    """
    fields = {"pool": image.pool, "image": image.name, "snapshot": image.snapshot or "-"}
    for name, value in fields.items():
        if not value or any(char.isspace() for char in value):
            raise ValueError(f"{name} '{value}' is empty or holds a blank")
    for option in options:
        if "," in option or any(char.isspace() for char in option):
            raise ValueError(f"option '{option}' holds a comma or a blank")
    return " ".join([",".join(monitors), ",".join(options), *fields.values()])


def map_image(text: str, root: str = BUS) -> None:
    """Map the image that `line` described. It returns when the device is there; `devices` tells which one it is.

    Raises: OSError: EACCES for a wrong key, ENOENT without such pool, image or snapshot, EPERM when the user may not
    (or may only read), ETIMEDOUT when no monitor answered within `mount_timeout`, EINVAL for an option it does not
    know.
    """
    sysfs.write(_file(root, "add"), text)


def unmap(number: int, *, force: bool = False, root: str = BUS) -> None:
    """Unmap device `number`. `force` also while it is open: its users get errors.

    Raises: OSError: EBUSY while it is open, ENOENT when there is none.
    """
    sysfs.write(_file(root, "remove"), f"{number} force" if force else str(number))


def devices(root: str = BUS) -> list[Device]:
    """All mapped images, in the order of their numbers."""
    numbers = (int(entry) for entry in os.listdir(f"{root}/devices") if entry.isdigit())
    found = (device(number, root) for number in sorted(numbers))
    return [each for each in found if each is not None]


def device(number: int, root: str = BUS) -> Device | None:
    """What is mapped as `number`; None when nothing is (any more)."""
    directory = f"{root}/devices/{number}"
    try:
        monitors, options, pool, name, snapshot = sysfs.read(f"{directory}/config_info").split(" ")[:5]
        data = Data(*(sysfs.read(f"{directory}/{file}") for file in DATA))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # ENODEV: it went between the open and the read
            raise
        return None
    chosen = parse_options(options)
    image = Image(monitors, pool, chosen.get("_pool_ns", ""), name, None if snapshot == "-" else snapshot)
    return Device(number, image, chosen, data, "ro" in chosen or "read_only" in chosen or image.snapshot is not None)


def parse_options(text: str) -> dict[str, str]:
    """The option string of `config_info`; a flag's value is empty."""
    pairs = (word.partition("=") for word in text.split(",") if word)
    return {name: value for name, _, value in pairs}


def _file(root: str, verb: str) -> str:
    """With one major number for all devices, the default since Linux 3.14, the plain file answers EINVAL."""
    single = f"{root}/{verb}_single_major"
    return single if os.path.exists(single) else f"{root}/{verb}"
