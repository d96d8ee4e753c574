"""The parts of our own iSCSI login that need no target: messages, proofs, addresses, and what refusals mean."""

from __future__ import annotations

import pytest

from imageapi import errors
from imageapi.drivers.iscsi import chap, daemon, login, pdu, portals
from imageapi.drivers.iscsi.login import NotIscsi, Refused
from imageapi.drivers.iscsi.portals import Portal
from imageapi.spec import Chap, Iscsi, Secret

pytestmark = pytest.mark.pure

PLAIN = Iscsi(initiator="iqn.a:me", target="iqn.b:it", host="h")
WITH_CHAP = Iscsi(initiator="iqn.a:me", target="iqn.b:it", host="h", chap=Chap("u", Secret("s3cret")))


def test_a_message_is_read_as_it_was_written() -> None:
    body = bytes(range(40))
    sent = pdu.encode(pdu.TEXT_RESPONSE, 0x81, body, b"abcde")
    assert len(sent) == pdu.HEADER_SIZE + 8
    assert pdu.sizes(sent[: pdu.HEADER_SIZE]) == (0, 5)
    assert pdu.decode(sent[:48], sent[48:53]) == pdu.Pdu(pdu.TEXT_RESPONSE, 0x81, bytes(2), body, b"abcde")


def test_a_key_may_be_answered_many_times() -> None:
    said = pdu.encode_text({"TargetName": "iqn.b"}) + pdu.encode_text({"TargetAddress": "10.0.0.1:3260,1"}) * 2
    assert pdu.decode_text(said) == [("TargetName", "iqn.b"), *[("TargetAddress", "10.0.0.1:3260,1")] * 2]
    assert pdu.decode_text(b"\0no equals sign\0") == []


@pytest.mark.parametrize(("lun", "first"), [(0, "0000"), (1, "0001"), (255, "00ff"), (256, "4100"), (16383, "7fff")])
def test_a_lun_is_addressed_as_its_size_wants(lun: int, first: str) -> None:
    assert pdu.lun_bytes(lun).hex() == first + "0" * 12
    assert pdu.lun_number(pdu.lun_bytes(lun)) == lun
    assert pdu.lun_word(lun) == int(first, 16)


def test_a_proof_is_the_hash_of_identifier_secret_and_challenge() -> None:
    assert chap.response("5", 1, "secret", b"\x01\x02").hex() == "18c6ee42cdcc2258144945ad28cad5a2"
    assert {name: len(chap.response(name, 1, "s", b"c")) for name in chap.HASHES} == {
        "5": 16,
        "6": 20,
        "7": 32,
        "8": 32,
    }


@pytest.mark.parametrize("text", ["0xabc", "0X0ABC", "0bCrw="])
def test_a_binary_value_is_hexadecimal_or_base64(text: str) -> None:
    assert chap.decode_bytes(text) == b"\x0a\xbc"
    assert chap.decode_bytes(chap.encode_bytes(b"\x0a\xbc")) == b"\x0a\xbc"


@pytest.mark.parametrize("text", ["", "abc", "0xgg", "0b!", "17"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        chap.decode_bytes(text)


@pytest.mark.parametrize(
    ("text", "portal"),
    [
        ("10.0.0.1:3261,1", Portal("10.0.0.1", 3261)),
        ("10.0.0.1", Portal("10.0.0.1", 3260)),
        ("[fd00::1]:3260,2", Portal("fd00::1", 3260, 2)),
        ("[fd00::1]", Portal("fd00::1", 3260)),
        ("storage.example:3260", Portal("storage.example", 3260)),
    ],
)
def test_a_target_names_its_portals(text: str, portal: Portal) -> None:
    assert portals.parse(text) == portal
    assert portals.parse(str(portal))[:2] == portal[:2]


@pytest.mark.parametrize("text", ["", "a:b", "fd00::1:3260", "[fd00::1"])
def test_what_is_no_portal_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        portals.parse(text)


@pytest.mark.parametrize(
    ("status", "definition", "code", "path"),
    [
        (0x0201, PLAIN, 422, "$.chap"),
        (0x0201, WITH_CHAP, 422, "$.chap.secret"),
        (0x0202, PLAIN, 422, "$.initiator"),
        (0x0203, PLAIN, 422, "$.target"),
        (0x0204, PLAIN, 422, "$.target"),
        (0x0301, PLAIN, 500, None),
        (0x0200, PLAIN, 500, None),
    ],
)
def test_a_refusal_says_what_to_change(status: int, definition: Iscsi, code: int, path: str | None) -> None:
    refusal = login.explain(Refused(status), definition, "10.0.0.1:3260")
    assert (refusal.code, refusal.fields.get("path")) == (code, path)
    assert refusal.fields["detail"] == f"iSCSI login status {status:#06x}"
    assert "s3cret" not in str(refusal.to_dict())


def test_what_speaks_something_else_is_named() -> None:
    refusal = login.explain(NotIscsi("it closed the connection"), PLAIN, "10.0.0.1:22")
    assert "10.0.0.1:22 is no iSCSI target: it closed the connection" in refusal.message


@pytest.mark.parametrize(
    ("words", "kind", "path"),
    [
        ("Failed to log in to target. Status: Authentication failure(513)", errors.Unsupported, "$.chap"),
        ("LUN is write protected", errors.Invalid, "$.ro"),
        ("Unknown driver 'iscsi'", errors.Unsupported, None),
        ("something nobody has seen", errors.Problem, None),
    ],
)
def test_what_qemu_says_after_our_own_login_went_well(words: str, kind: type[errors.Problem], path: str) -> None:
    refusal = daemon.explain(words, WITH_CHAP)
    assert (type(refusal), refusal.fields.get("path")) == (kind, path)


def test_of_the_portals_that_a_target_names_only_addresses_of_our_kind_are_of_use() -> None:
    named = ["10.0.0.2:3260,2", "san2.example:3260,1", "10.0.0.3:70000,1", "[fd00::1]:3260,1", "0.0.0.0:3260,1", "?"]
    assert portals._usable(named, Portal("10.0.0.1", 3260)) == [Portal("10.0.0.2", 3260, 2)]
    assert portals._usable(named, Portal("fd00::9", 3260)) == [Portal("fd00::1", 3260, 1)]
