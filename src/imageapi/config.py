"""What the administrator chooses (options.py reads it).

`Config` is the whole choice; `Site` is the part of it that drivers, workers and the supervisor need: where things are.
Both are values; nothing here touches the host.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from imageapi.records import Key

Backend = Literal["auto", "kernel", "daemon"]
"""Who attaches the images of a store: the kernel's driver, a storage daemon, or whichever is there."""

BASE = "/imageapi/v1"
"""What all paths of the API begin with."""
DEFAULT_RUN_DIR = "/var/run/imageapi"
DEFAULT_SOCKET = "/var/run/imageapi.sock"
LOG_LIMIT = 16 << 20
"""Bytes that a container's log grows to before it is put aside, unless another number is chosen."""


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything of one server is. `instance` is the run directory's own random id (8 hex digits)."""

    run_dir: str = DEFAULT_RUN_DIR
    instance: str = "00000000"
    rbd_backend: Backend = "auto"
    iscsi_backend: Backend = "auto"
    log_limit: int = LOG_LIMIT

    def mark(self, key: Key) -> str:
        """What the kernel objects made for `key` carry, so that they are known for ours: at most 40 characters,
        which fits `lo_file_name` (loop(4)) and the source of a mount."""
        return f"{self.mark_prefix}{key.collection}/{key.id}"

    @property
    def mark_prefix(self) -> str:
        """What every mark of this server begins with."""
        return f"imageapi:{self.instance}:"

    @property
    def scope(self) -> str:
        """The unit of systemd's that our containers and storage helpers are in, on a host where it runs."""
        return f"imageapi-{self.instance}.scope"

    @property
    def mounts_dir(self) -> str:
        return f"{self.run_dir}/mounts"

    @property
    def logs_dir(self) -> str:
        return f"{self.run_dir}/logs"

    @property
    def state_dir(self) -> str:
        """Records; root's alone (mode 0700): they hold secrets."""
        return f"{self.run_dir}/state"

    @property
    def supervisor_dir(self) -> str:
        """What the supervisor keeps of each container's first process."""
        return f"{self.run_dir}/supervisor"

    @property
    def helpers_dir(self) -> str:
        """Sockets and export files of storage helpers; root's alone."""
        return f"{self.run_dir}/helpers"

    def mountpoint(self, token: int) -> str:
        return f"{self.mounts_dir}/mount_{token:09d}"

    def upperdir(self, token: int) -> str:
        return f"{self.mounts_dir}/upper_{token:09d}"

    def workdir(self, token: int) -> str:
        return f"{self.mounts_dir}/work_{token:09d}"

    def logfile(self, container: int, created: int) -> str:
        """`created` is the container's creation as seconds since the epoch."""
        return f"{self.logs_dir}/{container}-{created}.log"


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """The https listener. `certificate`, `key` and `ca` are files; the limits are those of plain http where they are
    None."""

    host: str = "localhost"
    port: int = 8443
    certificate: str | None = None
    key: str | None = None
    ca: str | None = None
    listen_limit: int | None = None
    keep_alive: float | None = None
    read_timeout: float | None = None
    write_timeout: float | None = None


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be chosen. Times are seconds, sizes bytes."""

    schemes: tuple[str, ...] = ("unix",)
    tls: Tls = Tls()
    host: str = "localhost"
    port: int = 8080
    socket_path: str = DEFAULT_SOCKET
    run_dir: str = DEFAULT_RUN_DIR
    allowed_hosts: tuple[str, ...] = ()
    insecure_http: bool = False
    first_id: int = 0
    rbd_backend: Backend = "auto"
    iscsi_backend: Backend = "auto"
    log_limit: int = LOG_LIMIT
    stop_timeout: float = 30.0
    operation_timeout: float = 25.0
    cleanup_timeout: float = 10.0
    graceful_timeout: float = 15.0
    max_header_size: int = 1_000_000
    max_body_size: int = 1_000_000
    listen_limit: int = 0
    keep_alive: float = 180.0
    read_timeout: float = 30.0
    write_timeout: float = 60.0
    log_level: int = 20
    environment_file: str | None = None
    shutdown: bool = False
    check: bool = False

    def over_tls(self) -> Config:
        """The same, with the limits of the https listener."""
        own = {
            name: getattr(self.tls, name) for name in ("listen_limit", "keep_alive", "read_timeout", "write_timeout")
        }
        return msgspec.structs.replace(self, **{name: value for name, value in own.items() if value is not None})

    def site(self, instance: str) -> Site:
        return Site(
            run_dir=self.run_dir,
            instance=instance,
            rbd_backend=self.rbd_backend,
            iscsi_backend=self.iscsi_backend,
            log_limit=self.log_limit,
        )
