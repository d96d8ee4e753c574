"""The command line and the environment: what existing unit files say starts, and what means nothing is named."""

from __future__ import annotations

from typing import Any

import pytest

from imageapi.config import Config, Site, Tls
from imageapi.options import NO_LIMIT, duration, parse, size
from imageapi.records import Key

pytestmark = pytest.mark.pure


def refuse(capsys: pytest.CaptureFixture[str], arguments: list[str], environment: dict[str, str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(arguments, environment)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_is_chosen_where_nothing_is_said() -> None:
    assert parse([], {}) == Config()


SAID: list[tuple[list[str], dict[str, str], dict[str, Any]]] = [
    (["--scheme=http"], {}, {"schemes": ("http",)}),
    (["--scheme", "http", "--scheme=unix", "--scheme=http"], {}, {"schemes": ("http", "unix")}),
    (["--host=::1", "--port=0"], {}, {"host": "::1", "port": 0}),
    (["--socket-path=/run/x.sock"], {}, {"socket_path": "/run/x.sock"}),
    (["--run-dir", "/run/mine/"], {}, {"run_dir": "/run/mine"}),
    (["--cleanup-timeout=1m", "--graceful-timeout=0"], {}, {"cleanup_timeout": 60.0, "graceful_timeout": 0.0}),
    (["--max-header-size=1MiB", "--max-body-size", "64KB"], {}, {"max_header_size": 2**20, "max_body_size": 64_000}),
    (["--listen-limit=7", "--keep-alive=3m"], {}, {"listen_limit": 7, "keep_alive": 180.0}),
    (["--read-timeout=1m30s", "--write-timeout=250ms"], {}, {"read_timeout": 90.0, "write_timeout": 0.25}),
    (["--stop-timeout=0s", "--operation-timeout=5s"], {}, {"stop_timeout": 0.0, "operation_timeout": 5.0}),
    (["--first-id=1", "--insecure-http"], {}, {"first_id": 1, "insecure_http": True}),
    (["--allowed-host=a", "--allowed-host", "b"], {}, {"allowed_hosts": ("a", "b")}),
    (["--rbd-backend=daemon", "--log-level=debug"], {}, {"rbd_backend": "daemon", "log_level": 10}),
    (["--iscsi-backend=kernel"], {}, {"iscsi_backend": "kernel"}),
    ([], {"HOST": "127.0.0.1", "PORT": "90", "IMAGEAPI_LOGLEVEL": "TRACE"},
     {"host": "127.0.0.1", "port": 90, "log_level": 5}),
    (["--host=localhost", "--port=1", "--log-level=WARN"], {"HOST": "a", "PORT": "x", "IMAGEAPI_LOGLEVEL": "y"},
     {"port": 1, "log_level": 30}),
    ([], {"HOST": "", "PORT": "", "IMAGEAPI_LOGLEVEL": ""}, {}),
    (["--tls-host=a", "--tls-port=1", "--tls-certificate=/c", "--tls-key=/k", "--tls-ca=/a", "--tls-listen-limit=1",
      "--tls-keep-alive=3m", "--tls-read-timeout=1s", "--tls-write-timeout=1s"],
     {"TLS_HOST": "b", "TLS_PORT": "2", "TLS_CERTIFICATE": "/d", "TLS_PRIVATE_KEY": "/d", "TLS_CA_CERTIFICATE": "/d"},
     {"tls": Tls(host="a", port=1, certificate="/c", key="/k", ca="/a", listen_limit=1, keep_alive=180.0,
                 read_timeout=1.0, write_timeout=1.0)}),
    (["--scheme=https"],
     {"TLS_HOST": "a", "TLS_PORT": "1", "TLS_CERTIFICATE": "/c", "TLS_PRIVATE_KEY": "/k", "TLS_CA_CERTIFICATE": "/a"},
     {"schemes": ("https",), "tls": Tls(host="a", port=1, certificate="/c", key="/k", ca="/a")}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "environment", "chosen"), SAID)
def test_what_is_said_is_chosen(arguments: list[str], environment: dict[str, str], chosen: dict[str, Any]) -> None:
    assert parse(arguments, environment) == Config(**chosen)


def test_the_limits_over_tls_are_the_others_where_none_are_given() -> None:
    chosen = parse(["--read-timeout=7s", "--listen-limit=3", "--tls-listen-limit=2", "--tls-keep-alive=9s"], {})
    over = chosen.over_tls()
    assert (over.read_timeout, over.listen_limit, over.keep_alive, over.write_timeout) == (7.0, 2, 9.0, 60.0)
    assert (chosen.listen_limit, chosen.keep_alive) == (3, 180.0)


@pytest.mark.parametrize("option", ["read", "write", "operation"])
def test_a_limit_of_0_is_none(option: str) -> None:
    for none in ("0", "0s", "9000000h"):
        assert getattr(parse([f"--{option}-timeout={none}"], {}), f"{option}_timeout") == NO_LIMIT
    assert parse(["--keep-alive=0"], {}).keep_alive == NO_LIMIT


@pytest.mark.parametrize(
    ("level", "number"),
    [("PANIC", 50), ("FATAL", 50), ("ERROR", 40), ("WARN", 30), ("INFO", 20), ("DEBUG", 10), ("TRACE", 5),
     ("trace", 5)],
)  # fmt: skip
def test_the_levels_of_the_go_service(level: str, number: int) -> None:
    assert parse([], {"IMAGEAPI_LOGLEVEL": level}).log_level == number


REFUSED: list[tuple[list[str], dict[str, str], str]] = [
    (["--scheme=https"], {}, "give --tls-certificate and --tls-key"),
    (["--scheme=http", "--scheme=https", "--tls-certificate=/c"], {}, "give --tls-certificate and --tls-key"),
    (["--scheme=gopher"], {}, "'http', 'https', 'unix'"),
    (["--port=65536"], {}, "'65536' is no port"),
    (["--port=-1"], {}, "'-1' is no port"),
    (["--port=²"], {}, "'²' is no port"),
    (["--port=" + "9" * 5000], {}, "is no port"),
    ([], {"PORT": "tcp://10.0.0.1:80"}, "is no port"),
    (["--host="], {}, "--host: it is empty"),
    (["--allowed-host= "], {}, "--allowed-host: it is empty"),
    (["--first-id=2147483648"], {}, "from 0 to 2147483647"),
    (["--listen-limit=-1"], {}, "from 0 to 2147483647"),
    (["--run-dir=here"], {}, "'here' is no absolute path"),
    (["--socket-path="], {}, "'' is no absolute path"),
    (["--read-timeout=30"], {}, "write it as 30s, 1m30s"),
    (["--stop-timeout=-1s"], {}, "'-1s' is no duration"),
    (["--max-header-size=0"], {}, "write it as 1000000, 64KB or 1MiB"),
    (["--rbd-backend=nbd"], {}, "'auto', 'kernel', 'daemon'"),
    ([], {"IMAGEAPI_LOGLEVEL": "LOUD"}, "PANIC, FATAL, ERROR, WARN"),
    (["--read-time=30s"], {}, "unrecognized arguments: --read-time=30s"),
    (["run"], {}, "unrecognized arguments: run"),
]


@pytest.mark.parametrize(("arguments", "environment", "words"), REFUSED)
def test_what_means_nothing_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], environment: dict[str, str], words: str
) -> None:
    assert words in refuse(capsys, arguments, environment)


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"], {})
    said = capsys.readouterr().out
    assert ended.value.code == 0
    for field in Config.__struct_fields__:
        option = {"schemes": "scheme", "allowed_hosts": "allowed-host"}.get(field, field.replace("_", "-"))
        assert f"--{option}" in said


