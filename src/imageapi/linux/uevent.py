"""What the kernel tells of its devices: netlink(7), NETLINK_KOBJECT_UEVENT."""

from __future__ import annotations

import contextlib
import errno
import socket

NETLINK_KOBJECT_UEVENT = 15
KERNEL = 1
"""The multicast group of the kernel's own messages; those of udev have another."""
_CHUNK = 1 << 16


def listen() -> socket.socket:
    """A socket that is readable when a device has come, gone or changed. It does not block. Raises: OSError."""
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT)
    try:
        channel.bind((0, KERNEL))
    except OSError:
        channel.close()
        raise
    return channel


def drain(channel: socket.socket) -> None:
    """Take all that has been told, and forget it; more than there was room for is lost (ENOBUFS), and no matter."""
    with contextlib.suppress(BlockingIOError):
        while True:
            try:
                channel.recv(_CHUNK)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
