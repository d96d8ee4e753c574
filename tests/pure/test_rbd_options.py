"""The rbd driver's pure parts: options, monitors, keys, and what the kernel's sysfs is told and tells."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
from itertools import permutations
from pathlib import Path
from typing import Any

import msgspec
import pytest

from imageapi import errors
from imageapi.config import Site
from imageapi.drivers import aside, storage_daemon
from imageapi.drivers.attach.rbd import Driver
from imageapi.drivers.ceph import daemon, kernel, keys, monitors, options, refusals
from imageapi.drivers.ceph.monitors import Address, Monitor
from imageapi.drivers.deadline import Deadline
from imageapi.linux import krbd, sysfs
from imageapi.records import Key
from imageapi.spec import MASK, Rbd, RbdOptions, Secret

pytestmark = pytest.mark.pure
KEY = "AQAxTAVrYyq6CRAAOY3NIRDgquZG0aCBFil2vA=="
SAMPLES: dict[str, Any] = {"ms_mode": "crc", "read_from_replica": "balance", "compression_hint": "compressible"}
NUMBERS = {"mount_timeout", "osdkeepalive", "osd_idle_ttl", "queue_depth", "lock_timeout", "alloc_size"}
TEXTS = {"name", "namespace", "fsid", "ip"}


def sample(name: str) -> Any:
    """A value that the option `name` can have."""
    if name in SAMPLES:
        return SAMPLES[name]
    if name == "secret":
        return Secret(KEY)
    if name == "crush_location":
        return "rack:r1|host:h1"
    return 4096 if name in NUMBERS else "text" if name in TEXTS else True


def flagged(*names: str) -> Rbd:
    return Rbd(["10.0.0.1"], "pool", "image", None, RbdOptions(**dict.fromkeys(names, True)))  # type: ignore[arg-type]


def rbd(snapshot: str | None = None, **chosen: Any) -> Rbd:
    return Rbd(["10.0.0.1"], "pool", "image", snapshot, RbdOptions(**chosen))


# ------------------------------------------------------------------------------------------------ options


def test_every_option_of_the_spec_has_a_line_in_the_table() -> None:
    assert set(options.OPTIONS) == set(RbdOptions.__struct_fields__)


@pytest.mark.parametrize("name", options.OPTIONS)
def test_an_option_is_honoured_by_the_daemon_way_or_refused_by_name(name: str) -> None:
    chosen = RbdOptions(**{name: sample(name)})
    if options.OPTIONS[name].daemon is None:
        with pytest.raises(errors.Unsupported, match="--rbd-backend kernel") as caught:
            options.daemon_lines(chosen)
        assert caught.value.fields["path"] == f"$.options.{name}"
    else:
        assert KEY not in "".join(options.daemon_lines(chosen))


@pytest.mark.parametrize("name", options.OPTIONS)
def test_every_option_is_explained_or_speaks_for_itself(name: str) -> None:
    option = options.OPTIONS[name]
    assert option.daemon or option.why


@pytest.mark.parametrize(("one", "other"), options.PAIRS)
def test_a_pair_that_contradicts_itself_is_refused(one: str, other: str) -> None:
    with pytest.raises(errors.Invalid, match=f"'{one}' and '{other}'"):
        options.check(flagged(one, other))
    options.check(flagged(one))
    options.check(flagged(other))


def test_a_snapshot_cannot_be_written() -> None:
    with pytest.raises(errors.Invalid, match="snapshot"):
        options.check(rbd("one", rw=True))
    assert options.read_only(rbd("one"))
    assert not options.read_only(rbd())


def test_the_kernel_gets_its_own_words() -> None:
    chosen = rbd(
        name="me", secret=Secret(KEY), namespace="ns", ro=True, ceph_requires_signatures=True, force=True, udev=True
    )
    assert sorted(options.kernel_words(chosen)) == [
        "_pool_ns=ns",
        "cephx_require_signatures",
        f"mount_timeout={options.CONNECT_TIMEOUT}",
        "name=me",
        "ro",
    ]


def test_no_options_at_all_mean_client_admin() -> None:
    assert options.kernel_words(rbd()) == ["name=admin", f"mount_timeout={options.CONNECT_TIMEOUT}"]
    assert options.user(RbdOptions(name="")) == "admin"


def test_a_value_cannot_smuggle_in_another_option() -> None:
    with pytest.raises(errors.Invalid, match="blank or a comma"):
        options.kernel_words(rbd(name="me,rw"))
    with pytest.raises(errors.Invalid, match="CRUSH"):
        options.daemon_lines(RbdOptions(crush_location="rack:r1\nmon host = 10.0.0.9"))


def test_the_daemon_gets_a_configuration_in_cephs_words() -> None:
    lines = options.daemon_lines(
        RbdOptions(nocrc=True, read_from_replica="no", crush_location="rack:r1|host:h1", ms_mode="prefer-secure")
    )
    assert lines == [
        f"client mount timeout = {options.CONNECT_TIMEOUT}",
        "ms crc data = false",
        "rbd read from replica policy = default",
        "crush location = rack=r1 host=h1",
        "ms client mode = secure crc",
        "ms mon client mode = secure crc",
    ]


def test_the_first_messenger_cannot_be_demanded_of_librados() -> None:
    with pytest.raises(errors.Unsupported, match="legacy"):
        options.daemon_lines(RbdOptions(ms_mode="legacy"))


@pytest.mark.parametrize(
    ("asked", "given"),
    [(None, options.CONNECT_TIMEOUT), (0, options.CONNECT_TIMEOUT), (3, 3), (600, options.CONNECT_TIMEOUT)],
)
def test_connecting_never_takes_longer_than_the_answer_may(asked: int | None, given: int) -> None:
    assert options.connect_timeout(RbdOptions(mount_timeout=asked)) == given


# ----------------------------------------------------------------------------------------------- monitors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.168.1.48", Monitor("192.168.1.48", 6789)),
        ("192.168.1.48:3300", Monitor("192.168.1.48", 3300)),
        ("mon-a.example_1.org", Monitor("mon-a.example_1.org", 6789)),
        ("mon-a:7000", Monitor("mon-a", 7000)),
        ("[fd00::1]:3300", Monitor("fd00::1", 3300)),
        ("[fd00::1]", Monitor("fd00::1", 6789)),
        ("fd00::1", Monitor("fd00::1", 6789)),
        ("::1", Monitor("::1", 6789)),
    ],
)
def test_a_monitor_can_be_written_in_every_usual_way(text: str, expected: Monitor) -> None:
    assert monitors.parse([text]) == [expected]


@pytest.mark.parametrize("text", ["a b", "a,b", "host:0", "host:65536", "host:", ":6789", "v2:host:1", "[::1", "a/b"])
def test_what_is_no_monitor_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(errors.Invalid, match="is no monitor") as caught:
        monitors.parse(["good", text])
    assert caught.value.fields["path"] == "$.monitors[1]"


def test_a_banner_tells_the_messenger() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"ceph v2\n\x10\x00")

        thread = threading.Thread(target=serve)
        thread.start()
        assert monitors.reachable([Monitor("127.0.0.1", port)], 10) == [Address("127.0.0.1", port, "v2")]
        thread.join()


def test_something_else_that_listens_is_no_monitor() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(errors.TimedOut, match=f"127.0.0.1:{port}"):
            monitors.reachable([Monitor("127.0.0.1", port)], 0.05)


def test_a_name_nobody_knows_is_the_users_mistake() -> None:
    with pytest.raises(errors.Invalid, match=r"nowhere\.invalid"):
        monitors.resolve([Monitor("nowhere.invalid", 6789)])


def test_one_image_is_the_same_however_its_monitors_are_written() -> None:
    driver = Driver()
    one = Rbd(["b", "a:6789"], "pool", "image")
    same = Rbd(["a", "B:3300"], "pool", "image", None, RbdOptions(ms_mode="crc"))
    assert driver.identities(one) == driver.identities(same)
    assert driver.identities(one).isdisjoint(driver.identities(Rbd(["b", "a"], "pool", "image", "one")))
    assert not driver.identities(one).isdisjoint(driver.identities(Rbd(["c", "a"], "pool", "image")))
    assert driver.store(one) == driver.store(Rbd(["a:6789", "b"], "other", "image"))


# --------------------------------------------------------------------------------------------------- keys


def test_a_key_is_decoded_for_the_kernel() -> None:
    assert len(keys.decoded(Secret(KEY))) == keys.HEADER.size + 16
    assert len(keys.decoded(kernel.NO_KEY)) == keys.HEADER.size + 16


@pytest.mark.parametrize("text", ["", MASK, "not base64!", "QUJDREVGR0g=", KEY[:-4], KEY + KEY, "ключ"])
def test_what_is_no_key_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(errors.Invalid, match="no Ceph key") as caught:
        keys.decoded(Secret(text))
    assert not text or text not in str(caught.value.to_dict())


# ----------------------------------------------------------------------------------- the kernel's interface


def test_the_line_for_the_kernel() -> None:
    image = krbd.Image("", "pool", "", "image", None)
    assert krbd.line(["10.0.0.1:6789", "[fd00::1]:6789"], ["name=me", "ro"], image) == (
        "10.0.0.1:6789,[fd00::1]:6789 name=me,ro pool image -"
    )
    assert krbd.line(["10.0.0.1"], ["ro"], image._replace(snapshot="one")).endswith(" image one")


@pytest.mark.parametrize("wrong", [{"pool": "a b"}, {"name": ""}, {"name": "a\nb"}, {"snapshot": "a\tb"}])
def test_what_a_line_cannot_carry(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="blank"):
        krbd.line(["10.0.0.1"], ["ro"], krbd.Image("", "pool", "", "image", None)._replace(**wrong))
    with pytest.raises(ValueError, match="comma"):
        krbd.line(["10.0.0.1"], ["name=a,b"], krbd.Image("", "pool", "", "image", None))


def bus(root: Path, *, single_major: bool = True) -> str:
    """A directory that looks like the driver's."""
    (root / "devices").mkdir(parents=True)
    for name in ("add", "remove", *(("add_single_major", "remove_single_major") if single_major else ())):
        (root / name).touch()
    return str(root)


