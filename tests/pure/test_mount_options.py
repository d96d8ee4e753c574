"""How mount options are looked at before the kernel sees them."""

from __future__ import annotations

import re

import pytest

from imageapi.drivers import filesystem_options, mount_options
from imageapi.drivers.mount_options import DEVICES, Option
from imageapi.errors import Invalid
from imageapi.linux import mount

pytestmark = pytest.mark.pure

TABLE = {
    "quick": Option(),
    "noquick": Option(),
    "depth": Option(range(1, 9)),
    "mode": Option(("fast", "safe")),
    "owner": Option(re.compile(r"[a-z]+"), "a name", optional=True),
    "wire": Option(refused="it is elsewhere"),
    "dev": DEVICES,
}


def read(*options: str) -> tuple[int, str]:
    flags, own = mount_options.read(options, TABLE, "testfs", "$.options")
    return flags, ",".join(map(str, own))


def test_flags_are_told_from_the_file_systems_own_options_in_their_order() -> None:
    assert read("ro,depth=3", "noexec", "owner", "mode=fast,owner=me") == (
        mount.MS_RDONLY | mount.MS_NOEXEC,
        "depth=3,owner,mode=fast,owner=me",
    )


@pytest.mark.parametrize(
    ("option", "fs_type"),
    [
        ('subvol="x,device=/dev/vdb,subvol=y"', "btrfs"),
        ('subvol="x', "btrfs"),
        ('iocharset="a,b"', "vfat"),
        ('context="a,device=/dev/vdb,b"', "btrfs"),
        ('context="a,abort,b"', "ext4"),
        ('name="a,b=c,d"', "somefs"),
        ('"a,b,c"', "somefs"),
        ('"a,device=/dev/vdb,b"=c', "somefs"),
    ],
)
def test_no_quotes_hide_an_option_that_the_kernel_would_see(option: str, fs_type: str) -> None:
    with pytest.raises(Invalid, match=r"has no such option|its value must be"):
        mount_options.read([option], filesystem_options.table(fs_type), fs_type, "$.options")


@pytest.mark.parametrize(
    "label", ["system_u:object_r:x_t:s0", '"a_u:b_r:c_t:s0:c1,c2"', '"a:b:c:s0:c1.c3,c7-s1:c1,c9"']
)
def test_a_label_may_have_categories(label: str) -> None:
    _, own = mount_options.read([f"context={label}"], filesystem_options.table("ext4"), "ext4", "$.options")
    assert [str(each) for each in own] == [f"context={label}"]


@pytest.mark.parametrize(
    ("options", "path", "words"),
    [
        (["ro", "dpeth=3"], "$.options[1]", "testfs has no such option; did you mean 'depth'?"),
        (["zzz"], "$.options[0]", "option 'zzz': testfs has no such option"),
        (["quick,depth=9"], "$.options[0]", "'depth=9': its value must be a number from 1 to 8"),
        (["depth"], "$.options[0]", "it needs a value: a number from 1 to 8"),
        (["depth=-1"], "$.options[0]", "a number"),
        (["depth=\N{ARABIC-INDIC DIGIT THREE}"], "$.options[0]", "a number"),
        (["quick=1"], "$.options[0]", "it takes no value"),
        (["mode=slow"], "$.options[0]", "fast or safe"),
        (["owner=ME"], "$.options[0]", "a name"),
        (["ro=1"], "$.options[0]", "no such option"),
        (["wire"], "$.options[0]", "it is elsewhere"),
        (["noexec", "dev"], "$.options[1]", "device nodes"),
        (["quick", "noquick"], "$.options[0]", "contradicts 'noquick'"),
    ],
)
def test_what_is_refused_is_named_with_its_place(options: list[str], path: str, words: str) -> None:
    with pytest.raises(Invalid) as refusal:
        read(*options)
    assert refusal.value.fields["path"] == path
    assert words in refusal.value.message