DURATIONS = [("0", 0.0), ("0s", 0.0), ("30s", 30.0), ("1m30s", 90.0), ("2h45m", 9900.0), ("1.5h", 5400.0), (".5s", 0.5),
             ("1.s", 1.0), ("+5s", 5.0), ("250ms", 0.25), ("1m250ms", 60.25), ("500us", 0.0005), ("500µs", 0.0005),
             ("500μs", 0.0005), ("5ns", 5e-9), ("1s1m", 61.0)]  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), DURATIONS)
def test_durations_are_gos(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", ".s", "1d", "-1s", "+", "30 s", "30s ", "1h-1m", "1.2.3s", "\u0661s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        duration(text)
    assert "is no duration" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("1000000", 10**6), ("64KB", 64_000), ("64kib", 65_536), ("1MiB", 2**20), ("10 MB", 10**7),
     ("1G", 10**9), ("2GiB", 2**31)],
)  # fmt: skip
def test_sizes(text: str, number: int) -> None:
    assert size(text) == number


@pytest.mark.parametrize("text", ["", "0", "0KB", "x", "1.5MB", "-1", "1XB", "KB", "\u0661", "9" * 5000])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        size(text)
    assert "is no size" in str(caught.value)


def test_the_mark_of_any_object_fits_the_kernel() -> None:
    """lo_file_name has 64 bytes (loop(4)); we keep to 40."""
    site = Config(run_dir="/run/x").site("0123abcd")
    assert site == Site(run_dir="/run/x", instance="0123abcd")
    assert len(site.mark(Key("container", 2**31 - 1))) <= 40
