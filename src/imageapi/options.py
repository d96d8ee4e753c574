"""How the administrator chooses: the command line, and the environment that existing unit files set."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imageapi import __version__
from imageapi.config import DEFAULT_RUN_DIR, DEFAULT_SOCKET, Config, Tls

LOG_LEVELS = {
    "PANIC": 50,
    "FATAL": 50,
    "ERROR": 40,
    "WARN": 30,
    "WARNING": 30,
    "INFO": 20,
    "DEBUG": 10,
    "TRACE": 5,
}
"""The level names of the Go service, and Python's number for each."""
NO_LIMIT = 1e9
"""Seconds (30 years) that stand for a limit of 0, which in the Go service is none."""
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([a-zµμ]+)")
_SIZE_UNITS = {
    "": 1, "B": 1, "K": 10**3, "KB": 10**3, "KIB": 1 << 10, "M": 10**6, "MB": 10**6, "MIB": 1 << 20,
    "G": 10**9, "GB": 10**9, "GIB": 1 << 30,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,18}) ?([A-Za-z]*)")


def duration(text: str) -> float:
    """The seconds in `text`, written as for Go's time.ParseDuration: `30s`, `1m30s`, `1.5h`, `250ms`, `0`.

    Raises: ValueError, also for one below zero.
    """
    bare = text.removeprefix("+")
    parts = _PART.findall(bare)
    if bare == "0":
        return 0.0
    whole = "".join(number + unit for number, unit in parts) == bare
    if not (parts and whole and all(unit in _UNITS for _, unit in parts)):
        raise ValueError(f"'{text}' is no duration; write it as 30s, 1m30s or 250ms")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _limit(text: str) -> float:
    """The duration in `text`, after which something is given up; of 0 nothing is."""
    return min(duration(text) or NO_LIMIT, NO_LIMIT)


def size(text: str) -> int:
    """The bytes in `text`, more than none: `1000000`, `1MiB`, `64KB`.

    Raises: ValueError.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _SIZE_UNITS or int(match[1]) == 0:
        raise ValueError(f"'{text}' is no size; write it as 1000000, 64KB or 1MiB")
    return int(match[1]) * _SIZE_UNITS[match[2].upper()]


def _argument(read: Any) -> Any:
    """`read` as argparse wants it: its ValueError becomes the message."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _number(text: str, most: int, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most):
        raise ValueError(f"'{text}' is no {what}")
    return int(text)


def _whole(text: str) -> int:
    return _number(text, 2**31 - 1, "number from 0 to 2147483647")


def _port(text: str) -> int:
    return _number(text, 65535, "port; give 0 to 65535 (0: a free one)")


