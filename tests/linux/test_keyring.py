"""Keys in the kernel's keyrings. The type `ceph` needs the kernel's client; `user` goes the same way."""

from __future__ import annotations

import errno
import os

import pytest

from imageapi.linux import keyring
from imageapi.linux.libc import syscall

pytestmark = pytest.mark.kernel
KEYCTL_SEARCH = 10
NAME = f"imageapi:test:{os.getpid()}"


def is_known() -> bool:
    """Whether the kernel finds the key for this process. It is collected only some time after it was unlinked."""
    try:
        syscall(keyring.SYS_keyctl, KEYCTL_SEARCH, keyring.KEY_SPEC_PROCESS_KEYRING, b"user", NAME.encode(), 0)
    except OSError as error:
        if error.errno != errno.ENOKEY:
            raise
        return False
    return True


def test_a_key_is_there_while_the_context_lasts() -> None:
    with keyring.key("user", NAME, b"payload"):
        assert is_known()
    assert not is_known()


def test_a_second_key_of_the_name_replaces_the_first() -> None:
    first = keyring.add_key("user", NAME, b"one")
    assert keyring.add_key("user", NAME, b"two") == first
    keyring.unlink(first)
    assert not is_known()


def test_unlinking_twice_does_nothing() -> None:
    serial = keyring.add_key("user", NAME, b"payload")
    keyring.unlink(serial)
    keyring.unlink(serial)


def test_a_type_that_no_module_knows() -> None:
    with pytest.raises(OSError, match="key imageapi") as caught:
        keyring.add_key("no-such-type", NAME, b"payload")
    assert caught.value.errno == errno.ENODEV
