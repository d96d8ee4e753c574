"""Who keeps a block device."""

from __future__ import annotations

import os

from imageapi.drivers import holders
from imageapi.errors import Conflict
from imageapi.linux import mountinfo, users


def busy(device: str) -> Conflict:
    """The refusal to let go of `device`: its mounts here and in other mount namespaces, the devices on it, and the
    processes that have it open. Nothing here asks the device itself."""
    number = os.stat(device).st_rdev
    dev = f"{os.major(number)}:{os.minor(number)}"
    mounts = [f"the mount at {each.mountpoint}" for each in mountinfo.read() if each.dev == dev]
    devices = [f"/dev/{name}" for name in os.listdir(f"/sys/dev/block/{dev}/holders")]
    return holders.busy(device, [*mountinfo.holders(dev), *users.using(device)], [*mounts, *devices])
