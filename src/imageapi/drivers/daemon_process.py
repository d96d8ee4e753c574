"""One qemu-storage-daemon: its process, its directory, and who is in it.

All that is known of a daemon is in its directory and in itself, so any process can take over. The directory is its
lock (flock(2)): who talks to it, or ends it, holds that.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Iterator

from imageapi import errors
from imageapi.config import Site
from imageapi.drivers.deadline import Deadline
from imageapi.drivers.qmp import Qmp, conversation, listens
from imageapi.errors import Problem, Unsupported
from imageapi.linux import mount, mountinfo, pidfd, process, scope
from imageapi.linux.tree import remove_tree
from imageapi.records import Helper

PROGRAM = "qemu-storage-daemon"
PACKAGES = "qemu-storage-daemon and its block drivers (on Debian: qemu-system-common and qemu-block-extra)"
FUSE = "/dev/fuse"

QUIT_TIMEOUT = 2.0
"""Seconds for a daemon without images to end by itself; then it is killed."""

GREETING_TIMEOUT = 2.0
"""Seconds after which a daemon that nobody else talks to, and that does not greet, hangs."""

EXPORT = "export"
"""The file in a member's directory on which its image is mounted."""

LEFT = "left"
"""The file that says that nothing of the kernel's stands on the image any more, though the daemon may have it open."""

_KILLED = -signal.SIGKILL


def missing() -> str | None:
    """What keeps a daemon from being used here, and the remedy. Its block drivers are seen only when they are used."""
    if process.find_program(PROGRAM) is None:
        return f"install {PACKAGES}"
    if not os.path.exists(FUSE):
        return f"there is no {FUSE}; load the module fuse"
    return None


