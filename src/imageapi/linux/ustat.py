"""Whether a file system is up at all, in whatever mount namespace or detached tree: ustat(2)."""

from __future__ import annotations

import ctypes
import errno

from imageapi.linux.libc import SYS_ustat, syscall


def is_up(dev: str) -> bool | None:
    """Whether there is a superblock of the st_dev `dev` ("0:45"). None where the architecture has no such call.

    The number of one that is gone is soon another's: False is certain, True is not. Raises: OSError.
    """
    major, minor = map(int, dev.split(":"))
    number = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)  # new_encode_dev() of <linux/kdev_t.h>
    buffer = ctypes.create_string_buffer(32)
    try:
        syscall(SYS_ustat, number, ctypes.addressof(buffer))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        if error.errno == errno.ENOSYS:
            return None
        raise
    return True
