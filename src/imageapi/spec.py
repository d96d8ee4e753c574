"""What a user can ask for: these structs are the wire, the stored record and the OpenAPI schema.

An object that needs another holds it as *reference or definition*: an `Attachment` or `Mount` whose `id` is set is
a reference, one whose kind's own field is set is a definition. Planning replaces every definition by the reference
of the record made for it, so one type serves the nested request, the flat record and the answer.

A new kind is one struct and one field here, and one file in `drivers/`; the field's name is the kind.
Specs are frozen: what the server learns is kept beside them, in `records`. Fields marked `SERVER` are only ever set
in answers.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

SERVER = Meta(extra_json_schema={"readOnly": True})
"""Marks a field that only the server sets: accepted in a request, and ignored."""

Id = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^[^\x00]*\Z")]
Path = Annotated[str, Meta(min_length=1, max_length=4095, pattern=r"^[^\x00]*\Z")]
MASK = "X" * 34
"""What every answer shows in a secret's place: the tutorial's own row."""


class Secret:
    """A value that is taken and used, and never shown: its repr and str are the mask."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself. Only a driver, and the store of records, have use for it."""
        return self._value

    def __repr__(self) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


_SECRET_PARTS = re.compile(r"(?P<scheme>[a-z]+://)(?P<user>[^/?#]*@)?(?P<place>[^?#]*)(?P<query>[?#].*)?", re.DOTALL)


class Addresses:
    """The URIs of one thing, in the order in which they are tried: one string, or a list of them. What may be secret in
    them is never shown: who asks (user and password), and the query, which is where a signature stands."""

    __slots__ = ("_value",)

    def __init__(self, value: str | list[str]) -> None:
        self._value = value

    def reveal(self) -> str | list[str]:
        """As they were given. Only a driver, and the store of records, have use for it."""
        return self._value

    def each(self) -> list[str]:
        """The URIs themselves, as `reveal` has them."""
        return [self._value] if isinstance(self._value, str) else self._value

    def shown(self) -> str | list[str]:
        """As an answer shows them."""
        return without_secrets(self._value) if isinstance(self._value, str) else [*map(without_secrets, self._value)]

    def __repr__(self) -> str:
        return repr(self.shown())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Addresses) and other._value == self._value

    def __hash__(self) -> int:
        return hash(tuple(self.each()))


def without_secrets(uri: str) -> str:
    """A URI with the mask where it may hold a secret. One that is none is all mask."""
    if (parts := _SECRET_PARTS.fullmatch(uri)) is None:
        return MASK
    user, query = (MASK if parts[name] else "" for name in ("user", "query"))
    return f"{parts['scheme']}{user and user + '@'}{parts['place']}{query and '?' + query}"


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The base of all that a request may hold. Unknown fields are refused everywhere."""


# ---------------------------------------------------------------------------------------------- attachments


class RbdOptions(Spec, frozen=True):
    """The map options of the kernel's rbd driver (rbd(8), "KERNEL RBD (KRBD) OPTIONS")."""

    name: str | None = None
    secret: Secret | None = None
    namespace: str | None = None
    ro: bool = False
    rw: bool = False
    fsid: str | None = None
    ip: str | None = None
    share: bool = False
    noshare: bool = False
    crc: bool = False
    nocrc: bool = False
    ceph_requires_signatures: bool = False
    noceph_requires_signatures: bool = False
    tcp_nodelay: bool = False
    notcp_nodelay: bool = False
    cephx_sign_messages: bool = False
    nocephx_sign_messages: bool = False
    mount_timeout: Annotated[int, Meta(ge=0)] | None = None
    osdkeepalive: Annotated[int, Meta(ge=0)] | None = None
    osd_idle_ttl: Annotated[int, Meta(ge=0)] | None = None
    force: bool = False
    queue_depth: Annotated[int, Meta(ge=1)] | None = None
    lock_on_read: bool = False
    exclusive: bool = False
    lock_timeout: Annotated[int, Meta(ge=0)] | None = None
    notrim: bool = False
    abort_on_full: bool = False
    alloc_size: Annotated[int, Meta(ge=512)] | None = None
    ms_mode: Literal["legacy", "crc", "secure", "prefer-crc", "prefer-secure"] | None = None
    rxbounce: bool = False
    read_from_replica: Literal["no", "balance", "localize"] | None = None
    crush_location: str | None = None
    compression_hint: Literal["none", "compressible", "incompressible"] | None = None
    udev: bool = False
    noudev: bool = False