def mapped(root: str, number: int, options_text: str, snapshot: str = "-", image_id: str = "1") -> None:
    device = Path(root, "devices", str(number))
    device.mkdir()
    (device / "config_info").write_text(f"10.0.0.1:6789 {options_text} pool image {snapshot}\n")
    data = krbd.Data("11111111-0000-0000-0000-000000000000", "1", "", image_id, "2")
    for name, text in zip(krbd.DATA, data, strict=True):
        (device / name).write_text(f"{text}\n")


@pytest.mark.parametrize("single_major", [True, False])
def test_the_commands_go_to_the_files_that_the_kernel_has(tmp_path: Path, single_major: bool) -> None:
    root = bus(tmp_path / "rbd", single_major=single_major)
    suffix = "_single_major" if single_major else ""
    krbd.map_image("a line", root)
    krbd.unmap(3, force=True, root=root)
    assert Path(root, f"add{suffix}").read_text() == "a line"
    assert Path(root, f"remove{suffix}").read_text() == "3 force"


def test_a_driver_that_is_not_there(tmp_path: Path) -> None:
    assert not krbd.available(str(tmp_path / "rbd"))
    with pytest.raises(FileNotFoundError) as caught:
        krbd.map_image("a line", str(tmp_path))
    assert caught.value.filename == str(tmp_path / "add")


