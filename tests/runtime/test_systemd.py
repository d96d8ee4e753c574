"""systemd as a container's first process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageapi.config import Site
from imageapi.linux import cgroup, pidfd
from imageapi.runtime.protocol import Started
from lab.images import systemd_image
from lab.supervised import Supervised, eventually, overlay, squashfs

pytestmark = pytest.mark.kernel

INIT = "/usr/lib/systemd/systemd"
HALT = signal.SIGRTMIN + 3
WITH_SYSTEMD = ["mounting /run", "mounting /tmp", "mounting /sys/fs/cgroup", "mounting /var/lib/journal"]


@pytest.fixture
def supervised(site: Site, run_dir: Path) -> Iterator[Supervised]:
    """A supervisor whose containers have a Debian with systemd as their root."""
    with squashfs(systemd_image(), run_dir / "debian") as lower, overlay(lower, run_dir / "overlay") as root:
        running = Supervised(site, root)
        yield running
        running.close()


def boot(supervised: Supervised) -> Started:
    return supervised.start(INIT, systemd=True)


def inside(started: Started, *argv: str) -> str:
    """What a command prints in the container's namespaces."""
    command = ["nsenter", "-t", str(started.pid), "-a", *argv]
    with os.popen(" ".join(command)) as pipe:
        return pipe.read().strip()


def await_running(started: Started) -> None:
    eventually(lambda: inside(started, "systemctl", "is-system-running") == "running", "systemd is running")


def test_it_runs_and_halts(supervised: Supervised) -> None:
    started = boot(supervised)
    await_running(started)
    assert pidfd.catches(started.pid, HALT)
    supervised.signal(started, HALT)
    assert supervised.end_of(started).exit_code in (0, 128 + signal.SIGINT)


def test_its_log_has_the_tutorials_lines(supervised: Supervised) -> None:
    boot(supervised)
    steps = [line.removeprefix("init: ") for line in supervised.steps()]
    at = steps.index("mounting /sys")
    assert steps[at + 1 : at + 5] == WITH_SYSTEMD
    assert steps[at + 5] == "making device file /dev/null"
    assert "making device file /dev/console" not in steps


def test_it_finds_what_a_container_manager_promises(supervised: Supervised) -> None:
    started = boot(supervised)
    environment = Path(f"/proc/{started.pid}/environ").read_text().rstrip("\0")
    variables = dict(item.split("=", 1) for item in environment.split("\0"))
    assert set(variables) == {"PATH", "container", "container_uuid", "NOTIFY_SOCKET"}
    assert variables["container"] == "imageapi"
    assert variables["container_uuid"].count("-") == 4
    mounts = [line.split() for line in inside(started, "cat", "/proc/mounts").splitlines()]
    options = {mount[1]: mount[3].split(",") for mount in mounts}
    for place in ("/sys", "/proc/sys", "/run/host"):
        assert "ro" in options[place], place
    for place in ("/sys/fs/cgroup", "/run", "/tmp", "/var/lib/journal"):
        assert "rw" in options[place], place
    assert inside(started, "stat", "-c", "%t:%T", "/dev/console") == "1:3"


def test_it_has_a_group_of_its_own_in_every_hierarchy(supervised: Supervised) -> None:
    started = boot(supervised)
    ours, theirs = cgroup.own_groups(), cgroup.own_groups(started.pid)
    name = f"imageapi-{supervised.site.instance}-container-0-1"
    assert theirs.keys() == ours.keys()
    for controllers, group in theirs.items():
        assert f"/{name}" in group, controllers
    seen = {line.split(":")[2] for line in inside(started, "cat", "/proc/1/cgroup").splitlines()}
    assert seen <= {"/", "/init.scope"}
    supervised.kill(started)
    places = [Path(one.directory, name) for one in cgroup.hierarchies()]
    assert len(places) == len(ours)
    eventually(lambda: not [place for place in places if place.exists()], "its groups are gone")


def test_it_is_taken_up_by_the_next_supervisor(supervised: Supervised) -> None:
    started = boot(supervised)
    await_running(started)
    supervised.kill_supervisor()
    supervised.resume()
    assert inside(started, "systemctl", "daemon-reexec") == ""  # it notifies again: somebody must read
    await_running(started)
    supervised.signal(started, HALT)
    assert supervised.end_of(started).exit_code in (0, 128 + signal.SIGINT)
    assert not supervised.life(started).running  # asked after the news, it has cleared up before it answers
    assert os.listdir(f"{supervised.site.supervisor_dir}/keep/hosts") == []


def test_a_restart_asked_for_inside_is_an_end_by_sighup(supervised: Supervised) -> None:
    started = boot(supervised)
    await_running(started)
    inside(started, "systemctl", "reboot", "--force", "--force")
    assert supervised.end_of(started).exit_code == 128 + signal.SIGHUP