class Rbd(Spec, frozen=True):
    """A Ceph RBD image."""

    monitors: Annotated[list[Text], Meta(min_length=1)]
    pool: Text
    image: Text
    snapshot: str | None = None
    options: RbdOptions = RbdOptions()
    readPartitions: bool = False
    device_id: Annotated[int | None, SERVER] = None


class Loopback(Spec, frozen=True):
    """A loop device on an image file, on the host or inside a mount."""

    path: Path
    base: Literal["root", "mount"]
    mount: Mount | None = None
    readPartitions: bool = False
    ro: bool = False


class Local(Spec, frozen=True):
    """A block device the host has already."""

    path: Path
    ro: bool = False
    readPartitions: bool = False


class Chap(Spec, frozen=True):
    """iSCSI authentication (RFC 7143, CHAP); the mutual pair is what the target shows us."""

    user: Text
    secret: Secret
    mutual_user: str | None = None
    mutual_secret: Secret | None = None


class IscsiOptions(Spec, frozen=True):
    """How an iSCSI attachment is to be made."""

    force: bool = False


class Iscsi(Spec, frozen=True):
    """A logical unit of an iSCSI target."""

    initiator: Text
    target: Text
    host: Text
    lun: Annotated[int, Meta(ge=0, le=16383)] = 0
    port: Annotated[int, Meta(ge=1, le=65535)] = 3260
    max_comands: Annotated[int, Meta(ge=1, le=2048)] = 128
    queue_depth: Annotated[int, Meta(ge=1, le=1024)] = 16
    scheduler: Text = "mq-deadline"
    chap: Chap | None = None
    ro: bool = False
    options: IscsiOptions | None = None
    readPartitions: bool = False
    device_id: Annotated[int | None, SERVER] = None


class Attachment(Spec, frozen=True):
    """What ends in a block device: a reference by `id`, or one kind's definition."""

    COLLECTION: ClassVar[str] = "attach"

    id: Id | None = None
    kind: str | None = None
    device_file: Annotated[str | None, SERVER] = None
    refs: Annotated[int | None, SERVER] = None
    problem: Annotated[str | None, SERVER] = None
    rbd: Rbd | None = None
    loopback: Loopback | None = None
    local: Local | None = None
    iscsi: Iscsi | None = None


# --------------------------------------------------------------------------------------------------- mounts


class Attach(Spec, frozen=True):
    """A file system on an attachment, or on the partition of one that has this number. The type is always given, never
    guessed."""

    attach: Attachment
    fs_type: Text
    mount_options: list[str] = []
    partition: Annotated[int, Meta(ge=1, le=128)] | None = None
    kind: str | None = None


class OverlayOptions(Spec, frozen=True):
    """Options of the overlay file system (the kernel's filesystems/overlayfs.rst). Where one is left out, the kernel's
    own default holds; but `volatile` is on where the writes are thrown away in any case."""

    volatile: bool | None = None
    metacopy: bool | None = None
    redirect_dir: Literal["on", "off", "follow", "nofollow"] | None = None
    index: bool | None = None
    xino: Literal["on", "off", "auto"] | None = None
    userxattr: bool = False


class Overlay(Spec, frozen=True):
    """A writable view over other mounts; the first lower is the topmost. Writes go to `upper`, into the directories
    `upper` and `work` at `upper_path` in it, and stay there; without one they go when the overlay goes."""

    lower: Annotated[list[Mount], Meta(min_length=1)]
    upper: Mount | None = None
    upper_path: Path | None = None
    ro: bool = False
    options: OverlayOptions | None = None
    upperdir: Annotated[str | None, SERVER] = None
    workdir: Annotated[str | None, SERVER] = None


