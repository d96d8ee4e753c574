"""Keys in the kernel's keyrings. The type `ceph` needs the kernel's client; `user` goes the same way."""

from __future__ import annotations

import errno
import os

import pytest

from imageapi.linux import keyring
from imageapi.linux.libc import syscall

pytestmark = pytest.mark.kernel
SYS_keyctl = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
KEYCTL_SEARCH = 10
NAME = f"imageapi:test:{os.getpid()}"


def is_known() -> bool:
    """Whether the kernel finds the key for this process."""
    try:
        syscall(SYS_keyctl, KEYCTL_SEARCH, keyring.KEY_SPEC_PROCESS_KEYRING, b"user", NAME.encode(), 0)
    except OSError as error:
        if error.errno != errno.ENOKEY:
            raise
        return False
    return True


def test_a_key_lasts_as_long_as_the_process_that_added_it() -> None:
    child = os.fork()
    if child == 0:
        first, second = keyring.add_key("user", NAME, b"one"), keyring.add_key("user", NAME, b"two")
        os._exit(0 if is_known() and first == second else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not is_known()


def test_a_type_that_no_module_knows() -> None:
    with pytest.raises(OSError, match="key imageapi") as caught:
        keyring.add_key("no-such-type", NAME, b"payload")
    assert caught.value.errno == errno.ENODEV
