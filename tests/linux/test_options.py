"""How mount options are divided between mount(2)'s flags and the file system."""

from __future__ import annotations

import pytest

from imageapi.linux import mount

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("options", "flags", "data"),
    [
        ([], 0, []),
        (["ro"], mount.MS_RDONLY, []),
        (["ro", "rw"], 0, []),
        (["rw", "ro"], mount.MS_RDONLY, []),
        (["ro,noatime"], mount.MS_RDONLY | mount.MS_NOATIME, []),
        (["noatime", "relatime"], mount.MS_RELATIME, []),
        (["nosuid", "noexec", "suid"], mount.MS_NOEXEC, []),
        (["errors=continue", "sync", "data=journal"], mount.MS_SYNCHRONOUS, ["errors=continue", "data=journal"]),
        (['context="a:b,c",ro'], mount.MS_RDONLY, ['context="a:b,c"']),
        (['unbalanced="a,ro'], 0, ['unbalanced="a,ro']),
        ([" ro , ", ""], mount.MS_RDONLY, []),
        (["defaults", "_netdev", "nofail", "x-systemd.automount"], 0, []),
        (["remount", "bind", "move"], 0, ["remount", "bind", "move"]),
    ],
)
def test_split_options(options: list[str], flags: int, data: list[str]) -> None:
    assert mount.split_options(options) == (flags, data)