class Bind(Spec, frozen=True):
    """A directory of the host, or of another mount, seen again."""

    path: Path
    base: Literal["root", "mount"]
    mount: Mount | None = None
    recursive: bool = False
    ro: bool = False


class Tmpfs(Spec, frozen=True):
    """Memory as a file system (tmpfs(5)): what is in it goes with it. `size` is in bytes, with K, M, G or T for 1024
    times as many, or a percentage of the host's memory."""

    size: Annotated[str, Meta(pattern=r"^(?:[1-9][0-9]{0,14}[KMGTkmgt]?|(?:[1-9][0-9]?|100)%)\Z")]


class Nfs(Spec, frozen=True):
    """An export of an NFS server (nfs(5))."""

    host: Text
    path: Path
    ro: bool = False
    version: Literal["3", "4", "4.0", "4.1", "4.2"] = "4.2"
    options: list[str] = []


class Uri(Spec, frozen=True):
    """An archive or image fetched into memory, from the first of the URIs that serves it."""

    uri: Addresses
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{64}\Z")] | None = None
    max_size: Annotated[int, Meta(ge=1)] | None = None
    format: Literal["tar", "squashfs", "erofs", "ext4"] | None = None


class Mount(Spec, frozen=True):
    """What ends in a directory: a reference by `id`, or one kind's definition."""

    COLLECTION: ClassVar[str] = "mount"

    id: Id | None = None
    kind: str | None = None
    mountpoint: Annotated[str | None, SERVER] = None
    refs: Annotated[int | None, SERVER] = None
    problem: Annotated[str | None, SERVER] = None
    attach: Attach | None = None
    overlay: Overlay | None = None
    bind: Bind | None = None
    tmpfs: Tmpfs | None = None
    nfs: Nfs | None = None
    uri: Uri | None = None


# ----------------------------------------------------------------------------------------------- containers

Name = Annotated[str, Meta(pattern=r"^(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,255}\Z")]
State = Literal["created", "running", "stopping", "exited", "dead", "paused"]


class Container(Spec, frozen=True, kw_only=True):
    """A command in a mount, in namespaces of its own."""

    COLLECTION: ClassVar[str] = "container"

    id: Id | None = None
    name: Name | None = None
    mount: Mount
    command: Text
    systemd: bool = False
    state: State | None = None
    namespaces: list[str] | None = None
    logfile: Annotated[str | None, SERVER] = None
    refs: Annotated[int | None, SERVER] = None
    problem: Annotated[str | None, SERVER] = None
    pid: Annotated[int | None, SERVER] = None
    exit_code: Annotated[int | None, SERVER] = None
    created_at: Annotated[str | None, SERVER] = None
    started_at: Annotated[str | None, SERVER] = None
    finished_at: Annotated[str | None, SERVER] = None


class Finding(Spec, frozen=True, kw_only=True):
    """What is not as it should be on the host, and what would mend it; `collection` and `id` are of an object."""

    collection: str | None = None
    id: Id | None = None
    problem: str
    remedy: str


class Progress(Spec, frozen=True, kw_only=True):
    """What is being made or released at this moment. `id` is there once the object can be read; `done` and `total` are
    bytes, and there when they are known; `since` is RFC 3339, in UTC."""

    collection: str
    id: Id | None = None
    kind: str
    step: str
    done: Annotated[int, Meta(ge=0)] | None = None
    total: Annotated[int, Meta(ge=0)] | None = None
    since: str


Object = Attachment | Mount | Container
"""What a collection holds."""
O = TypeVar("O", bound=Attachment | Mount | Container)  # noqa: E741  (the object a function is about)

COLLECTIONS: dict[str, type[Attachment | Mount | Container]]
COLLECTIONS = {"attach": Attachment, "mount": Mount, "container": Container}


# ------------------------------------------------------------------------------- derived, never maintained


@cache
def hints(struct: Any) -> dict[str, Any]:
    """The annotations of a struct's fields, markers included."""
    return {
        field: hint
        for field, hint in get_type_hints(struct, include_extras=True).items()
        if field in struct.__struct_fields__
    }


