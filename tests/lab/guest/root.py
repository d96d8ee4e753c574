"""The guest's kernel and root file system: a stock Debian kernel with its modules, and a small Debian.

Both are made of packages of the machine's own sources, without booting anything, and kept in the cache. The root is
read only for the guest: what it writes goes to its memory, so a saved state needs no disk beside it.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from tools import images

HERE = Path(__file__).parent
OWN = HERE / "root"
"""What of the guest's files is our own."""
CHECKOUT = Path(__file__).parents[3]

KERNELS = {
    "6.12": ("linux-image-6.12-amd64", "linux-image-amd64"),
    "6.1": ("linux-image-6.1-amd64", "linux-image-amd64"),
}
"""The kernels that a guest can have, and the packages that stand for each: the first that apt knows is taken, if it is
of that version. The cloud flavours lack 9p."""

KERNEL = os.environ.get("IMAGEAPI_GUEST_KERNEL", "6.12")
"""What guests have unless a test asks for another."""

PACKAGES = (
    *("busybox-static", "kmod", "iproute2", "keyutils", "mount", "procps", "python3", "socat", "strace", "util-linux"),
    *("btrfs-progs", "dosfstools", "e2fsprogs", "erofs-utils", "genisoimage", "squashfs-tools", "xfsprogs"),
    *("nfs-common", "nfs-kernel-server", "rpcbind", "open-iscsi", "tgt", "multipath-tools", "dmsetup"),
    *("qemu-system-common", "qemu-block-extra", "curl", "jq", "sudo", "systemd", "dbus"),
)

MODULES = (
    *("arch", "block", "crypto", "fs", "lib", "mm", "net/9p", "net/ceph", "net/core", "net/dns_resolver", "net/ipv4"),
    *("net/ipv6", "net/sunrpc", "net/tls", "net/netfilter", "drivers/block", "drivers/char", "drivers/cdrom"),
    *("drivers/md", "drivers/net", "drivers/nvme", "drivers/scsi", "drivers/target", "drivers/virtio", "kernel"),
)
"""The folders of the kernel's modules that a guest without hardware can use."""

LIBRARIES = ("backports-zstd", "httptools", "msgspec", "urllib3", "uvloop")
"""What the service imports of others' (pyproject.toml, dependencies)."""

TO_ROOT = ("virtio_pci", "virtio_blk", "erofs", "ext4", "overlay")
"""The modules on the way to the root file system."""

IDLE_UNITS = (
    *("*.timer", "*.automount", "getty.target", "serial-getty@.service", "modprobe@.service", "e2scrub_reap.service"),
    *("multipathd.*", "multipath-tools.service", "nfs-client.target", "nfs-server.service", "rpcbind.*", "tgt.service"),
    *("dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-*.mount", "sys-fs-fuse-connections.mount"),
    *("run-rpc_pipefs.mount", "ldconfig.service", "systemd-ask-password-*", "systemd-binfmt.service"),
    *("systemd-firstboot.service", "systemd-hwdb-update.service", "systemd-journal-*flush.service", "systemd-logind.*"),
    *(
        "systemd-network-generator.service",
        "systemd-pcrphase*",
        "systemd-pstore.service",
        "systemd-random-seed.service",
    ),
    *("systemd-sysctl.service", "systemd-sysusers.service", "systemd-update-utmp*", "systemd-user-sessions.service"),
    *("kmod-static-nodes.service", "systemd-journal-catalog-update.service", "systemd-machine-id-commit.service"),
)
"""What systemd is not to start in the guest: no test wants it, and it takes time."""

