"""What the types alone do not say of a request: each rule names the canonical JSON path and what to do."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any

from imageapi.errors import Invalid, Unsupported
from imageapi.spec import MASK, Bind, Container, Loopback, Object, RbdOptions, Secret, Spec

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


RULES: dict[type, Callable[[Any, str], None]] = {
    Container: _container,
    Loopback: _based,
    Bind: _based,
    RbdOptions: _rbd_options,
    Secret: _secret,
    str: _text,
}