@cache
def server_fields(struct: Any) -> frozenset[str]:
    """The fields of `struct` that only the server sets."""
    return frozenset(name for name, hint in hints(struct).items() if SERVER in getattr(hint, "__metadata__", ()))


def inner_types(hint: Any) -> list[Any]:
    """The plain types a field's annotation is made of: unions, lists and markers are looked through."""
    origin = get_origin(hint)
    if origin is Annotated:
        return inner_types(get_args(hint)[0])
    if origin in (list, Union) or type(hint).__name__ == "UnionType":
        return [inner for argument in get_args(hint) for inner in inner_types(argument)]
    return [hint]


def struct_of(hint: Any) -> type[Spec] | None:
    """The struct a field holds, or None."""
    for inner in inner_types(hint):
        if isinstance(inner, type) and issubclass(inner, Spec):
            return inner
    return None


@cache
def kinds(of: Any) -> dict[str, type[Spec]]:
    """The kinds of a collection, and the struct of each: the fields of the object that hold one."""
    return {name: struct for name, hint in hints(of).items() if (struct := struct_of(hint)) is not None}


def definition(thing: Attachment | Mount) -> Spec | None:
    """The kind's own part of `thing`, or None for a reference."""
    return None if thing.id is not None or thing.kind is None else getattr(thing, thing.kind, None)


@cache
def holding(struct: Any) -> tuple[str, ...]:
    """The fields of `struct` that hold an object, or a list of objects."""
    return tuple(name for name, hint in hints(struct).items() if struct_of(hint) in (Attachment, Mount))


def needs_at(part: Any) -> list[tuple[str, Attachment | Mount]]:
    """The objects that `part` (a kind's own part, or a container) needs, in the order it names them, each with its
    place in `part` as a JSON path: `.lower[0]`."""
    found: list[tuple[str, Attachment | Mount]] = []
    for field in holding(part.__class__):
        value = getattr(part, field)
        if isinstance(value, list):
            found += [(f".{field}[{at}]", it) for at, it in enumerate(value)]
        elif value is not None:
            found.append((f".{field}", value))
    return found


def needs(part: Any) -> list[Attachment | Mount]:
    """The objects that `part` needs, in the order it names them."""
    found: list[Attachment | Mount] = []
    for field in holding(part.__class__):
        value = getattr(part, field)
        found += value if isinstance(value, list) else () if value is None else (value,)
    return found


def own_part(thing: Object) -> Spec | None:
    """The part of an object that names what it needs: itself for a container."""
    return thing if isinstance(thing, Container) else definition(thing)


def replace_needs(part: Any, replacements: list[Attachment | Mount]) -> Any:
    """`part` with the objects it needs replaced, in the order of `needs`."""
    left = iter(replacements)
    changes: dict[str, Any] = {}
    for field in holding(part.__class__):
        value = getattr(part, field)
        if isinstance(value, list):
            changes[field] = [next(left) for _ in value]
        elif value is not None:
            changes[field] = next(left)
    return msgspec.structs.replace(part, **changes)


def as_asked(part: Spec) -> Any:
    """`part` without what only the server sets."""
    struct: type[Spec] = type(part)
    return msgspec.structs.replace(part, **dict.fromkeys(server_fields(struct)))


def decode_hook(kind: type[Any], value: Any) -> Any:
    """How msgspec reads the types of ours it does not know."""
    if kind is Secret:
        if not isinstance(value, str):
            raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
        return Secret(value)
    if kind is Addresses:
        if not (isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))):
            raise ValueError("this must be a URI, or an array of URIs")
        return Addresses(value)
    raise NotImplementedError(kind)


def masking_hook(value: Any) -> Any:
    """How an answer shows the types of ours: a secret is its mask."""
    if isinstance(value, Secret):
        return MASK
    if isinstance(value, Addresses):
        return value.shown()
    raise NotImplementedError(type(value))


def revealing_hook(value: Any) -> Any:
    """How the store writes the types of ours. Its files are root's alone."""
    if isinstance(value, Secret | Addresses):
        return value.reveal()
    raise NotImplementedError(type(value))
