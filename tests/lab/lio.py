"""The kernel's own target (LIO) in a guest: it has several portals, and may demand mutual CHAP.

It is made through configfs, as targetcli does it (Documentation/target in the kernel's sources).
"""

from __future__ import annotations

from lab.guest.guest import Guest

TARGET = "iqn.2026-01.test:kernel"
PORTALS = ("10.77.0.1", "10.77.0.2")

SCRIPT = """\
modprobe -a target_core_file iscsi_target_mod
mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
top=/sys/kernel/config/target; disk=$top/core/fileio_0/disk; group=$top/iscsi/{target}/tpgt_1
mkdir -p $disk
echo "fd_dev_name={file},fd_dev_size=$(stat -c %s {file})" >$disk/control
echo 0123456789abcdef >$disk/wwn/vpd_unit_serial
echo 1 >$disk/enable
mkdir -p $group/lun/lun_0
ln -s $disk $group/lun/lun_0/disk
for address in {portals}; do
    ip address add $address/32 dev lo
    mkdir $group/np/$address:3260
done
node=$group/acls/{initiator}
mkdir -p $node/lun_0
ln -s $group/lun/lun_0 $node/lun_0/disk
echo 1 >$group/attrib/authentication
echo -n {user} >$node/auth/userid
echo -n {secret} >$node/auth/password
echo -n {mutual_user} >$node/auth/userid_mutual
echo -n {mutual_secret} >$node/auth/password_mutual
echo 1 >$group/enable
"""

MULTIPATH = """\
cat >/etc/multipath.conf <<END
defaults {
    find_multipaths yes
    polling_interval 1
    fast_io_fail_tmo 1
}
blacklist {
    devnode "^(vd|nbd|loop)"
}
END
/lib/systemd/systemd-udevd --daemon
multipathd
timeout 20 sh -c 'until [ -s /run/multipathd.pid ]; do sleep 0.05; done'
"""


def serve(guest: Guest, file: str, initiator: str, chap: dict[str, str]) -> None:
    """Make the target, with `file` of the guest as LUN 0, for one initiator with mutual CHAP."""
    guest.sh(SCRIPT.format(target=TARGET, file=file, portals=" ".join(PORTALS), initiator=initiator, **chap))


def run_multipathd(guest: Guest) -> None:
    """Run it, and udev, which tells it of disks."""
    guest.sh(MULTIPATH)


def lose_portal(guest: Guest, address: str) -> None:
    """It listens no more, and its connections are reset."""
    guest.sh(f"rmdir {_portal(address)}; ss --kill --no-header --tcp dst {address} dport = 3260 >/dev/null")


def bring_back_portal(guest: Guest, address: str) -> None:
    guest.sh(f"mkdir {_portal(address)}")


def _portal(address: str) -> str:
    return f"/sys/kernel/config/target/iscsi/{TARGET}/tpgt_1/np/{address}:3260"
