"""`imageapi-server`: what comes before the service.

The order matters. The zygote is forked while this process is small and has one thread; what only the service needs is
imported after that, so that its memory is not the workers' and the supervisor's too.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
import sys
from typing import NoReturn

from imageapi import lean, options
from imageapi.config import Config, Site
from imageapi.engine import rundir, zygote
from imageapi.errors import Problem, from_oserror
from imageapi.linux.systemd import Service, booted, restrictions

OLDEST_KERNEL = (5, 14)
"""RHEL 9's. Older ones lack what roots are built with (mount_setattr, 5.12) and how containers are killed."""
FEWEST_DESCRIPTORS = 32
"""Without a single container the supervisor has nearly as many."""


def main() -> NoReturn:
    """The whole life of the process. It leaves by os._exit: a thread that hangs must not keep it."""
    systemd = Service.take(os.environ)
    config = options.parse(sys.argv[1:], os.environ)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        _check_host()
        if config.check:
            _check(config)
        _raise_descriptor_limit()
        site, workers_lock = rundir.prepare(config)
        watch = rundir.watching()
        control = zygote.launch(site, keep=[workers_lock, *([watch] if watch >= 0 else [])])
        os.close(workers_lock)
        _serve(config, site, control, watch, systemd)
    except (Problem, OSError) as error:
        problem = from_oserror(error, "serving") if isinstance(error, OSError) else error
        print(f"imageapi-server: {problem}", file=sys.stderr, flush=True)
        os._exit(2 if config.check else 1)
    os._exit(0)


def _check(config: Config) -> NoReturn:
    """Report on the host in place of serving."""
    from imageapi.engine import check

    status = check.main(config)
    sys.stdout.flush()
    os._exit(status)


def _check_host() -> None:
    """Raises: Problem, when nothing could work here."""
    if os.geteuid() != 0:
        raise Problem("it mounts, attaches and makes namespaces, and so must run as root")
    release = os.uname().release
    if _version(release) < OLDEST_KERNEL:
        raise Problem(f"kernel {release} is too old; it needs {'.'.join(map(str, OLDEST_KERNEL))} or newer")
    for complaint in restrictions() if booted() else ():
        logging.getLogger("imageapi").error("as a service of systemd's %s", complaint)


def _version(release: str) -> tuple[int, ...]:
    """The first two numbers of a kernel's release; what else stands there is its builder's ("6.1+", "6.12.1-rc2")."""
    return tuple(map(int, re.findall(r"\d+", release)[:2]))


def _raise_descriptor_limit() -> None:
    """Each container costs the supervisor a few descriptors; containers themselves get the usual limits."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < FEWEST_DESCRIPTORS:
        raise Problem(f"LimitNOFILE is {most}: nothing works with less than {FEWEST_DESCRIPTORS}; raise it")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _serve(config: Config, site: Site, control: socket.socket, watch: int, systemd: Service) -> None:
    lean.load_event_loop()
    from imageapi import service

    given = service.Given(control, watch, systemd, _config_of_now)
    (service.shut_down if config.shutdown else service.run)(config, site, given)


def _config_of_now(environment_file: str) -> Config:
    """What a start with this file as its environment would choose.

    Raises: OSError; ValueError; SystemExit, when it says what cannot be, with a message on stderr.
    """
    with open(environment_file, encoding="utf-8") as file:
        return options.parse(sys.argv[1:], {**os.environ, **options.variables(file.read())})


if __name__ == "__main__":
    main()
