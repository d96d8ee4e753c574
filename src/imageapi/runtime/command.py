"""A container's command: split as a shell would, and looked at in the image before and after it is executed.

The image is not trusted: every path is resolved inside it (openat2(2), RESOLVE_IN_ROOT), and only regular files are
opened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
import struct
import sys
from functools import lru_cache
from typing import NoReturn

from imageapi.errors import Exhausted, Invalid, Problem, from_oserror
from imageapi.linux.openat2 import open_in_root

HEAD = 4096
"""Bytes read of a program: the ELF header with its table of segments, or the first line of a script."""
SCRIPTS = 5
"""How many interpreters may be scripts in turn (binfmt_script in the kernel's exec)."""
BINFMT_MISC = "/proc/sys/fs/binfmt_misc"

MACHINES = {
    3: "x86 (32 bit)",
    8: "mips",
    20: "ppc",
    21: "ppc64",
    22: "s390x",
    40: "arm (32 bit)",
    62: "x86_64",
    183: "aarch64",
    243: "riscv64",
    258: "loongarch64",
}
"""e_machine in elf(5), by number."""
RUNNABLE = {"x86_64": (62, 3), "aarch64": (183, 40)}
"""What a host of each architecture can run by itself."""
PT_INTERP = 3
_HEADER = "=4sBBB9xHHIQQQIHHHHHH"
_EXAMPLE = struct.pack(
    _HEADER,
    b"\x7fELF",
    2,
    1 + (sys.byteorder == "big"),
    1,
    2,
    RUNNABLE.get(os.uname().machine, (0,))[0],
    1,
    *(0, struct.calcsize(_HEADER), 0, 0),
    *(struct.calcsize(_HEADER), 56, 1, 0, 0, 0),
) + bytes(56)
"""A program of this host's without a dynamic loader, in elf(5): the header, and one segment of no kind."""


def split(command: str) -> list[str]:
    """The words of a command: quotes and backslashes count, nothing is expanded.

    Raises: errors.Invalid.
    """
    return list(_words(command))


@lru_cache(maxsize=256)
def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError:
        raise Invalid("a quote or a backslash in the command has nothing that ends it", path="$.command") from None
    if not words or not words[0]:
        raise Invalid("the command is empty; its first word is the path of a program in the image", path="$.command")
    return words


def validate(root: int, argv: list[str]) -> None:
    """Look whether `argv` can be executed in the tree `root`; its words come from `split`.

    Raises: errors.Invalid, with the reason and what to do.
    """
    _check(root, argv[0], None, 0)


def rehearse() -> None:
    """Do once what `validate` does, with the root directory in a program's place and a header of no file's."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(Invalid):
            validate(root, ["/"])
        _check_elf(root, "/", _EXAMPLE)
    finally:
        os.close(root)


def explain(root: int, argv: list[str], error: OSError) -> Problem:
    """Why execve(2) of `argv` in `root` failed with `error`."""
    try:
        validate(root, argv)
    except Invalid as reason:
        return reason
    except OSError:
        pass  # the kernel's own word is all there is
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        return Exhausted(f"executing {argv[0]}: the host has no memory left", errno=errno.errorcode[error.errno])
    if error.errno == errno.E2BIG:
        return _invalid(f"the command is too long for the kernel: {error.strerror}")
    return from_oserror(error, f"executing {argv[0]}")


def _invalid(message: str) -> Invalid:
    return Invalid(message, path="$.command")


def _check(root: int, path: str, script: str | None, depth: int) -> None:
    """Look at the program at `path`, the interpreter of `script` unless that is None."""
    who = path if script is None else f"{path}, the interpreter of {script},"
    file = _open(root, path, who)
    try:
        _check_kind(os.fstat(file).st_mode, who)
        if os.fstatvfs(file).f_flag & os.ST_NOEXEC:
            raise _invalid(f"{who} is on a mount with the option noexec; mount the image without it")
        head = _read(file)
    finally:
        os.close(file)
    if head.startswith(b"#!"):
        _check(root, _interpreter(head, who), path, _deeper(depth, path))
    elif head.startswith(b"\x7fELF"):
        _check_elf(root, path, head)
    elif not _foreign_programs_run():
        raise _invalid(f"{who} is neither a program nor a script that begins with #! and its interpreter")


def _deeper(depth: int, path: str) -> int:
    if depth == SCRIPTS:
        raise _invalid(f"{path} is a script whose interpreter is a script, and so on too often")
    return depth + 1


def _open(root: int, path: str, who: str) -> int:
    try:
        return open_in_root(root, path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise _invalid(f"there is no {who.rstrip(',')} in the image") from None
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES):
            raise _invalid(f"{who} cannot be reached in the image: {error.strerror}") from None
        raise


def _check_kind(mode: int, who: str) -> None:
    if stat.S_ISDIR(mode):
        raise _invalid(f"{who} is a directory in the image; give the path of a program")
    if not stat.S_ISREG(mode):
        raise _invalid(f"{who} is no regular file in the image")
    if not mode & 0o111:
        raise _invalid(f"{who} is not executable in the image; chmod +x it there")


def _read(file: int) -> bytes:
    """The beginning of the file behind an O_PATH descriptor."""
    readable = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(readable, HEAD, 0)
    finally:
        os.close(readable)


def _interpreter(head: bytes, who: str) -> str:
    words = head[2:].split(b"\n", 1)[0].split()
    if not words:
        raise _invalid(f"{who} begins with #! and names no interpreter")
    return os.fsdecode(words[0])


# ------------------------------------------------------------------------------------------------------ elf(5)


def _check_elf(root: int, path: str, head: bytes) -> None:
    try:
        order = "<" if head[5] == 1 else ">"
        machine: int = struct.unpack_from(f"{order}H", head, 18)[0]
        _check_machine(path, machine)
        interpreter = _elf_interpreter(head, order)
    except (struct.error, IndexError):
        _damaged(path)
    if interpreter is not None:
        _check_loader(root, interpreter, path)


def _damaged(path: str) -> NoReturn:
    raise _invalid(f"{path} in the image is a damaged program: its ELF header is cut short")


def _check_machine(path: str, machine: int) -> None:
    host = os.uname().machine
    if machine in RUNNABLE.get(host, (machine,)) or _foreign_programs_run():
        return
    built = MACHINES.get(machine, f"machine {machine}")
    raise _invalid(f"{path} in the image is built for {built}, and this host is {host}; use an image for {host}")


def _elf_interpreter(head: bytes, order: str) -> str | None:
    """The dynamic loader that the program names; None for a static one, or where the table lies elsewhere."""
    wide = head[4] == 2
    table: int = struct.unpack_from(f"{order}Q" if wide else f"{order}I", head, 32 if wide else 28)[0]
    size, count = struct.unpack_from(f"{order}HH", head, 54 if wide else 42)
    for at in range(table, table + size * count, size or 1):
        if at + size > len(head):
            return None
        if struct.unpack_from(f"{order}I", head, at)[0] == PT_INTERP:
            start: int = struct.unpack_from(f"{order}Q" if wide else f"{order}I", head, at + (8 if wide else 4))[0]
            return os.fsdecode(head[start:].split(b"\0", 1)[0]) if start < len(head) else None
    return None


def _check_loader(root: int, loader: str, path: str) -> None:
    who = f"{loader}, the dynamic loader that {path} needs,"
    file = _open(root, loader, who)
    try:
        _check_kind(os.fstat(file).st_mode, who)
    finally:
        os.close(file)


def _foreign_programs_run() -> bool:
    """Whether the host has handlers for what its kernel cannot run by itself (binfmt_misc): exec decides then."""
    try:
        return bool(set(os.listdir(BINFMT_MISC)) - {"register", "status"})
    except OSError:
        return False
