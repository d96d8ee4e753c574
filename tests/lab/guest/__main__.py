"""`make lab`: a shell in a guest, with this checkout at /imageapi. It ends with the shell's QEMU, by Ctrl-]."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from lab.guest.guest import restored
from lab.guest.network import network
from lab.guest.state import booted

GREETING = """\
A guest with kernel {release}. This checkout is at /imageapi (read only): `python3 -m imageapi.server` runs the server.
Ctrl-] leaves, and nothing of the guest is kept.
"""


def main() -> None:
    state = booted()
    with (
        tempfile.TemporaryDirectory(prefix="imageapi-lab-") as directory,
        network() as own,
        restored(state, own, Path(directory)),
    ):
        print(GREETING.format(release=state.shape.root.release), flush=True)
        subprocess.run(["socat", "-,raw,echo=0,escape=0x1d", f"UNIX-CONNECT:{directory}/terminal"], check=False)


if __name__ == "__main__":
    main()
