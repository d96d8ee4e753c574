#!/bin/sh
# What the guest does once, before its state is saved: what every test would otherwise wait for.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/lock/iscsi /var/tmp
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/mounts /etc/mtab
hostname guest
modprobe -a virtio_console virtio_net 9p 9pnet_virtio loop fuse overlay squashfs erofs ext4 xfs btrfs isofs vfat \
    nls_ascii nls_cp437 nls_utf8 rbd nbd iscsi_tcp sd_mod nfs nfsv3 nfsv4 nfsd dm_multipath dm_round_robin scsi_dh_alua
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
ip -6 address add fec0::15/64 dev eth0 nodad
ip route add default via 10.0.2.2
ip -6 route add default via fec0::2
mount -t nfsd nfsd /proc/fs/nfsd 2>/dev/null
mount -t rpc_pipefs rpc_pipefs /run/rpc_pipefs 2>/dev/null
# HTTP comes in over TCP, and is handed to the server's own socket.
mkdir -p /run/imageapi
setsid socat TCP-LISTEN:80,fork,reuseaddr UNIX-CONNECT:/run/imageapi/api.sock </dev/null >/dev/null 2>&1 &
PYTHONPATH=/lab/packages python3 -c 'import asyncio, ctypes, hashlib, httptools, json, logging, msgspec, subprocess, uvloop'
