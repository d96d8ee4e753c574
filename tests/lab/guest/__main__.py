"""`make lab`: a shell in a guest, with this checkout at /imageapi and a store of each kind. It ends with the shell's
QEMU, by Ctrl-]."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from pathlib import Path

from lab import iscsi, nfs
from lab.ceph import Cluster
from lab.guest.guest import Guest, restored
from lab.guest.network import SERVER, Network, network
from lab.guest.server import LOG, RUN_DIR, GuestServer
from lab.guest.state import booted
from lab.images import small_image

TARGET, IMAGE = "iqn.2026-01.test:lab", "small.sqsh"

GREETING = """
A guest with kernel {release}. This checkout is at /imageapi (read only). The server runs, its log is {log}:

    curl --unix-socket {run_dir}/api.sock http://localhost/imageapi/v1/container

Each store has the same small image, a squashfs with busybox; what to ask for is in docs/kinds:

    nfs     host {nfs_host}, path {store}: the image as {image}, and unpacked as tree
    iscsi   host {server}, target {target}, lun 1; any initiator
    rbd     monitors ["{server}"], pool rbd, image {image}, options.secret {key}

Ctrl-] leaves, and nothing of the guest is kept.
"""


def main() -> None:
    state = booted()
    with contextlib.ExitStack() as undo:
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="imageapi-lab-")))
        own = undo.enter_context(network())
        guest = undo.enter_context(restored(state, own, directory))
        print("starting the stores and the server …", flush=True)
        serve_nfs(guest)
        undo.callback(serve_iscsi(guest, own, directory).stop)
        ceph = serve_rbd(own, directory)
        undo.callback(ceph.stop)
        GuestServer(guest).start()
        print(
            GREETING.format(
                release=state.shape.root.release, log=LOG, run_dir=RUN_DIR, nfs_host=nfs.HOST, store=nfs.STORE,
                server=SERVER, target=TARGET, image=IMAGE, key=ceph.admin_key,
            ), flush=True,
        )  # fmt: skip
        subprocess.run(["socat", "-,raw,echo=0,escape=0x1d", f"UNIX-CONNECT:{directory}/terminal"], check=False)


def serve_nfs(guest: Guest) -> None:
    """In the guest itself."""
    nfs.NfsServer(guest).start()
    guest.put(small_image(), f"/srv{nfs.STORE}/{IMAGE}")
    guest.sh(f"unsquashfs -quiet -no-progress -dest /srv{nfs.STORE}/tree /srv{nfs.STORE}/{IMAGE}")


def serve_iscsi(guest: Guest, own: Network, directory: Path) -> iscsi.Server:
    """A target of this side, and what the guest's initiator needs."""
    server = iscsi.Server(str(directory / "iscsi"), host=SERVER, enter=own.enter)
    server.start()
    server.add_disk(server.add_target(TARGET), 1, str(small_image()), read_only=True)
    guest.start("iscsid", "-f")
    return server


def serve_rbd(own: Network, directory: Path) -> Cluster:
    """A cluster of this side."""
    cluster = Cluster(str(directory / "ceph"), SERVER, enter=own.enter)
    cluster.start()
    cluster.import_image(str(small_image()), IMAGE)
    return cluster


if __name__ == "__main__":
    main()