INITRAMFS = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
while read module; do /bin/busybox insmod /modules/$module; done </modules/order
/bin/busybox mount -t ext4 /dev/vdb /memory || /bin/busybox mount -t tmpfs -o mode=755 none /memory
/bin/busybox mkdir -p /memory/upper /memory/work
/bin/busybox mount -t erofs -o ro /dev/vda /lower
/bin/busybox mount -t overlay -o lowerdir=/lower,upperdir=/memory/upper,workdir=/memory/work root /root
exec /bin/busybox switch_root /root ${lab_init:-/sbin/init}
"""
"""What the guest writes goes to its second disk, if it has one, and else to its memory. The kernel hands `lab_init=…`
of its command line to us as a variable."""

INITTAB = """\
::sysinit:/lab/start
::respawn:/usr/bin/python3 /lab/agent.py
hvc0::respawn:/bin/bash --login
"""

NOT_BY_ITSELF = ("9pnet_virtio", "loop", "squashfs", "virtio_console", "virtio_net")
"""The modules that systemd loads first: the agent, the network and the checkout want them."""

JOURNAL = """\
[Journal]
Storage=volatile
ForwardToConsole=yes
TTYPath=/dev/ttyS0
"""


class Root(NamedTuple):
    """What QEMU boots."""

    directory: Path

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        return self.directory / "initramfs"

    @property
    def disk(self) -> Path:
        return self.directory / "root.erofs"

    @property
    def release(self) -> str:
        """The kernel's, as `uname -r` says it."""
        return (self.directory / "release").read_text()


def root(version: str = KERNEL) -> Root:
    """The kernel and the root, made on first use: a minute. `version` is one of KERNELS.

    Raises: LookupError, when apt has no such kernel; subprocess.CalledProcessError; OSError.
    """
    recipe = hashlib.sha256()
    for path in (HERE / "root.py", HERE / "agent.py", *sorted(OWN.iterdir()), CHECKOUT / "requirements-dev.lock"):
        recipe.update(path.read_bytes())
    made_of = f"{recipe.hexdigest()} {images.suite()} {version}"
    return Root(images.cached("guest-root", "d", made_of, functools.partial(_make, version)))


def _make(version: str, directory: Path) -> None:
    directory.mkdir()
    scratch = directory.parent / "scratch"
    scratch.mkdir()
    tree, kernel = scratch / "tree", scratch / "kernel"
    tree.mkdir()
    images.run("tar", "-xp", "--numeric-owner", "-f", str(_debian()), "-C", str(tree))
    _unpack_kernel(version, kernel)
    release = next((kernel / "lib/modules").iterdir()).name
    shutil.copy(kernel / f"boot/vmlinuz-{release}", directory / "vmlinuz")
    (directory / "release").write_text(release)
    _copy_modules(kernel / "lib/modules" / release, tree / "usr/lib/modules" / release, tree, release)
    _install_lab(tree)
    _pack_initramfs(scratch / "initramfs", tree, release, directory / "initramfs")
    images.run("mkfs.erofs", "--quiet", str(directory / "root.erofs"), str(tree))


def _debian() -> Path:
    """What is the same with all kernels, as an archive."""
    made_of = f"{PACKAGES} {images.suite()}"
    return images.cached("guest-debian", "tar", made_of, lambda archive: images.run(*_mmdebstrap(archive)))


def _mmdebstrap(archive: Path) -> list[str]:
    return [
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
        *images.SMALLER_DEBIAN,
        *("--aptopt=APT::Install-Recommends false", images.suite(), str(archive)),
        *map(str, images.apt_sources(images.suite())),
    ]


# ------------------------------------------------------------------------------------------------------ the kernel


def _unpack_kernel(version: str, to: Path) -> None:
    """Downloaded and unpacked, not installed: nothing of it comes to this machine."""
    to.mkdir()
    subprocess.run(["apt-get", "download", _kernel_package(version)], cwd=to, check=True, capture_output=True)
    images.run("dpkg-deb", "--extract", str(next(to.glob("*.deb"))), str(to))


def _kernel_package(version: str) -> str:
    """The package that the first fitting one of KERNELS stands for.

    Raises: LookupError.
    """
    for name in KERNELS[version]:
        listed = subprocess.run(["apt-cache", "depends", name], capture_output=True, text=True).stdout
        if found := re.search(rf"Depends: (linux-image-{re.escape(version)}\.\S+)", listed):
            return found[1]
    raise LookupError(f"apt has no Linux {version}: none of the packages {', '.join(KERNELS[version])} stands for it")


def _copy_modules(source: Path, to: Path, tree: Path, release: str) -> None:
    for name in MODULES:
        wanted = source / "kernel" / name
        shutil.copytree(wanted, to / "kernel" / name, dirs_exist_ok=True) if wanted.is_dir() else None
    for path in source.glob("modules.[bo]*"):
        shutil.copy(path, to)
    images.run("chroot", str(tree), "depmod", release)


