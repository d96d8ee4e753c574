"""An image file whose store can be made to hang: a storage daemon shows it through FUSE, as sshfs would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from imageapi.linux import mountinfo
from lab.images import small_image
from lab.server import eventually


class Shown:
    """The small image as a file `path` of a daemon of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "shown.sqsh"
        self.path.touch()
        disk = f"driver=file,node-name=image,filename={small_image()},read-only=on"
        export = f"type=fuse,id=export,node-name=image,mountpoint={self.path}"
        self._daemon = subprocess.Popen(["qemu-storage-daemon", "--blockdev", disk, "--export", export])
        eventually(lambda: os.path.ismount(self.path), "the image is shown")

    def hang(self) -> None:
        """From now on nobody answers who asks for the file, but for what the kernel has kept of it."""
        self._daemon.send_signal(signal.SIGSTOP)

    def work(self) -> None:
        self._daemon.send_signal(signal.SIGCONT)

    def die(self) -> None:
        """From now on everybody is told that nothing is connected (ENOTCONN)."""
        self._daemon.kill()
        self._daemon.wait()

    def end(self) -> None:
        self.work()
        self._daemon.terminate()
        self._daemon.wait()
        if mountinfo.at(str(self.path)):  # a daemon that was killed leaves it
            subprocess.run(["umount", self.path], check=True)


@contextlib.contextmanager
def shown(directory: Path) -> Iterator[Shown]:
    image = Shown(directory)
    try:
        yield image
    finally:
        image.end()
