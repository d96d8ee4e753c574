"""Messages of any size between two processes on a SOCK_SEQPACKET socket (unix(7)).

The kernel takes a packet only in memory that hangs together, of which there may be none left for a large one
(ENOBUFS). So what is larger than a little goes as a file in memory (memfd_create(2)), whose descriptor is sent.
"""

from __future__ import annotations

import mmap
import os
import socket
from array import array

from imageapi.linux.whole import write_all

INLINE = 64 << 10
"""The largest message in bytes that goes as it is."""
_INT = array("i").itemsize


def buffer() -> memoryview:
    """Room for one packet. Pages that no message has filled are not there."""
    return memoryview(mmap.mmap(-1, INLINE, flags=mmap.MAP_PRIVATE))


def send(channel: socket.socket, message: bytes, flags: int = 0) -> None:
    """Raises: OSError; EMFILE, ENOMEM, when there is nothing left to send a large message with."""
    if len(message) <= INLINE:
        channel.send(message, flags)
        return
    file = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        write_all(file, message)
        socket.send_fds(channel, [b"\0"], [file], flags)
    finally:
        os.close(file)


def receive(channel: socket.socket, buffer: memoryview) -> bytes | memoryview:
    """The next message, which may be in `buffer`; an empty one when the other end is gone.

    Raises: OSError; BlockingIOError when there is none yet.
    """
    size, control, _, _ = channel.recvmsg_into([buffer], socket.CMSG_SPACE(_INT), socket.MSG_CMSG_CLOEXEC)
    if not control:
        return buffer[:size]
    (file,) = array("i", control[0][2])
    try:
        return os.pread(file, os.fstat(file).st_size, 0)
    finally:
        os.close(file)
