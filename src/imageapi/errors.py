"""Everything that can go wrong for a user, and the one table that says how it is answered.

    Problem                    500  what the kernel refused for a reason of its own, or a bug
    ├── Malformed              400  the body is not JSON
    ├── Forbidden              403  a foreign origin
    ├── NotFound               404  no such route, id or name
    ├── MethodNotAllowed       405
    ├── TooSlow                408  the client did not send its request in time
    ├── Conflict               409  held, busy, or a name in use
    ├── TooLarge               413
    ├── UnsupportedMedia       415
    ├── Misdirected            421  a Host that is not ours
    ├── Invalid                422  wrong content, or what it names will not serve
    ├── HeadersTooLarge        431
    ├── Unsupported            501  a kind or option this host cannot do
    ├── Exhausted              503  the host has run out of something
    └── TimedOut               504  the host or a store did not finish in time

A problem is one sentence that says what to do, and fields that help: `path` (JSON path), `step`, `errno`, `detail`
(the kernel's words), `holders`. It travels between processes as the dict of `to_dict`.
"""

from __future__ import annotations

import errno as codes
import os
import re
from typing import Any, ClassVar

_SURROGATE = re.compile("[\ud800-\udfff]")


class Problem(Exception):
    """A failure with an answer: `code` is the HTTP status, str() the sentence, `fields` what helps."""

    code: ClassVar[int] = 500

    def __init__(self, message: str, **fields: Any) -> None:
        self.message = legible(message)
        super().__init__(self.message)
        self.fields = {name: _legible_in(value) for name, value in fields.items() if value not in (None, "", [])}

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"code": self.code, "message": self.message, **self.fields}


class Malformed(Problem):
    code = 400


class Forbidden(Problem):
    code = 403


class NotFound(Problem):
    code = 404


class MethodNotAllowed(Problem):
    code = 405


class TooSlow(Problem):
    code = 408


class Conflict(Problem):
    code = 409


class TooLarge(Problem):
    code = 413


class UnsupportedMedia(Problem):
    code = 415


class Misdirected(Problem):
    code = 421


class Invalid(Problem):
    code = 422


class HeadersTooLarge(Problem):
    code = 431


class Unsupported(Problem):
    code = 501


class Exhausted(Problem):
    code = 503


class TimedOut(Problem):
    code = 504


BY_CODE: dict[int, type[Problem]] = {
    problem.code: problem
    for problem in (
        Problem,
        Malformed,
        Forbidden,
        NotFound,
        MethodNotAllowed,
        TooSlow,
        Conflict,
        TooLarge,
        UnsupportedMedia,
        Misdirected,
        Invalid,
        HeadersTooLarge,
        Unsupported,
        Exhausted,
        TimedOut,
    )
}

EXHAUSTION = {
    codes.ENOSPC: "no space or no inodes are left in {place} (df and df -i tell); make room there",
    codes.EDQUOT: "a quota is used up in {place}; make room or raise it",
    codes.EMFILE: "the process has no file descriptors left; raise LimitNOFILE",
    codes.ENFILE: "the host has no file descriptors left; raise fs.file-max",
    codes.ENOMEM: "no memory is left, of the host or of the service's control group; make room, or raise MemoryMax",
    codes.ENOBUFS: "the host has no memory left for a message; make room",
    codes.EAGAIN: "the host has no processes left; raise kernel.pid_max, kernel.threads-max or the service's TasksMax",
    codes.EROFS: "{place} is read-only; remount it read-write",
}
"""What an errno says the host has run out of, and the remedy."""


CAUSES = {
    codes.EIO: "the storage under it failed; see the 'problem' of what it stands on, and dmesg",
    codes.ECHILD: "the process made for it was killed, by somebody or for want of memory (dmesg tells); ask again",
    codes.ENOENT: "{path} is not there: it was removed, or something is mounted over it (findmnt tells)",
}
"""What an errno says in the middle of our work, where nobody gave it a better meaning."""


def legible(text: str) -> str:
    """`text` as an answer and a file can hold it: what is no UTF-8 in a name of the host's stands in a str of Python as
    a surrogate, here as `\\xff`."""
    return _SURROGATE.sub(lambda found: _spelled(ord(found[0])), text)


def _spelled(number: int) -> str:
    """A surrogate, by the byte that it stands for (PEP 383), if it does for one."""
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else f"\\u{number:04x}"


def _legible_in(value: Any) -> Any:
    """The same for what a field has."""
    if isinstance(value, list):
        return [_legible_in(each) for each in value]
    return legible(value) if isinstance(value, str) else value


def from_dict(body: dict[str, Any]) -> Problem:
    """The problem that `to_dict` described, as raised in another process."""
    fields = {name: value for name, value in body.items() if name not in ("code", "message")}
    return BY_CODE.get(body["code"], Problem)(body["message"], **fields)


def exhausted(words: str, step: str) -> Exhausted | None:
    """What another program's `words` say that the host has run out of; None when they say nothing of the kind."""
    for number, remedy in EXHAUSTION.items():
        if number != codes.EROFS and os.strerror(number) in words:
            return Exhausted(f"{step}: {remedy}", step=step, errno=codes.errorcode[number], detail=words)
    return None


def from_oserror(error: OSError, step: str) -> Problem:
    """The answer to an error of the kernel that nobody gave a better meaning: `step` says what was being done. One
    with an attribute `remedy` says itself what has run out, and what to do."""
    number = error.errno or 0
    name = codes.errorcode.get(number, str(number))
    fields = {"step": step, "errno": name, "detail": getattr(error, "detail", "") or str(error)}
    remedy = getattr(error, "remedy", "") or EXHAUSTION.get(number, "")
    if remedy:
        return Exhausted(f"{step}: {remedy.format(place=_place(error))}", **fields)
    if number == codes.ETIMEDOUT:
        return TimedOut(f"{step}: it did not finish in time", **fields)
    cause = CAUSES[number].format(path=error.filename or "a file") if number in CAUSES else error.strerror or error
    return Problem(f"{step}: {cause} ({name})", **fields)


def no_memory(step: str) -> Problem:
    """The answer to a MemoryError."""
    return from_oserror(OSError(codes.ENOMEM, "out of memory"), step)


def _place(error: OSError) -> str:
    """Which file system an error is about, as far as it says so."""
    path = error.filename
    return f"the file system of {path}" if str(path).startswith("/") else "the run directory's file system"
