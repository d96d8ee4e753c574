"""The server as a service of a guest with systemd as its init, installed as docs/systemd.md says."""

from __future__ import annotations

from lab.guest.guest import Guest
from lab.guest.server import STARTS
from lab.server import Api, eventually

SERVER, CONTAINERS, SOCKET = "imageapi-server.service", "imageapi-containers.service", "imageapi-server.socket"
CODE = "/opt/imageapi"
UNITS = "/etc/systemd/system"
ENVIRONMENT = "/etc/default/imageapi-server"

# In the place of a virtual environment: in a guest making one takes minutes.
PROGRAM = f"""\
#!/bin/sh
PYTHONPATH={CODE}/src:/lab/packages exec python3 -m imageapi.server "$@"
"""


class Service(Api):
    """The installed server; `guest` must have been restored from a state with systemd."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest.api_socket)
        self.guest = guest

    def install(self) -> None:
        self.guest.sh(f"mkdir -p {CODE}/bin; cp -a /imageapi/src {CODE}; cp /imageapi/packaging/systemd/* {UNITS}")
        self.guest.write(f"{CODE}/bin/imageapi-server", PROGRAM)
        self.guest.run("chmod", "755", f"{CODE}/bin/imageapi-server")
        self.systemctl("daemon-reload")

    def systemctl(self, *words: str) -> str:
        """Raises: GuestError, with what systemctl says."""
        return self.guest.run("systemctl", *words, timeout=STARTS).strip()

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit)

    @property
    def pid(self) -> int:
        """The server's; 0 while there is none."""
        return int(self.show(SERVER, "MainPID"))

    def again(self, before: int) -> int:
        """Wait until another process than `before` serves; its pid."""
        eventually(
            lambda: self.pid not in (0, before) and self.show(SERVER, "ActiveState") == "active", "it is back", 60
        )
        self.reconnect()
        return self.pid

    def unit_of(self, pid: int) -> list[str]:
        """The control group of a process, from the root on."""
        return self.guest.read(f"/proc/{pid}/cgroup").decode().strip().split("/")[1:]

    def drop_in(self, unit: str, text: str) -> None:
        """Change a unit by a file beside it; no text takes the change away."""
        directory = f"{UNITS}/{unit}.d"
        self.guest.run("mkdir", "-p", directory)
        self.guest.write(f"{directory}/test.conf", text)
        self.systemctl("daemon-reload")

    def journal(self, unit: str = SERVER) -> str:
        """What a unit has said in this boot."""
        return self.guest.run("journalctl", "--quiet", "--no-pager", "--output=cat", "--unit", unit)