def test_a_device_is_found_by_its_mark_and_its_image(tmp_path: Path) -> None:
    site = Site(run_dir=str(tmp_path), instance="12345678")
    root = bus(tmp_path / "rbd")
    mapped(root, 0, "name=admin,key=client.admin")
    mapped(root, 10, "name=me,key=imageapi:12345678:attach/1,_pool_ns=ns,ro")
    mapped(root, 2, "name=me,key=imageapi:12345678:attach/11", "one")
    device = kernel.find(Key("attach", 1), rbd(namespace="ns"), site, root)
    assert device is not None
    assert (device.file, device.image.namespace, device.read_only) == ("/dev/rbd10", "ns", True)
    assert kernel.observe(Key("attach", 11), rbd("one"), site, root) == "/dev/rbd2"
    for key, other in ((1, rbd()), (11, rbd("two")), (11, rbd()), (2, rbd("one"))):
        assert kernel.observe(Key("attach", key), other, site, root) is None
    assert [each.id for each in krbd.devices(root)] == [0, 2, 10]


def test_a_device_that_goes_while_it_is_looked_at_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are opened before that, and cannot be read any more."""
    root = bus(tmp_path / "rbd")
    mapped(root, 0, "name=admin,key=client.admin")

    def gone(path: str) -> str:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), path)

    monkeypatch.setattr(sysfs, "read", gone)
    assert krbd.devices(root) == []


@pytest.mark.parametrize("fsid", ["0c0ffee0", "urn:uuid:00000000-0000-4000-8000-000000000000", "0;c0ffee" * 4])
def test_a_number_of_a_cluster_that_is_none_is_refused_before_anything(fsid: str) -> None:
    with pytest.raises(errors.Invalid) as refusal:
        options.check(rbd(fsid=fsid))
    assert refusal.value.fields["path"] == "$.options.fsid"


def test_monitors_that_have_taken_all_the_time_are_a_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> str:
        return "nothing is mapped"

    root = bus(tmp_path / "rbd")
    monkeypatch.setattr(kernel, "SHOWING", -options.CONNECT_TIMEOUT)
    monkeypatch.setattr(kernel, "command", late)
    with pytest.raises(errors.TimedOut):
        kernel.acquire(Key("attach", 1), rbd(), Site(run_dir=str(tmp_path)), root)
    assert Path(root, "add_single_major").read_text() == ""


def test_releasing_what_is_not_mapped_does_nothing(tmp_path: Path) -> None:
    kernel.release(Key("attach", 1), rbd(), Site(run_dir=str(tmp_path)), str(tmp_path / "none"))
    root = bus(tmp_path / "rbd")
    kernel.release(Key("attach", 1), rbd(), Site(run_dir=str(tmp_path)), root)
    assert Path(root, "remove_single_major").read_text() == ""


def test_a_release_unmaps_our_device(tmp_path: Path) -> None:
    site = Site(run_dir=str(tmp_path), instance="12345678")
    root = bus(tmp_path / "rbd")
    mapped(root, 4, f"key={site.mark(Key('attach', 1))}")
    kernel.release(Key("attach", 1), rbd(), site, root)
    assert Path(root, "remove_single_major").read_text() == "4"


def test_a_release_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it works where the run directory has no room."""
    site = Site(run_dir=str(tmp_path), instance="12345678")
    root = bus(tmp_path / "rbd")
    mapped(root, 4, f"key={site.mark(Key('attach', 1))}")

    def seen(*_: object, root: str) -> None:
        Path(root, "seen").write_text(str(os.listdir(site.helpers_dir)))

    monkeypatch.setattr(krbd, "unmap", seen)
    kernel.release(Key("attach", 1), rbd(), site, root)
    assert Path(root, "seen").read_text() == "[]"


