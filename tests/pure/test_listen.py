"""Where the service listens: what it may take, what it leaves alone, and what it removes at the end."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from imageapi.api.listen import Listeners
from imageapi.config import Config
from imageapi.errors import Conflict, Invalid

pytestmark = pytest.mark.pure


@pytest.fixture
def path(run_dir: Path) -> Path:
    return run_dir / "api.sock"


def unix(path: Path) -> Listeners:
    return Listeners(Config(schemes=("unix",), socket_path=str(path)))


def http(**config: Any) -> Config:
    return Config(schemes=("http",), **{"port": 0, **config})


def test_the_socket_is_roots_alone_and_goes_at_the_end(path: Path) -> None:
    before = os.umask(0)
    listeners = unix(path)
    mode = path.stat().st_mode
    assert os.umask(before) == 0, "the mask of the process is as it was"
    assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
    assert listeners.names == [f"unix:{path}"]
    listeners.close()
    assert not path.exists()


def test_a_socket_that_nobody_listens_on_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listeners = unix(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listeners.close()


def test_a_socket_that_somebody_listens_on_is_left_alone(path: Path) -> None:
    first = unix(path)
    with pytest.raises(Conflict, match="listens"):
        unix(path)
    assert path.exists()
    first.close()


def test_a_socket_that_has_taken_our_place_is_not_removed(path: Path) -> None:
    first = unix(path)
    path.unlink()
    second = unix(path)
    first.close()
    assert path.exists()
    second.close()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_what_is_no_socket_is_left_alone(path: Path, make: Any) -> None:
    make(path)
    with pytest.raises(Invalid, match="socket"):
        unix(path)
    assert path.exists()


def test_a_directory_that_is_not_there(path: Path) -> None:
    with pytest.raises(Invalid, match="--socket-path"):
        unix(path / "below")


def test_what_is_bound_goes_when_the_next_cannot_be(path: Path) -> None:
    with pytest.raises(Invalid, match="--insecure-http"):
        Listeners(Config(schemes=("unix", "http"), socket_path=str(path), host="0.0.0.0", port=0))
    assert not path.exists()


def test_localhost_is_both_of_its_addresses_on_one_port() -> None:
    listeners = Listeners(http(host="localhost"))
    ports = {name.rpartition(":")[2] for name in listeners.names}
    hosts = [name.removeprefix("http://").rpartition(":")[0] for name in listeners.names]
    listeners.close()
    assert (len(ports), hosts[0]) == (1, "127.0.0.1")
    assert hosts[1:] == (["[::1]"] if _has_ipv6() else [])


def _has_ipv6() -> bool:
    """Whether this machine's loopback has an IPv6 address (proc(5): if_inet6)."""
    return "00000000000000000000000000000001" in Path("/proc/net/if_inet6").read_text()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_plain_http_is_heard_on_loopback_only(host: str) -> None:
    with pytest.raises(Invalid, match="--insecure-http"):
        Listeners(http(host=host))


def test_unless_it_is_told_otherwise() -> None:
    listeners = Listeners(http(host="0.0.0.0", insecure_http=True))
    assert listeners.names[0].startswith("http://0.0.0.0:")
    listeners.close()


def test_an_address_of_another_machine() -> None:
    with pytest.raises(Invalid, match=r"192\.0\.2\.1"):
        Listeners(http(host="192.0.2.1", insecure_http=True))


def test_a_name_that_is_nobodys() -> None:
    with pytest.raises(Invalid, match="--host"):
        Listeners(http(host="a host with spaces"))


def test_a_port_in_use_is_named() -> None:
    first = Listeners(http(host="127.0.0.1"))
    port = int(first.names[0].rpartition(":")[2])
    with pytest.raises(Invalid, match=f"--port {port}"):
        Listeners(http(host="127.0.0.1", port=port))
    first.close()
