"""A container's command: split as a shell would, and looked at in the image before and after it is executed.

The image is not trusted: every path is resolved inside it (openat2(2), RESOLVE_IN_ROOT), and only regular files are
opened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import stat
import struct
import sys
from functools import lru_cache

from imageapi.errors import Exhausted, Invalid, Problem, from_oserror
from imageapi.linux.openat2 import open_in_root

HEAD = 4096
"""Bytes read of a program: the ELF header with its table of segments, or the first line of a script."""
LINE = 256
"""Bytes of a script in which the kernel looks for the name of its interpreter (BINPRM_BUF_SIZE)."""
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
EXECUTABLE = (2, 3)
"""e_type of what can be executed: ET_EXEC and ET_DYN."""
PT_INTERP = 3
UNUSABLE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EINVAL),
)
"""What execve(2) says of a program that will not serve, where nothing better is known."""
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
        _check_elf(root, "/", _EXAMPLE, len(_EXAMPLE))
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
    name = errno.errorcode.get(error.errno or 0, "")
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        return Exhausted(f"executing {argv[0]}: the host has no memory left", errno=name)
    if fault := _fault(argv[0], error):
        return _invalid(f"{fault} ({name})", errno=name)
    return from_oserror(error, f"executing {argv[0]}")


def _fault(program: str, error: OSError) -> str | None:
    """What is wrong with the command itself, for which the kernel refuses it; None when it is something else."""
    if error.errno == errno.E2BIG:
        return f"the command is too long for the kernel: {error.strerror}"
    if error.errno == errno.ENOEXEC:
        return f"{program} in the image is damaged, or no program for the kernel of this host: {error.strerror}"
    if error.errno == errno.ELIBBAD:
        return f"the dynamic loader that {program} in the image needs is damaged: {error.strerror}"
    return f"{program} in the image cannot be executed: {error.strerror}" if error.errno in UNUSABLE else None


def _invalid(message: str, **fields: str) -> Invalid:
    return Invalid(message, path="$.command", **fields)


def _shown(path: str) -> str:
    """A path that the image names, as a message can hold it: what is not UTF-8 or not to be printed is escaped."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _check(root: int, path: str, script: str | None, depth: int) -> None:
    """Look at the program at `path`, the interpreter of `script` unless that is None."""
    who = _shown(path) if script is None else f"{_shown(path)}, the interpreter of {_shown(script)},"
    head, size = _look(root, path, who)
    if head.startswith(b"#!"):
        _check(root, _interpreter(head, who), path, _deeper(depth, path))
    elif head.startswith(b"\x7fELF"):
        _check_elf(root, path, head, size)
    elif not _foreign_programs_run():
        raise _invalid(f"{who} is neither a program nor a script that begins with #! and its interpreter")


def _look(root: int, path: str, who: str) -> tuple[bytes, int]:
    """The beginning of a file that may be executed, and its size."""
    file = _open(root, path, who)
    try:
        status = os.fstat(file)
        _check_kind(status.st_mode, who)
        if os.fstatvfs(file).f_flag & os.ST_NOEXEC:
            raise _invalid(f"{who} is on a mount with the option noexec; mount the image without it")
        return _read(file), status.st_size
    finally:
        os.close(file)


def _deeper(depth: int, path: str) -> int:
    if depth == SCRIPTS:
        raise _invalid(f"{_shown(path)} is a script whose interpreter is a script, and so on too often")
    return depth + 1


def _open(root: int, path: str, who: str) -> int:
    try:
        return open_in_root(root, path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            hint = "; the script's lines end with CR and LF, which only Windows takes" if path.endswith("\r") else ""
            raise _invalid(f"there is no {who.rstrip(',')} in the image{hint}") from None
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
    """The interpreter that a script names, read as the kernel does (load_script): it ends at a blank, a tab or a NUL,
    and at nothing else."""
    line, newline, _ = head[2:LINE].partition(b"\n")
    name, *more = re.split(rb"[ \t\0]", line.lstrip(b" \t"), maxsplit=1)
    if not name:
        raise _invalid(f"{who} begins with #! and names no interpreter")
    if not (newline or more or len(head) < LINE):
        raise _invalid(f"{who} names an interpreter whose path is too long: its first line may have {LINE - 1} bytes")
    return os.fsdecode(name)


# ------------------------------------------------------------------------------------------------------ elf(5)


def _check_elf(root: int, path: str, head: bytes, size: int) -> None:
    """Look at a program of `size` bytes that begins with `head`."""
    try:
        order = "<" if head[5] == 1 else ">"
        kind, machine = struct.unpack_from(f"{order}HH", head, 16)
        _check_machine(path, machine)
        _check_type(path, kind)
        interpreter = _elf_interpreter(head, size, order)
    except (struct.error, IndexError):
        raise _invalid(f"{_shown(path)} in the image is a damaged program: it is cut short") from None
    if interpreter is not None:
        _check_loader(root, interpreter, path)


def _check_type(path: str, kind: int) -> None:
    if kind not in EXECUTABLE and not _foreign_programs_run():
        raise _invalid(f"{_shown(path)} in the image is no program but another ELF file, as an object file is")


def _check_machine(path: str, machine: int) -> None:
    host = os.uname().machine
    if machine in RUNNABLE.get(host, (machine,)) or _foreign_programs_run():
        return
    built = f"built for {MACHINES.get(machine, f'machine {machine}')}"
    raise _invalid(f"{_shown(path)} in the image is {built}, and this host is {host}; use an image for {host}")


def _elf_interpreter(head: bytes, size: int, order: str) -> str | None:
    """The dynamic loader that the program names; None for a static one, or where the table or the name lies elsewhere.

    Raises: IndexError, struct.error, when the program ends before it.
    """
    wide = head[4] == 2
    word, offset, length = ("Q", 8, 32) if wide else ("I", 4, 16)
    table: int = struct.unpack_from(order + word, head, 32 if wide else 28)[0]
    entry, count = struct.unpack_from(f"{order}HH", head, 54 if wide else 42)
    _check_within(table + entry * count, size)
    for at in range(table, table + entry * count, entry or 1):
        if at + entry > len(head):
            return None
        if struct.unpack_from(f"{order}I", head, at)[0] == PT_INTERP:
            start: int = struct.unpack_from(order + word, head, at + offset)[0]
            end = start + struct.unpack_from(order + word, head, at + length)[0]
            _check_within(end, size)
            return os.fsdecode(head[start:end].split(b"\0", 1)[0]) if end <= len(head) else None
    return None


def _check_within(end: int, size: int) -> None:
    if end > size:
        raise IndexError


def _check_loader(root: int, loader: str, path: str) -> None:
    who = f"{_shown(loader)}, the dynamic loader that {_shown(path)} needs,"
    head, _ = _look(root, loader, who)
    if not head.startswith(b"\x7fELF") or len(head) < struct.calcsize(_HEADER):
        raise _invalid(f"{who} is no dynamic loader: it is no ELF file, or cut short")
    _check_machine(loader, struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)[0])


def _foreign_programs_run() -> bool:
    """Whether the host has handlers for what its kernel cannot run by itself (binfmt_misc): exec decides then."""
    try:
        return bool(set(os.listdir(BINFMT_MISC)) - {"register", "status"})
    except OSError:
        return False
