"""An NFS server in a guest, in a network of its own, so that it can be cut off from the client beside it."""

from __future__ import annotations

from lab.guest.guest import Guest

HOST = "10.77.0.1"
HOST_V6 = "fd77::1"
SILENT = "10.77.0.99"
"""An address that nobody has."""
STORE = "/store"
STORE_V3 = "/srv/store"
"""What this client may mount: version 4 has the exports below a root of their own."""
CLOSED = "/closed"
"""What only another client may mount."""

_SERVE = "rpc.nfsd --grace-time 10 --lease-time 10 2"

_NETWORK = f"""
ip netns add storage
ip link add to-storage type veth peer name inside netns storage
ip address add 10.77.0.2/24 dev to-storage
ip -6 address add fd77::2/64 dev to-storage nodad
ip link set to-storage up
ip -n storage address add {HOST}/24 dev inside
ip -n storage -6 address add {HOST_V6}/64 dev inside nodad
ip -n storage link set inside up
ip -n storage link set lo up
mount -t tmpfs exports /srv
mkdir /srv{STORE} {CLOSED}
mount -t tmpfs -o size=16m store /srv{STORE}
mount -t tmpfs closed {CLOSED}
echo written by the server >/srv{STORE}/message
"""

# nfsdcld knows that there are no clients who might reclaim their locks: else the first ten seconds are kept for them.
_SERVICES = f"""
mount -t nfsd nfsd /proc/fs/nfsd
mkdir -p /run/rpc_pipefs /run/clients
mount -t rpc_pipefs rpc_pipefs /run/rpc_pipefs
nfsdcld --pipefsdir=/run/rpc_pipefs --storagedir=/run/clients
rpcbind -w
for client in 10.77.0.2 '[fd77::2]'; do
    exportfs -o ro,fsid=0 "$client:/srv"
    exportfs -o rw,no_root_squash,fsid=1 "$client:/srv{STORE}"
done
exportfs -o rw,fsid=2 10.77.0.98:{CLOSED}
rpc.mountd
{_SERVE}
"""


class NfsServer:
    """The kernel's own server. It can be silenced as one is whose network is gone, and stopped."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def start(self) -> None:
        """Services and all that they stand on; they go with the guest."""
        self.guest.sh(_NETWORK)
        self.inside(_SERVICES)

    def inside(self, script: str) -> str:
        """Run lines of shell where the server is."""
        return self.guest.run("ip", "netns", "exec", "storage", "sh", "-ec", script)

    def without(self, version: str) -> None:
        """Have it no longer speak a version: `4.2`; `4` for all of them."""
        self.stop()
        self.inside(f"mount -t nfsd nfsd /proc/fs/nfsd; {_SERVE} --no-nfs-version {version}")

    def stop(self) -> None:
        """No service listens any more."""
        self.inside("mount -t nfsd nfsd /proc/fs/nfsd; echo 0 >/proc/fs/nfsd/threads")
        self.inside("while ss -Hltn 'sport = 2049' | grep -q .; do sleep 0.02; done")

    def silence(self) -> None:
        """Nothing comes through to it any more, nor back."""
        self.guest.run("ip", "link", "set", "to-storage", "down")

    def speak(self) -> None:
        self.guest.run("ip", "link", "set", "to-storage", "up")