def _pack_initramfs(directory: Path, tree: Path, release: str, to: Path) -> None:
    for name in ("bin", "dev", "memory", "lower", "root", "modules"):
        (directory / name).mkdir(parents=True)
    shutil.copy(images.busybox(), directory / "bin/busybox")
    order = _unpack_modules(tree, release, directory / "modules")
    (directory / "modules/order").write_text("".join(f"{name}\n" for name in order))
    (directory / "init").write_text(INITRAMFS)
    (directory / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(directory)) for path in sorted(directory.rglob("*")))
    with to.open("wb") as file:
        command = ["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0"]
        subprocess.run(command, cwd=directory, input=names.encode(), stdout=file, check=True)


def _unpack_modules(tree: Path, release: str, to: Path) -> list[str]:
    """Those on the way to the root, decompressed where they are packed, in the order in which they can be loaded."""
    command = ["chroot", str(tree), "modprobe", "--set-version", release, "--show-depends", "--all", *TO_ROOT]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    inserted = (line.split()[1] for line in shown.splitlines() if line.startswith("insmod"))
    paths = list(dict.fromkeys(tree / path.lstrip("/") for path in inserted))
    for path in paths:
        packed = path.read_bytes()
        (to / path.stem).write_bytes(lzma.decompress(packed) if path.suffix == ".xz" else packed)
    return [path.stem for path in paths]


# ---------------------------------------------------------------------------------------------------------- our own


def _install_lab(tree: Path) -> None:
    """The agent, what starts it, and what our package and its tests need to run; not the package itself."""
    for directory in ("lab", "imageapi", "host"):
        (tree / directory).mkdir()
    shutil.copy(HERE / "agent.py", tree / "lab/agent.py")
    for name in ("start", "network", "modules"):
        shutil.copy(OWN / name, tree / "lab" / name)
    (tree / "etc/inittab").write_text(INITTAB)
    (tree / "sbin/init").unlink(missing_ok=True)
    (tree / "sbin/init").symlink_to("/usr/bin/busybox")
    (tree / "etc/hostname").write_text("guest\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n10.0.2.15 guest\n")
    (tree / "etc/profile.d/lab.sh").write_text(
        "export PYTHONPATH=/imageapi/src:/imageapi/tests:/imageapi:/lab/packages\n"
    )
    _install_units(tree)
    _install_packages(tree / "lab/packages", next((tree / "usr/lib").glob("python3.*")).name.removeprefix("python"))


def _install_units(tree: Path) -> None:
    """What there is to be done in a guest with systemd as its init, and what not."""
    units = tree / "etc/systemd/system"
    for path in (*units.rglob("*"), *(tree / "usr/lib/systemd/system").iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in IDLE_UNITS):
            (units / path.name).unlink(missing_ok=True)
            (units / path.name).symlink_to("/dev/null")
    for path in OWN.glob("*.service"):
        shutil.copy(path, units)
    images.run("chroot", str(tree), "systemctl", "--quiet", "enable", *(path.name for path in OWN.glob("*.service")))
    (tree / "etc/modules-load.d/lab.conf").write_text("\n".join(NOT_BY_ITSELF))
    (tree / "etc/machine-id").write_text(f"{0xC0FFEE:032x}\n")
    (tree / "etc/systemd/journald.conf.d").mkdir(exist_ok=True)
    (tree / "etc/systemd/journald.conf.d/lab.conf").write_text(JOURNAL)


def _install_packages(to: Path, python: str) -> None:
    """The guest's Python may be another than this one: it gets wheels of its own version, those of our lock."""
    pinned = to.parent / "pinned.txt"
    pinned.write_text(_only(LIBRARIES, (CHECKOUT / "requirements-dev.lock").read_text()))
    images.run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--target", str(to)),
        *("--python-version", python, "--only-binary=:all:", "--no-deps", "--require-hashes", "-r", str(pinned)),
    )


def _only(names: tuple[str, ...], lock: str) -> str:
    """These packages' lines of a lock: a name and version, then its hashes, each but the last ends in a backslash."""
    entries = re.findall(r"^(?:[^\s#].*\\\n)(?:\s+--hash.*\n)+", lock, re.MULTILINE)
    return "".join(entry for entry in entries if entry.split("==")[0] in names)