class Daemon:
    """A daemon whose lock is held. It may be running, not yet running, or dead."""

    def __init__(self, site: Site, name: str, directory: int) -> None:
        self._site = site
        self._name = name
        self._directory = directory
        self.path = f"{site.helpers_dir}/{name}"

    def members(self) -> list[str]:
        """The directories of the images it serves, those included that are only on the way."""
        helpers = self._site.helpers_dir
        return [entry for entry in os.listdir(helpers) if link(f"{helpers}/{entry}") == self._name]

    def serves_others(self, member: str) -> bool:
        """Whether it has an image open, other than that of the directory `member`, on which something may stand."""
        return any(other != member and self._serves(f"{self._site.helpers_dir}/{other}") for other in self.members())

    @staticmethod
    def _serves(directory: str) -> bool:
        left = os.path.exists(f"{directory}/{LEFT}")
        return not left and mountinfo.at(f"{directory}/{EXPORT}") is not None

    def conversation(self, deadline: Deadline) -> contextlib.AbstractContextManager[Qmp]:
        """Talk to it."""
        return conversation(self._directory, "qmp", deadline)

    @property
    def listens(self) -> bool:
        """Whether it lives: one that hangs does."""
        return listens(self._directory, "qmp")

    def ensure_answering(self, member: str, deadline: Deadline) -> None:
        """Start it, unless it runs. One that hangs is replaced, if that costs none but `member` anything.

        Raises: errors.TimedOut when it hangs and others need it; errors.Problem when it cannot be started, and
        ConnectionError when it was killed meanwhile.
        """
        if self.hangs(deadline):
            if self.serves_others(member):
                raise self.silence()
        elif self.listens:
            return
        self._replace(deadline)

    def hangs(self, deadline: Deadline) -> bool:
        """Whether it lives and does not greet. One that is just ending does neither."""
        if self.listens:
            try:
                with contextlib.suppress(ConnectionError), self.conversation(deadline.within(GREETING_TIMEOUT)):
                    pass
            except TimeoutError:
                return True
        return False

    def shows_nothing(self) -> bool:
        """Whether it has closed all files that it showed, or has shown none yet."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            directory = f"/proc/{self.pid() or ''}/fd"
            return not any(_target(f"{directory}/{entry}") == FUSE for entry in os.listdir(directory))
        return True

    def await_end(self, deadline: Deadline) -> None:
        """Return once it has ended. Raises: TimeoutError."""
        with self._process() as pidfd:
            if pidfd is not None:
                _await_end(pidfd, deadline.left())

    def silence(self, consequence: str = "") -> errors.TimedOut:
        """The refusal to do anything that needs it to answer; `consequence` is what its end would bring about."""
        pid = self.pid()
        return errors.TimedOut(
            f"process {pid} ({PROGRAM}), which has the image open, does not answer: see whether it was stopped (State "
            f"in /proc/{pid}/status) or waits for its store; this goes on by itself when it answers, or when you end "
            f"it (kill -9 {pid}){consequence}"
        )

    def _replace(self, deadline: Deadline) -> None:
        """Start a new one where there is a dead one, or none. What a dead one leaves mounted is nothing but errors."""
        self.kill()
        for member in self.members():
            detach(f"{self._site.helpers_dir}/{member}/{EXPORT}")
        for name in ("qmp", "pid"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._directory)
        self._start(deadline)

    def _start(self, deadline: Deadline) -> None:
        chardev = "socket,path=qmp,server=on,wait=off,id=qmp"
        command = [PROGRAM, "--daemonize", *self._identity, "--chardev", chardev, "--monitor", "chardev=qmp"]
        environment = {"PATH": os.environ.get("PATH", os.defpath)}
        try:
            done = subprocess.run(
                command,
                cwd=self.path,
                env=environment,
                umask=0o077,
                timeout=deadline.left(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError:
            raise Unsupported(f"this host has no {PROGRAM}: install {PACKAGES}") from None
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{PROGRAM} did not start in time") from None
        if done.returncode:
            raise _not_started(done.returncode, done.stderr.strip())
        with contextlib.suppress(OSError):  # it stays in the unit of the server, whose KillMode= spares it
            if (pid := self.pid()) is not None:
                scope.join(self._site.scope, pid)

    @property
    def _identity(self) -> tuple[str, str]:
        """The words of its command line that no other process has."""
        return "--pidfile", f"{self.path}/pid"

    def end(self) -> None:
        """End it and remove its directory."""
        if self.listens:
            with contextlib.suppress(TimeoutError, ConnectionError):
                self._quit(Deadline(QUIT_TIMEOUT))
        self.kill()
        remove_tree(self.path)

    def _quit(self, deadline: Deadline) -> None:
        with self._process() as pidfd:
            with self.conversation(deadline) as qmp:
                qmp.execute("quit")
            if pidfd is not None:
                _await_end(pidfd, deadline.left())

    def kill(self) -> None:
        """SIGKILL it, if it runs."""
        with self._process() as pidfd:
            if pidfd is None:
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            _await_end(pidfd, QUIT_TIMEOUT)

    def pid(self) -> int | None:
        """Its number; None when it has ended. The one in the file may be another's by now: its command line tells."""
        try:
            with open(f"{self.path}/pid", encoding="ascii") as file:
                pid = int(file.read())
        except (FileNotFoundError, ValueError):
            return None
        return pid if self._identity[1].encode() in _command_line(pid) else None

    def helper(self) -> Helper | None:
        """Its process, as it is known for good; None when it has ended."""
        pid = self.pid()
        started = None if pid is None else pidfd.start_time(pid)
        return None if pid is None or started is None else Helper(pid, started)

    @contextlib.contextmanager
    def _process(self) -> Iterator[int | None]:
        """A pidfd of it; None when it has ended. It is looked at again once the pidfd holds the process."""
        pid = self.pid()
        try:
            descriptor = None if pid is None else pidfd.pidfd_open(pid)
        except ProcessLookupError:
            descriptor = None
        if descriptor is None:
            yield None
            return
        try:
            yield descriptor if self.pid() == pid else None
        finally:
            os.close(descriptor)


def _not_started(status: int, words: str) -> Exception:
    """Why the program ended instead of beginning its work, in its own words where it had time for them."""
    if status == _KILLED or not words:  # it waits for the daemon that it leaves behind, which may be killed as well
        return ConnectionAbortedError(f"{PROGRAM} was killed while it started")
    return errors.exhausted(words, f"starting {PROGRAM}") or Problem(
        f"{PROGRAM} did not start: {words}", step="start the storage daemon"
    )


def _target(link: str) -> str:
    """Where a symbolic link leads; nowhere when it has gone."""
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def _command_line(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _await_end(pidfd: int, seconds: float) -> None:
    """A pidfd is readable once its process is a zombie, whoever has to reap it."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    if not poller.poll(seconds * 1000):
        raise TimeoutError(f"{PROGRAM} did not end")


def link(directory: str) -> str | None:
    """The daemon that the image in `directory` belongs to."""
    try:
        return os.path.basename(os.readlink(f"{directory}/daemon"))
    except OSError:
        return None


def detach(path: str) -> None:
    """Cut the kernel off from whoever serves the file mounted at `path`, and take the mount away: whatever waits
    there, and all that comes, fails. (umount2(2) with MNT_FORCE does what /sys/fs/fuse/connections/N/abort does, and
    needs no fusectl to be mounted.)"""
    while (found := mountinfo.at(path)) is not None and found.fstype.startswith("fuse"):
        mount.umount(path, mount.MNT_FORCE | mount.MNT_DETACH | mount.UMOUNT_NOFOLLOW)