def test_what_the_host_lacks_is_not_taken_for_the_kernels_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run")

    monkeypatch.setattr(kernel, "command", lambda *_: "a line")
    monkeypatch.setattr(aside, "_locked", lacking)
    with pytest.raises(OSError) as refusal:
        kernel.acquire(Key("attach", 1), rbd(), Site(run_dir=str(tmp_path)), bus(tmp_path / "rbd"))
    assert refusal.value.errno == errno.ENOSPC


LOG = "rbd: image image: image uses unsupported features: 0x440"


@pytest.mark.parametrize(
    ("number", "log", "code", "word"),
    [
        (errno.EACCES, "", 422, "client.me"),
        (errno.EPERM, "", 422, "profile rbd pool=pool"),
        (errno.ENOENT, "", 422, "'pool/image'"),
        (errno.ENOENT, "rbd: pool pool does not exist", 422, "no pool 'pool'"),
        (errno.ENOENT, "rbd: image pool/image does not exist", 422, "no image 'image'"),
        (errno.ENOENT, "rbd: image pool/other does not exist", 422, "'pool/image'"),
        (errno.ETIMEDOUT, "", 504, "10.0.0.1"),
        (errno.ETIMEDOUT, "rbd: rbd0: failed to acquire exclusive lock: -110", 409, "rbd lock ls pool/image"),
        (errno.EROFS, "", 409, "rbd lock ls pool/image"),
        (errno.ESHUTDOWN, "", 409, "blocklist"),
        (errno.ENXIO, LOG, 501, "journaling non-primary"),
        (errno.EINVAL, "libceph: Unknown parameter 'rxbounce'", 501, "rxbounce"),
        (errno.EINVAL, "libceph: Failed to parse fsid: -22", 422, "Failed to parse fsid"),
        (errno.EIO, "", 500, "image"),
    ],
)
def test_the_kernels_errors_in_the_users_terms(number: int, log: str, code: int, word: str) -> None:
    found = refusals.explain(OSError(number, "words"), rbd(name="me"), refusals.Said(log))
    assert found.code == code
    assert word in found.message
    assert found.fields["errno"] == errno.errorcode[number]


