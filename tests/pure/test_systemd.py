"""What systemd and the service tell each other, and the unit files."""

from __future__ import annotations

import configparser
import os
import re
import socket
from pathlib import Path

import pytest

from imageapi.api.listen import Listeners
from imageapi.config import Config
from imageapi.errors import Invalid
from imageapi.linux.systemd import Service, with_grace
from imageapi.options import variables

pytestmark = pytest.mark.pure

UNITS = Path(__file__).parents[2] / "packaging/systemd"


@pytest.fixture
def manager(run_dir: Path) -> socket.socket:
    """Where systemd would hear."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    channel.bind(str(run_dir / "notify"))
    return channel


def test_what_systemd_gives_is_taken_from_the_environment() -> None:
    given = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid()), "PATH": "/bin"}
    assert Service.take(given) == Service("/x", 30.0, [])
    assert given == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "given", [{}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "LISTEN_FDS": "2", "LISTEN_PID": "1"}]
)
def test_what_is_another_processs_is_not_taken(given: dict[str, str]) -> None:
    service = Service.take(given)
    assert service == Service(listeners=[])
    assert service.tell("READY=1"), "nobody is there who has to hear it"


def test_it_is_told_in_one_datagram(manager: socket.socket) -> None:
    with manager:
        service = Service(address=manager.getsockname())
        assert service.tell("READY=1", "STATUS=all is well")
        assert manager.recv(1000) == b"READY=1\nSTATUS=all is well"
        assert service.reloading()
        assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", manager.recv(1000))
    assert with_grace(1.5) == "EXTEND_TIMEOUT_USEC=1500000"


def test_an_abstract_socket_is_reached() -> None:
    name = f"imageapi-{os.urandom(8).hex()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        assert Service(address=f"@{name}").tell("READY=1")
        assert manager.recv(1000) == b"READY=1"


def test_a_manager_that_does_not_listen_is_not_waited_for(manager: socket.socket) -> None:
    with manager:
        service = Service(address=manager.getsockname())
        told = 0
        while service.tell(f"STATUS={told}"):
            told += 1
        manager.recv(1000)
        assert service.tell("READY=1")
    assert not service.tell("READY=1"), "it has gone"


# ------------------------------------------------------------------------------------------------ its sockets


def test_a_socket_that_is_handed_over_is_the_only_listener_and_stays(run_dir: Path) -> None:
    path = run_dir / "given"
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(str(path))
        given.listen()
        listeners = Listeners(Config(socket_path=str(run_dir / "own")), [given.dup()])
        assert listeners.names == [f"unix:{path}"]
        listeners.close()
        assert path.exists(), "it is whose it was"
        assert not (run_dir / "own").exists()


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_one_on_loopback_is_taken(family: socket.AddressFamily, address: str) -> None:
    with socket.create_server((address, 0), family=family) as given:
        port = given.getsockname()[1]
        listeners = Listeners(Config(), [given.dup()])
        [name] = listeners.names
        listeners.close()
        assert name.endswith(f":{port}")


def test_one_that_is_heard_beyond_loopback_is_refused() -> None:
    with socket.create_server(("0.0.0.0", 0)) as given:
        with pytest.raises(Invalid, match=r"ListenStream= 0\.0\.0\.0:.*--insecure-http"):
            Listeners(Config(), [given])
        listeners = Listeners(Config(insecure_http=True), [given.dup()])
        assert listeners.names
        listeners.close()


def test_one_that_does_not_listen_is_refused() -> None:
    with socket.socket(socket.AF_UNIX) as given, pytest.raises(Invalid, match="ListenStream="):
        Listeners(Config(), [given])


# ------------------------------------------------------------------------------------------------- its files


def test_an_environment_file_is_read_as_systemd_does() -> None:
    text = "# A comment\n\nA=1\n B = two words \nC='quo ted' more\n;D=4\nE=\nno assignment\n"
    assert variables(text) == {"A": "1", "B": "two words", "C": "quo ted more", "E": ""}
    with pytest.raises(ValueError, match="quotation"):
        variables("A='open")


FORBIDDEN = re.compile(
    r"(Private\w+|Protect\w+|(ReadOnly|ReadWrite|Inaccessible|Exec|NoExec)Paths|Bind(ReadOnly)?Paths|RootDirectory"
    r"|RootImage|MountFlags|TemporaryFileSystem|DynamicUser|\w+Directory|NoNewPrivileges|SystemCall\w+|Restrict\w+"
    r"|CapabilityBoundingSet|LockPersonality|MemoryDenyWriteExecute|Delegate|User|Group|\w*Limit)=",
    re.IGNORECASE,
)


def sections(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNITS / name)
    return parser


@pytest.mark.parametrize("name", ["imageapi-server.service", "imageapi-containers.service"])
def test_a_unit_gives_no_mount_namespace_and_takes_no_rights(name: str) -> None:
    lines = [line for line in (UNITS / name).read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if FORBIDDEN.match(line) and not line.startswith("StartLimit")] == []


def test_the_units_spare_what_is_not_the_server() -> None:
    server, containers = sections("imageapi-server.service"), sections("imageapi-containers.service")
    assert server["Service"]["KillMode"] == containers["Service"]["KillMode"] == "process"
    assert server["Service"]["Type"] == "notify"
    assert "imageapi-containers.service" in server["Unit"]["After"], "it ends first, and comes last"
    assert server["Unit"]["Requires"] == "imageapi-containers.service"
    assert "--shutdown" in containers["Service"]["ExecStop"]
