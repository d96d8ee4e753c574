"""The options of an NFS mount, and what the kernel is told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from imageapi.drivers.mount.nfs import Driver
from imageapi.drivers.nfs import client, options, problems, server
from imageapi.drivers.nfs.options import OPTIONS, VERSIONS
from imageapi.drivers.nfs.server import Reached
from imageapi.errors import Invalid, Problem
from imageapi.linux import mount
from imageapi.spec import Nfs

pytestmark = pytest.mark.pure

REACHED = Reached("192.0.2.1", 2049, "192.0.2.7")
TEXTS = {"sec": "krb5p:sys", "clientaddr": "192.0.2.9"}
TAKEN = [name for name, option in OPTIONS.items() if not option.refused]


def export(*given: str, **more: Any) -> Nfs:
    return Nfs("server", "/export", options=list(given), **more)


def told(definition: Nfs) -> list[str]:
    return client.words(definition, options.choose(definition), REACHED)


def sample(name: str) -> str:
    """The option with a value that it can have."""
    values = OPTIONS[name].values
    if isinstance(values, re.Pattern):
        return f"{name}={TEXTS[name]}"
    return name if values is None else f"{name}={values[-1]}"


def version_of(name: str) -> Any:
    return VERSIONS.get(name, ["4.2"])[0]


@pytest.mark.parametrize("name", TAKEN)
def test_every_option_that_is_taken_reaches_the_kernel_as_it_was_given(name: str) -> None:
    given = told(export(sample(name), version=version_of(name)))
    assert (sample(name) in given) == (name not in ("intr", "nointr"))


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - set(TAKEN)))
def test_an_option_that_is_not_for_the_kernel_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(Invalid, match=r"give|leave it out") as refusal:
        told(export("soft", name))
    assert refusal.value.fields["path"] == "$.options[1]"


@pytest.mark.parametrize("name", VERSIONS)
def test_an_option_of_another_version_is_refused_by_name(name: str) -> None:
    other = "3" if "3" not in VERSIONS[name] else "4.2"
    with pytest.raises(Invalid, match=f"'{re.escape(sample(name))}' belongs to version"):
        told(export(sample(name), version=other))


@pytest.mark.parametrize(
    ("given", "path", "words"),
    [
        (["rsise=4096"], "$.options[0]", "did you mean 'rsize'?"),
        (["hard", "soft"], "$.options[1]", "'hard' and 'soft': give one"),
        (["tcp", "proto=rdma"], "$.options[1]", "give one"),
        (["proto=tcp", "proto=rdma"], "$.options[1]", "give one"),
        (["ac", "noac"], "$.options[0]", "contradicts"),
        (["nconnect=17"], "$.options[0]", "a number from 1 to 16"),
        (["sec=krb4"], "$.options[0]", "krb5"),
        (["vers=3"], "$.options[0]", "'version'"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: list[str], path: str, words: str) -> None:
    with pytest.raises(Invalid) as refusal:
        told(export(*given))
    assert refusal.value.fields["path"] == path
    assert words in refusal.value.message


def test_ro_and_rw_contradict_each_other() -> None:
    with pytest.raises(Invalid, match="contradicts 'ro'"):
        told(export("soft", "rw", ro=True))


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        (export(), ["addr=192.0.2.1", "nosharecache"]),
        (export("sharecache", "port=2050"), ["addr=192.0.2.1", "sharecache", "port=2050"]),
        (export(version="4.0"), ["addr=192.0.2.1", "clientaddr=192.0.2.7", "nosharecache"]),
        (export("clientaddr=192.0.2.9", version="4"), ["addr=192.0.2.1", "clientaddr=192.0.2.9", "nosharecache"]),
        (export(version="3"), ["addr=192.0.2.1", "port=2049", "nosharecache"]),
        (export(version="3", ro=True), ["addr=192.0.2.1", "port=2049", "nolock", "nosharecache"]),
        (export("ro,lock", version="3"), ["addr=192.0.2.1", "lock", "port=2049", "nosharecache"]),
    ],
)
def test_what_mount_nfs_would_add_is_added(definition: Nfs, words: list[str]) -> None:
    assert told(definition) == words


def test_a_cache_is_shared_however_that_is_said() -> None:
    for definition, shared in ((export(), False), (export("nosharecache"), False), (export("noac,sharecache"), True)):
        assert options.shares_cache(definition) == shared


def test_ro_is_the_mounts_however_it_is_said() -> None:
    assert options.choose(export()).flags == 0
    assert options.choose(export(ro=True)).flags == mount.MS_RDONLY
    assert options.choose(export("ro,noatime")).flags == mount.MS_RDONLY | mount.MS_NOATIME


@pytest.mark.parametrize(
    ("host", "source"),
    [("server", "server:/export"), ("2001:db8::1", "[2001:db8::1]:/export"), ("[::1]", "[::1]:/export")],
)
def test_an_address_is_taken_with_brackets_and_without(host: str, source: str) -> None:
    assert server.source(Nfs(host, "/export")) == source


@pytest.mark.parametrize("host", ["a b", "a/b", "a,b", "[]", "[::1]:2049"])
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(Invalid, match="is no host") as refusal:
        server.source(Nfs(host, "/export"))
    assert refusal.value.fields["path"] == "$.host"


def test_what_only_reads_may_be_shared_and_each_server_is_a_store_of_its_own() -> None:
    driver = Driver()
    assert [driver.read_only(each) for each in (export(), export(ro=True), export("ro"))] == [False, True, True]
    assert driver.store(export()) == "nfs:server"


@pytest.mark.parametrize("number", [*range(1, 22), *range(23, 40), 71, 93, 95, 98, 99, 110, 111, 116, None])
def test_every_errno_has_an_answer_that_names_the_server(number: int | None) -> None:
    error = TimeoutError("silent") if number is None else OSError(number, "refused")
    problem = problems.explain(error, export(), "nfs4", "vers=4.2")
    assert isinstance(problem, Problem)
    assert any(words in problem.message for words in ("server", "this host", "this kernel", "longer"))
