"""The mount options of the file systems that images are made of, and what each may be set to: what is in none of these
tables is refused. Written down from the documents of Linux 6.18 (filesystems/*.rst, xfs(5), btrfs(5), ext4(5),
mount(8)); what an older kernel lacks it refuses itself.

A word is a flag, `name=…` an option with a value, `name[=…]` one that may also stand alone. A value is one of some
words, a number between two, or NUMBER, OCTAL (rights), SIZE (bytes; K, M, G for more) and TEXT.
"""

from __future__ import annotations

import re
from functools import cache

from imageapi.drivers.mount_options import DEVICES, Option

_EXT4 = """
    acl noacl auto_da_alloc noauto_da_alloc barrier[=0|1] nobarrier block_validity noblock_validity bsddf minixdf
    commit=NUMBER data=journal|ordered|writeback data_err=abort|ignore dax[=always|inode|never] delalloc nodelalloc
    dioread_lock dioread_nolock discard nodiscard errors=continue|remount-ro grpid nogrpid bsdgroups sysvgroups
    grpquota i_version init_itable[=NUMBER] noinit_itable inlinecrypt inode_readahead_blks=NUMBER
    journal_async_commit journal_checksum nojournal_checksum journal_ioprio=0-7 max_batch_time=NUMBER
    max_dir_size_kb=NUMBER mb_optimize_scan=0|1 min_batch_time=NUMBER no_prefetch_block_bitmaps noload norecovery
    noquota prjquota quota resgid=NUMBER resuid=NUMBER sb=NUMBER stripe=NUMBER user_xattr nouser_xattr usrquota
    warn_on_error nowarn_on_error
"""
_FAT = """
    allow_utime=OCTAL check=relaxed|normal|strict|r|n|s codepage=NUMBER discard dmask=OCTAL dos1xfloppy dots nodots
    errors=continue|remount-ro flush fmask=OCTAL gid=NUMBER iocharset=TEXT nfs[=stale_rw|nostale_ro] nonumtail[=0|1]
    quiet rodir shortname=lower|win95|winnt|mixed showexec sys_immutable time_offset=NUMBER tz=UTC uid=NUMBER
    umask=OCTAL uni_xlate[=0|1] usefree utf8[=0|1]
"""
_ALL = {
    "squashfs": "errors=continue threads=TEXT",
    "erofs": """
        acl noacl cache_strategy=disabled|readahead|readaround dax[=always|never] directio fsoffset=NUMBER user_xattr
        nouser_xattr
    """,
    "ext2": _EXT4,
    "ext3": _EXT4,
    "ext4": _EXT4,
    "xfs": """
        allocsize=SIZE attr2 noattr2 bsdgroups sysvgroups dax[=inode|always|never] discard nodiscard filestreams
        gqnoenforce gquota grpid nogrpid grpquota ikeep noikeep inode32 inode64 largeio nolargeio lifetime nolifetime
        logbsize=SIZE logbufs=2-8 max_atomic_write=SIZE noalign norecovery noquota nouuid pqnoenforce pquota prjquota
        qnoenforce quota sunit=NUMBER swalloc swidth=NUMBER uqnoenforce uquota usrquota wsync
    """,
    "btrfs": """
        acl noacl autodefrag noautodefrag barrier nobarrier clear_cache commit=NUMBER compress[=TEXT]
        compress-force[=TEXT] datacow nodatacow datasum nodatasum degraded discard[=sync|async] nodiscard enospc_debug
        noenospc_debug flushoncommit noflushoncommit max_inline=SIZE metadata_ratio=NUMBER nologreplay norecovery
        rescan_uuid_tree rescue=TEXT skip_balance space_cache[=v1|v2] nospace_cache ssd nossd ssd_spread nossd_spread
        subvol=TEXT subvolid=NUMBER thread_pool=NUMBER treelog notreelog usebackuproot user_subvol_rm_allowed
    """,
    "iso9660": """
        block=512|1024|2048 check=relaxed|strict cruft dmode=OCTAL gid=NUMBER hide unhide iocharset=TEXT
        map=off|normal|acorn|n|a|o mode=OCTAL nocompress nojoliet norock overriderockperm sbsector=NUMBER
        session=NUMBER showassoc uid=NUMBER utf8
    """,
    "vfat": _FAT,
    "msdos": _FAT,
}

_TEXT = re.compile(r'[^\0",]+')
_LABEL = re.compile(r'[^\0",]+|"[\w:.-]+(?:,c\d[\w:.-]*)*"')
"""Within quotes a label has categories behind commas, as s0:c1,c2: without SELinux the kernel divides there."""
_FORMS = {
    "NUMBER": Option(range(1 << 32)),
    "OCTAL": Option(re.compile(r"0?[0-7]{1,4}"), "rights in octal, as 0755"),
    "SIZE": Option(re.compile(r"[0-9]{1,15}[KkMmGg]?"), "a size in bytes, or with K, M or G"),
    "TEXT": Option(_TEXT, "a text without commas and quotes"),
}

_OTHER_DEVICE = "it names another device of the host, which would be used behind this service's back; leave it out"
_ITS_OWN = "this service mounts, unmounts and shares by itself; leave it out"
_PARTITION = "give the number of the partition as 'partition'"
_HARMFUL = {
    "dev": DEVICES.refused,
    **dict.fromkeys(("device", "journal_dev", "journal_path", "logdev", "rtdev"), _OTHER_DEVICE),
    **dict.fromkeys(("abort", "fatal_errors"), "it can stop the host; leave it out"),
    **dict.fromkeys(("bind", "rbind", "move", "remount", "group", "owner", "user", "users"), _ITS_OWN),
    "loop": "the attachment is a device already; leave it out",
    "offset": _PARTITION,
    "sizelimit": _PARTITION,
}
_LABELS = dict.fromkeys(
    ("context", "defcontext", "fscontext", "rootcontext"), Option(_LABEL, "a label, in quotes if it has commas")
)
"""SELinux labels (mount(8)), for any file system."""


@cache
def table(fs_type: str) -> dict[str, Option]:
    """The options of a file system. Of one that is not listed all that does no harm is left to the kernel."""
    common = {**{name: Option(refused=reason) for name, reason in _HARMFUL.items()}, **_LABELS}
    if fs_type not in _ALL:
        return {**common, "*": _FORMS["TEXT"]._replace(optional=True)}
    return {**common, **dict(map(_option, _ALL[fs_type].split()))}


def _option(text: str) -> tuple[str, Option]:
    name, optional, value = re.fullmatch(r"([\w-]+)(\[?)=?([^\]]*)\]?", text).groups()  # type: ignore[union-attr]
    if not value:
        return name, Option()
    known = _FORMS.get(value) or Option(_range(value) or tuple(value.split("|")))
    return name, known._replace(optional=bool(optional))


def _range(value: str) -> range | None:
    first, dash, last = value.partition("-")
    return range(int(first), int(last) + 1) if dash and first.isdigit() and last.isdigit() else None