def _host(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty; give a name or an address")
    return text.strip()


def _directory(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError(f"'{text}' is no absolute path")
    return text.rstrip("/") or "/"


def _log_level(text: str) -> int:
    if text.upper() not in LOG_LEVELS:
        raise ValueError(f"'{text}' is no log level; the levels are {', '.join(LOG_LEVELS)}")
    return LOG_LEVELS[text.upper()]


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    def env(name: str, otherwise: str) -> str:
        """An empty variable is none."""
        return environment.get(name) or otherwise

    parser = argparse.ArgumentParser(
        prog="imageapi-server",
        description="Attach block images, mount them and run containers on them, over a REST API.",
        epilog="Durations are written 30s, 1m30s or 250ms, and 0 where there is no limit; sizes 1000000, 64KB or 1MiB.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"imageapi-server {__version__}")
    add(
        "--check",
        action="store_true",
        help="start no server: print what is not as it should be in --run-dir, with or without a server there, and "
        "what would mend it; ends with 0 (nothing), 1 (something) or 2 (something could not be looked at)",
    )

    where = parser.add_argument_group("listeners")
    where.add_argument(
        "--scheme",
        action="append",
        choices=("http", "https", "unix"),
        dest="schemes",
        help="what to listen on; may repeat (unix)",
    )
    where.add_argument(
        "--host",
        type=_argument(_host),
        default=env("HOST", "localhost"),
        help="address of the http listener ($HOST, else localhost)",
    )
    where.add_argument(
        "--port", type=_argument(_port), default=env("PORT", "8080"), help="its port; 0: a free one ($PORT, else 8080)"
    )
    where.add_argument(
        "--socket-path",
        type=_argument(_directory),
        default=DEFAULT_SOCKET,
        help=f"the unix listener ({DEFAULT_SOCKET})",
    )
    where.add_argument("--insecure-http", action="store_true", help="let plain http listen beyond loopback")
    where.add_argument(
        "--allowed-host",
        action="append",
        type=_argument(_host),
        default=[],
        dest="allowed_hosts",
        metavar="NAME",
        help="a further name that the Host of a request may have; may repeat",
    )
    where.add_argument(
        "--listen-limit", type=_argument(_whole), default="0", help="most connections at once (0: no limit)"
    )
    where.add_argument("--keep-alive", type=_argument(_limit), default="3m", help="an idle connection's time (3m)")
    where.add_argument("--read-timeout", type=_argument(_limit), default="30s", help="to read a request (30s)")
    where.add_argument("--write-timeout", type=_argument(_limit), default="60s", help="to write an answer (60s)")
    where.add_argument("--max-header-size", type=_argument(size), default="1000000", help="of a request (1000000)")
    where.add_argument("--max-body-size", type=_argument(size), default="1000000", help="of a request (1000000)")
    _add_tls(where.add_argument, environment)

    work = parser.add_argument_group("work")
    work.add_argument(
        "--run-dir",
        type=_argument(_directory),
        default=DEFAULT_RUN_DIR,
        help=f"mounts, logs and state ({DEFAULT_RUN_DIR})",
    )
    work.add_argument(
        "--first-id",
        type=_argument(_whole),
        default="0",
        help="where ids start (0; 1 for Go clients, whose encoder drops a 0)",
    )
    work.add_argument(
        "--operation-timeout",
        type=_argument(_limit),
        default="25s",
        help="an operation without progress is undone after it (25s)",
    )
    work.add_argument(
        "--stop-timeout", type=_argument(duration), default="30s", help="from the request to exit until SIGKILL (30s)"
    )
    work.add_argument(
        "--log-limit",
        type=_argument(size),
        default="16MiB",
        help="a container's log that has grown to it becomes <log>.1, in place of the last one of that name (16MiB)",
    )
    work.add_argument(
        "--rbd-backend",
        choices=("auto", "kernel", "daemon"),
        default="auto",
        help="map images with the kernel's rbd driver or with qemu-storage-daemon (auto)",
    )
    work.add_argument(
        "--iscsi-backend",
        choices=("auto", "kernel", "daemon"),
        default="auto",
        help="log in to targets with the kernel's initiator (open-iscsi) or with qemu-storage-daemon (auto)",
    )
    work.add_argument(
        "--cleanup-timeout", type=_argument(duration), default="10s", help="at the end, for what is being undone (10s)"
    )
    work.add_argument(
        "--graceful-timeout",
        type=_argument(duration),
        default="15s",
        help="at the end, for requests under way; 0s waits for none (15s)",
    )
    work.add_argument(
        "--log-level",
        type=_argument(_log_level),
        default=env("IMAGEAPI_LOGLEVEL", "INFO"),
        help="PANIC to TRACE ($IMAGEAPI_LOGLEVEL, else INFO)",
    )
    work.add_argument(
        "--environment-file",
        type=_argument(_directory),
        help="read on SIGHUP for a new $IMAGEAPI_LOGLEVEL; what else is in it is taken at the next start",
    )
    work.add_argument(
        "--shutdown",
        action="store_true",
        help="stop all containers, release all storage, and end: for the end of the host, when no server runs",
    )
    return parser


def _add_tls(add: Callable[..., Any], environment: Mapping[str, str]) -> None:
    """The options of the https listener, and the variables of existing unit files."""
    host, port = environment.get("TLS_HOST") or "localhost", environment.get("TLS_PORT") or "8443"
    add("--tls-host", type=_argument(_host), default=host, help="the https listener's ($TLS_HOST, else localhost)")
    add("--tls-port", type=_argument(_port), default=port, help="its port; 0: a free one ($TLS_PORT, else 8443)")
    for name, variable, what in (
        ("certificate", "TLS_CERTIFICATE", "file with its certificate, and those between it and its authority"),
        ("key", "TLS_PRIVATE_KEY", "file with the certificate's key"),
        ("ca", "TLS_CA_CERTIFICATE", "file with the authorities one of which must have signed a client's certificate"),
    ):
        add(f"--tls-{name}", default=environment.get(variable) or None, metavar="FILE", help=f"{what} (${variable})")
    add("--tls-listen-limit", type=_argument(_whole), help="as --listen-limit, over https (the same)")
    for name in ("keep-alive", "read-timeout", "write-timeout"):
        add(f"--tls-{name}", type=_argument(_limit), help=f"as --{name}, over https (the same)")


def variables(text: str) -> dict[str, str]:
    """What an environment file says, as systemd.exec(5) has it, without lines that go on in the next one.

    Raises: ValueError, when quotes are left open.
    """
    found = {}
    for line in text.splitlines():
        name, is_set, value = line.strip().partition("=")
        if is_set and not name.startswith(("#", ";")):
            found[name.strip()] = " ".join(shlex.split(value))
    return found


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """The choice made by a command line and an environment. Ends the process with a message when they are wrong."""
    parser = _parser(environment)
    chosen = vars(parser.parse_args(arguments))
    schemes = tuple(dict.fromkeys(chosen.pop("schemes") or ("unix",)))
    values = {name: value for name, value in chosen.items() if not name.startswith("tls_")}
    tls = Tls(**{name.removeprefix("tls_"): value for name, value in chosen.items() if name not in values})
    if "https" in schemes and not (tls.certificate and tls.key):
        parser.error("--scheme https: give --tls-certificate and --tls-key, or use unix, or http on loopback")
    values["allowed_hosts"] = tuple(values["allowed_hosts"])
    return Config(schemes=schemes, tls=tls, **values)
