"""How mount options are looked at before the kernel sees them."""

from __future__ import annotations

import re

import pytest

from imageapi.drivers import mount_options
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