@pytest.mark.parametrize(
    ("messengers", "mode", "told"),
    [
        (["v1"], None, (["a:1"], [])),
        (["v2"], None, (["a:1"], ["ms_mode=prefer-crc"])),
        (["v2", "v1"], None, (["b:2"], [])),
        (["v2", "v1"], "secure", (["a:1"], [])),
        (["v1"], "crc", None),
        (["v2"], "legacy", None),
    ],
)
def test_the_kernel_is_told_of_monitors_that_speak_its_way(
    messengers: list[str], mode: str | None, told: tuple[list[str], list[str]] | None
) -> None:
    found = [Address(ip, port, each) for ip, port, each in zip("ab", (1, 2), messengers, strict=False)]
    if told is not None:
        assert kernel.spoken_to(found, mode) == told
    else:
        with pytest.raises(errors.Invalid, match="ms_mode"):
            kernel.spoken_to(found, mode)


def test_the_monitors_names_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time may take as long as a silent name server does."""
    asked = []

    def resolved(host: bytes, port: int, **_: object) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]

    def answering(waiting: selectors.BaseSelector, _: float) -> list[Address]:
        return [Address(each.data[0], each.data[1], "v1") for each in waiting.get_map().values()]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: None)
    monkeypatch.setattr(monitors, "_listen", answering)
    files = daemon.source(Key("attach", 1), rbd(), Site(run_dir=str(tmp_path))).files
    assert "mon host = v1:10.0.0.1:6789" in files[daemon.CONF]
    assert msgspec.json.decode(files[daemon.OPENED], type=daemon.Opened).addresses == ["10.0.0.1"]
    assert len(asked) == 1


FIRST, SECOND, THIRD = (Key("attach", number) for number in range(3))


@pytest.fixture
def noted(tmp_path: Path) -> Site:
    """A site where three attachments have noted one image, by other monitors of the same cluster."""
    site = Site(run_dir=str(tmp_path), instance="12345678")
    for key, addresses in ((FIRST, ["10.0.0.1", "10.0.0.2"]), (SECOND, ["10.0.0.2"]), (THIRD, ["10.0.0.1"])):
        note(site, key, addresses)
    return site


def note(site: Site, key: Key, addresses: list[str], image: str = "image", *, read_only: bool = False) -> None:
    path = Path(storage_daemon.private_path(site, key, daemon.OPENED))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(daemon.Opened(["rbd", "", image], addresses, read_only)))


def stays(key: Key, site: Site) -> bool:
    try:
        daemon._check_alone(key, site, Deadline(10))
    except errors.Conflict:
        return False
    return True


@pytest.mark.parametrize("order", list(permutations((FIRST, SECOND, THIRD))))
def test_of_those_that_open_an_image_at_once_one_stays(noted: Site, order: tuple[Key, ...]) -> None:
    """The second and the third do not know of each other, since they name no monitor in common."""
    staying = [key for key in order if stays(key, noted)]
    assert staying[-1] == order[-1]
    assert len(staying) == 1 or set(staying) == {SECOND, THIRD}


def test_one_that_comes_gives_way_to_one_that_stands_with_a_higher_number(noted: Site) -> None:
    """Its name server was slow."""
    Path(storage_daemon.private_path(noted, FIRST, daemon.OPENED)).unlink()
    assert stays(SECOND, noted)
    note(noted, FIRST, ["10.0.0.2"])
    assert not stays(FIRST, noted)
    assert stays(SECOND, noted)


def test_those_that_only_read_an_image_or_have_another_stay(noted: Site) -> None:
    note(noted, FIRST, ["10.0.0.1"], read_only=True)
    note(noted, SECOND, ["10.0.0.1"], "other")
    note(noted, THIRD, ["10.0.0.1"], read_only=True)
    assert all(stays(key, noted) for key in (FIRST, SECOND, THIRD))


def test_they_look_one_after_the_other(noted: Site) -> None:
    with daemon._alone(noted, Deadline(10)), pytest.raises(TimeoutError):
        daemon._check_alone(FIRST, noted, Deadline(0.01))
