"""What the types alone do not say of a request: each rule names the canonical JSON path and what to do."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any

from imageapi.errors import Invalid, Unsupported
from imageapi.spec import MASK, Bind, Chap, Container, Loopback, Object, RbdOptions, Secret, Spec

NAMESPACES = {"mnt", "pid", "uts", "ipc"}
"""What every container gets."""


def check(thing: Object) -> None:
    """Raises: errors.Problem for the first rule that is broken."""
    _walk(thing, "$")


def _walk(part: Any, path: str) -> None:
    if isinstance(part, list):
        for number, item in enumerate(part):
            _walk(item, f"{path}[{number}]")
    elif isinstance(part, Spec):
        RULES.get(type(part), _nothing)(part, path)
        for field in part.__struct_fields__:
            value = getattr(part, field)
            if isinstance(value, Spec | list):
                _walk(value, f"{path}.{field}")


def _nothing(part: Any, path: str) -> None:
    pass


def _container(part: Container, path: str) -> None:
    if part.state not in (None, "created", "running"):
        raise Invalid("a new container is 'created' or 'running'", path=f"{path}.state")
    if part.namespaces is not None and (set(part.namespaces) != NAMESPACES or len(part.namespaces) != len(NAMESPACES)):
        raise Unsupported(
            "a container has the namespaces mnt, pid, uts and ipc, and no choice of others yet; leave the list out",
            path=f"{path}.namespaces",
        )


def _based(part: Loopback | Bind, path: str) -> None:
    if part.base == "mount" and part.mount is None:
        raise Invalid("with base 'mount', say which: give it as 'mount'", path=f"{path}.mount")
    if part.base == "root" and part.mount is not None:
        raise Invalid("with base 'root', the path is the host's: leave 'mount' out, or set base to 'mount'",
                      path=f"{path}.mount")
    if part.base == "root" and not part.path.startswith("/"):
        raise Invalid(f"'{part.path}' is no absolute path; begin it with /", path=f"{path}.path")


def _rbd_options(part: RbdOptions, path: str) -> None:
    _not_masked(part.secret, f"{path}.secret")
    if part.secret is not None and not _is_base64(part.secret.reveal()):
        raise Invalid("the key is no base64; give it as 'ceph auth get-key' prints it", path=f"{path}.secret")


def _chap(part: Chap, path: str) -> None:
    _not_masked(part.secret, f"{path}.secret")
    _not_masked(part.mutual_secret, f"{path}.mutual_secret")


def _not_masked(secret: Secret | None, path: str) -> None:
    if secret is not None and secret.reveal() == MASK:
        raise Invalid("this is the mask that answers show; give the key, or refer to the attachment by id", path=path)


def _is_base64(text: str) -> bool:
    try:
        return bool(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return False


RULES: dict[type, Callable[[Any, str], None]] = {
    Container: _container,
    Loopback: _based,
    Bind: _based,
    RbdOptions: _rbd_options,
    Chap: _chap,
}
