"""What the types alone do not say of a request: each rule names the canonical JSON path and what to do."""

from __future__ import annotations

import base64
import binascii
import re
import socket
from collections.abc import Callable
from typing import Any

from imageapi.errors import Invalid, Unsupported
from imageapi.spec import (
    MASK,
    Bind,
    Container,
    Loopback,
    Object,
    Overlay,
    OverlayOptions,
    RbdOptions,
    Secret,
    Spec,
    Uri,
)

NAMESPACES = ["ipc", "mnt", "pid", "uts"]
"""What every container gets."""


def check(thing: Object) -> None:
    """Raises: errors.Problem for the first rule that is broken."""
    _walk(thing, "$")


def _walk(part: Any, path: str) -> None:
    RULES.get(type(part), _nothing)(part, path)
    if isinstance(part, list):
        for number, item in enumerate(part):
            _walk(item, f"{path}[{number}]")
    elif isinstance(part, Spec):
        for field in part.__struct_fields__:
            if (value := getattr(part, field)) is not None:
                _walk(value, f"{path}.{field}")


def _nothing(part: Any, path: str) -> None:
    pass


def _text(part: str, path: str) -> None:
    """The kernel's strings end at the first zero byte."""
    if "\0" in part:
        raise Invalid("this must not hold a NUL", path=path)


def _secret(part: Secret, path: str) -> None:
    if part.reveal() == MASK:
        raise Invalid("this is the mask that answers show; give the key, or refer to the attachment by id", path=path)
    if not part.reveal():
        raise Invalid("the secret is empty; give the key", path=path)
    _text(part.reveal(), path)


def _container(part: Container, path: str) -> None:
    if part.state not in (None, "created", "running"):
        raise Invalid("a new container is 'created' or 'running'", path=f"{path}.state")
    if part.namespaces is not None and sorted(part.namespaces) != NAMESPACES:
        raise Unsupported(
            "a container has the namespaces mnt, pid, uts and ipc, and no choice of others yet; leave the list out",
            path=f"{path}.namespaces",
        )


def _based(part: Loopback | Bind, path: str) -> None:
    if part.base == "mount" and part.mount is None:
        raise Invalid("with base 'mount', say which: give it as 'mount'", path=f"{path}.mount")
    if part.base == "root" and part.mount is not None:
        raise Invalid(
            "with base 'root', the path is the host's: leave 'mount' out, or set base to 'mount'", path=f"{path}.mount"
        )
    if part.base == "root" and not part.path.startswith("/"):
        raise Invalid(f"'{part.path}' is no absolute path; begin it with /", path=f"{path}.path")


def _overlay(part: Overlay, path: str) -> None:
    if part.ro and part.upper is not None:
        raise Invalid("a read-only overlay writes to no upper; leave one of the two out", path=f"{path}.upper")
    if part.ro and part.options and (part.options.volatile or part.options.index):
        name = "volatile" if part.options.volatile else "index"
        raise Invalid("a read-only overlay writes nothing; leave this out", path=f"{path}.options.{name}")
    if part.upper_path is not None and part.upper is None:
        raise Invalid("this is a place in an 'upper'; give that, too", path=f"{path}.upper_path")
    if part.upper_path is not None and ".." in part.upper_path.split("/"):
        raise Invalid("'..' leads out of the upper; give the way down from its top", path=f"{path}.upper_path")


def _overlay_options(part: OverlayOptions, path: str) -> None:
    """What overlayfs refuses (its `ovl_fs_params_verify`)."""
    if part.metacopy and part.redirect_dir not in (None, "on"):
        raise Invalid("'metacopy' needs the redirect_dir 'on'; leave one of the two out", path=f"{path}.metacopy")
    if part.userxattr and part.metacopy:
        raise Invalid("'userxattr' and 'metacopy' exclude each other; leave one out", path=f"{path}.metacopy")
    if part.userxattr and part.redirect_dir not in (None, "nofollow"):
        raise Invalid("'userxattr' allows no redirect_dir but 'nofollow'", path=f"{path}.redirect_dir")


def _rbd_options(part: RbdOptions, path: str) -> None:
    if part.secret is None or part.secret.reveal() == MASK:
        return
    if not _is_base64(part.secret.reveal()):
        raise Invalid("the key is no base64; give it as 'ceph auth get-key' prints it", path=f"{path}.secret")


def _is_base64(text: str) -> bool:
    try:
        return bool(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return False


MOST_ADDRESSES = 16
"""How many URIs one mount may name."""
LONGEST_ADDRESS = 8192
"""Of its characters. Signed ones are long, and web servers take no longer ones."""
_ADDRESS = re.compile(r"(?:https?://(?P<host>[^/?#\s\\]+)|file://(?:localhost)?(?=/))(?P<rest>[^\s\\#\x00-\x1f\x7f]*)")
_HOST = re.compile(r"(?:[^@]*@)?(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")


def _uri(part: Uri, path: str) -> None:
    addresses = part.uri.each()
    if not 1 <= len(addresses) <= MOST_ADDRESSES:
        raise Invalid(f"give 1 to {MOST_ADDRESSES} URIs", path=f"{path}.uri")
    for at, address in enumerate(addresses):
        _address(address, f"{path}.uri" if isinstance(part.uri.reveal(), str) else f"{path}.uri[{at}]")


def _address(address: str, path: str) -> None:
    """Nothing of the address is repeated: who has mistyped it may have mistyped its password."""
    if len(address) > LONGEST_ADDRESS:
        raise Invalid(f"this is longer than {LONGEST_ADDRESS}", path=path)
    if MASK in address:
        raise Invalid("this has the mask that answers show; give the whole URI, or refer to the mount by id", path=path)
    found = _ADDRESS.fullmatch(address)
    if found is None or not _HOST.fullmatch(found["host"] or "localhost") or "%00" in address or not _is_url(address):
        raise Invalid(
            "give https://host/path, http://host/path or file:///path; in it, write what is no letter, digit or part "
            "of the form with % and two digits (a # is %23, a / in a password %2F)",
            path=path,
        )
    if found["host"] is None and "?" in address:
        raise Invalid("a file has no query; write a ? in its name as %3F", path=path)


def _is_url(address: str) -> bool:
    """Whether Python takes it apart: of letters that look like others, or a host that is no IPv6 address, its error has
    the whole of it, and must not come from where nobody expects one."""
    from urllib.parse import urlsplit  # see request

    try:
        parts = urlsplit(address)
        host, _ = parts.hostname or "", parts.port
        return ":" not in host or bool(socket.inet_pton(socket.AF_INET6, host))
    except (ValueError, OSError):
        return False


RULES: dict[type, Callable[[Any, str], None]] = {
    Container: _container,
    Loopback: _based,
    Bind: _based,
    Overlay: _overlay,
    OverlayOptions: _overlay_options,
    RbdOptions: _rbd_options,
    Secret: _secret,
    Uri: _uri,
    str: _text,
}
