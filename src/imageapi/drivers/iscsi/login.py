"""A login of our own at a target, before anything else logs in: it tells what is wrong in the user's terms.

The kernel's initiator and QEMU's say little of why they fail, and while QEMU's waits for a silent portal its daemon
hangs. So we log in first, with a session identifier that nobody has, ask what is there, and log out. It is here that
mutual CHAP is checked for QEMU, which cannot.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from imageapi.drivers.deadline import Deadline
from imageapi.drivers.iscsi import chap, pdu
from imageapi.errors import Invalid, Problem
from imageapi.spec import Chap, Iscsi

OPERATIONAL = {
    "HeaderDigest": "None",
    "DataDigest": "None",
    "MaxRecvDataSegmentLength": str(pdu.LARGEST),
    "MaxConnections": "1",
    "InitialR2T": "Yes",
    "ImmediateData": "No",
    "MaxBurstLength": str(pdu.LARGEST),
    "FirstBurstLength": "65536",
    "MaxOutstandingR2T": "1",
    "DataPDUInOrder": "Yes",
    "DataSequenceInOrder": "Yes",
    "ErrorRecoveryLevel": "0",
    "DefaultTime2Wait": "2",
    "DefaultTime2Retain": "0",
}
"""What the session is to be like; keys that are not named keep the RFC's defaults."""

DECLARED = ("TargetAlias", "TargetAddress", "TargetPortalGroupTag")
"""What a target says of itself: it wants no answer."""

SECURITY, NEGOTIATION, FULL = 0, 1, 3
"""The stages of a login."""
MOST_EXCHANGES = 16
"""After so many messages a login that has not come to its end goes in circles."""

DISK = 0x00
REDIRECTIONS = (0x0101, 0x0102)
AUTHENTICATION_FAILED = 0x0201


class Refused(Exception):
    """The target ended the login with `status` (RFC 7143, section 11.13.5); `address` is where it sends us to."""

    def __init__(self, status: int, address: str = "") -> None:
        super().__init__(f"login status {status:#06x}")
        self.status = status
        self.address = address


class NotIscsi(Exception):
    """What listens there does not follow the protocol; the text says in what."""


class NotProven(Exception):
    """The target does not know the mutual secret."""


class Unit(NamedTuple):
    """What a LUN stands for: `kind` is the peripheral device type of SPC-4 (0: a disk), None for nothing."""

    kind: int | None


class Login:
    """A session of ours, over one connection: with the target, or to ask the portal what it knows (`discovery`)."""

    def __init__(
        self, connection: socket.socket, definition: Iscsi, deadline: Deadline, *, discovery: bool = False
    ) -> None:
        self._socket = connection
        self._definition = definition
        self._deadline = deadline
        self._discovery = discovery
        self._stage = SECURITY
        self.group = 1
        # Type "random" (RFC 7143, 11.12.5): another session's identifier would end that one.
        self._isid = b"\x80" + os.urandom(5)
        self._expected = 0
        self._command = 1
        self._task = 0

    # ------------------------------------------------------------------------------------------- the login

    def log_in(self) -> None:
        """Come to the full feature phase.

        Raises: Refused, NotIscsi, NotProven; OSError; TimeoutError.
        """
        definition = self._definition
        first = {
            "InitiatorName": definition.initiator,
            "SessionType": "Discovery" if self._discovery else "Normal",
            **({} if self._discovery else {"TargetName": definition.target}),
            "AuthMethod": ",".join(self._methods),
        }
        said = self._exchange(SECURITY, first, ready=definition.chap is None)
        tag = said.get("TargetPortalGroupTag", "")
        self.group = int(tag) if tag.isdigit() else self.group
        if self._stage == SECURITY:
            self._authenticate(said)
        elif "None" not in self._methods:
            raise NotProven
        self._negotiate()

    @property
    def _methods(self) -> Sequence[str]:
        """What is offered. A target that has no secret to ask for need not, unless it has to prove itself; a portal
        that is asked for addresses need not."""
        who = self._definition.chap
        if who is None:
            return ["None"]
        return ["CHAP"] if who.mutual_secret is not None and not self._discovery else ["CHAP", "None"]

    def _authenticate(self, said: Mapping[str, str]) -> None:
        method = said.get("AuthMethod")
        if method == "CHAP" and self._definition.chap is not None:
            self._prove(self._definition.chap)
        elif method == "None" and "None" in self._methods:
            self._exchange(SECURITY, {}, ready=True)
        else:
            raise NotIscsi(f"it chose the authentication method '{method}', which was not offered")

    def _prove(self, who: Chap) -> None:
        asked = self._exchange(SECURITY, {"CHAP_A": ",".join(chap.HASHES)})
        try:
            algorithm, identifier = asked["CHAP_A"], int(asked["CHAP_I"])
            answer = chap.response(algorithm, identifier, who.secret.reveal(), chap.decode_bytes(asked["CHAP_C"]))
        except (KeyError, ValueError):
            raise NotIscsi("its CHAP challenge is none") from None
        ours = os.urandom(chap.CHALLENGE_SIZE)
        words = {"CHAP_N": who.user, "CHAP_R": chap.encode_bytes(answer)}
        if who.mutual_secret is None:
            self._exchange(SECURITY, words, ready=True)
            return
        number = os.urandom(1)[0]
        said = self._exchange(SECURITY, {**words, "CHAP_I": str(number), "CHAP_C": chap.encode_bytes(ours)}, ready=True)
        expected = chap.response(algorithm, number, who.mutual_secret.reveal(), ours)
        _check_proof(said, who.mutual_user or "", expected)

    def _negotiate(self) -> None:
        """Agree on what the session is like. What a target proposes of its own accord is accepted."""
        words: Mapping[str, str] = OPERATIONAL
        for _ in range(MOST_EXCHANGES):
            said = self._exchange(NEGOTIATION, words, ready=True)
            if self._stage == FULL:
                return
            words = {key: value for key, value in said.items() if key not in OPERATIONAL and key not in DECLARED}
        raise NotIscsi("its negotiation does not end")

    def _exchange(self, stage: int, words: Mapping[str, str], *, ready: bool = False) -> dict[str, str]:
        """One message and its answer. `ready` says that we may go on to the next stage; `_stage` is where we are."""
        following = NEGOTIATION if stage == SECURITY else FULL
        flags = stage << 2 | (pdu.FINAL | following if ready else 0)
        body = struct.pack(">6sHIHHII", self._isid, 0, 0, 0, 0, self._command, self._expected)
        self._send(pdu.LOGIN | pdu.IMMEDIATE, flags, body, pdu.encode_text(words))
        answer = self._receive_login()
        said = answer.data
        while answer.flags & pdu.CONTINUE:
            self._send(pdu.LOGIN | pdu.IMMEDIATE, stage << 2, body)
            answer = self._receive_login()
            said += answer.data
        self._stage = answer.flags & 3 if answer.flags & pdu.FINAL else stage
        return dict(pdu.decode_text(said))

    def _receive_login(self) -> pdu.Pdu:
        answer = self._receive()
        if answer.opcode != pdu.LOGIN_RESPONSE:
            raise NotIscsi(f"it answered a login with message {answer.opcode:#x}")
        if answer.login_status:
            said = dict(pdu.decode_text(answer.data))
            raise Refused(answer.login_status, said.get("TargetAddress", ""))
        self._expected = answer.status_number + 1
        return answer

    # -------------------------------------------------------------------------------- what is asked afterwards

    def portals(self) -> list[str]:
        """The addresses under which the target is reached, as it names them (`10.0.0.1:3260,1`): SendTargets, in a
        discovery session. Empty when it does not say."""
        words = pdu.encode_text({"SendTargets": self._definition.target})
        body = struct.pack(">8sIIII", bytes(8), self._tag(), pdu.NO_TAG, self._next_command(), self._expected)
        self._send(pdu.TEXT, pdu.FINAL, body, words)
        answer = self._receive()
        if answer.opcode != pdu.TEXT_RESPONSE or not answer.flags & pdu.FINAL:
            return []
        return [value for key, value in pdu.decode_text(answer.data) if key == "TargetAddress"]

    def units(self) -> list[int] | None:
        """The LUNs that this initiator sees: REPORT LUNS (SPC-4, 6.33). None when the target does not say."""
        size = 16 + 8 * 512
        data = self._ask(0, struct.pack(">BB4xI2x", 0xA0, 0, size), size)
        if data is None or len(data) < 8:
            return None
        length = min(int.from_bytes(data[:4], "big"), len(data) - 8)
        return sorted(pdu.lun_number(data[at : at + 8]) for at in range(8, 8 + length, 8))

    def unit(self, lun: int) -> Unit | None:
        """What stands behind `lun`: INQUIRY (SPC-4, 6.6). None when the target does not say."""
        data = self._ask(lun, struct.pack(">BBBHB", 0x12, 0, 0, 36, 0), 36)
        if not data:
            return None
        connected = data[0] >> 5 == 0
        return Unit(data[0] & 0x1F if connected else None)

    def log_out(self) -> None:
        """End the session, as far as the target still listens."""
        try:
            body = struct.pack(">8sIIII", bytes(8), self._tag(), 0, self._command, self._expected)
            self._send(pdu.LOGOUT | pdu.IMMEDIATE, pdu.FINAL, body)
            self._receive()
        except (OSError, NotIscsi):
            pass

    def _ask(self, lun: int, command: bytes, size: int) -> bytes | None:
        """The data of a SCSI command that reads `size` bytes; None when it fails."""
        head = struct.pack(">8sIIII", pdu.lun_bytes(lun), self._tag(), size, self._next_command(), self._expected)
        self._send(pdu.SCSI_COMMAND, pdu.FINAL | pdu.READ | pdu.SIMPLE, head + command.ljust(16, b"\0"))
        data = b""
        while True:
            answer = self._receive()
            if answer.opcode == pdu.DATA_IN:
                data += answer.data
                if answer.flags & pdu.HAS_STATUS:
                    return data if answer.reserved[1] == 0 else None
            elif answer.opcode == pdu.SCSI_RESPONSE:
                return data if answer.reserved == bytes(2) else None
            else:
                return None

    def _tag(self) -> int:
        self._task += 1
        return self._task

    def _next_command(self) -> int:
        self._command += 1
        return self._command - 1

    # ----------------------------------------------------------------------------------------- the connection

    def _send(self, opcode: int, flags: int, body: bytes, data: bytes = b"") -> None:
        self._socket.settimeout(self._deadline.left())
        self._socket.sendall(pdu.encode(opcode, flags, body, data))

    def _receive(self) -> pdu.Pdu:
        """The next message that is not just a sign of life."""
        while True:
            header = self._take(pdu.HEADER_SIZE)
            additional, length = pdu.sizes(header)
            if length > pdu.LARGEST:
                raise NotIscsi("its message is larger than was allowed")
            self._take(additional)
            data = self._take(length + -length % 4)[:length]
            message = pdu.decode(header, data)
            if message.opcode != pdu.NOP_IN:
                break
        if message.opcode not in (pdu.LOGIN_RESPONSE, pdu.DATA_IN) or message.flags & pdu.HAS_STATUS:
            self._expected = message.status_number + 1
        return message

    def _take(self, size: int) -> bytes:
        taken = b""
        while len(taken) < size:
            self._socket.settimeout(self._deadline.left())
            more = self._socket.recv(size - len(taken))
            if not more:
                raise NotIscsi("it closed the connection")
            taken += more
        return taken


def _check_proof(said: Mapping[str, str], name: str, expected: bytes) -> None:
    import hmac  # as hashlib in chap: only for this

    try:
        proof = chap.decode_bytes(said["CHAP_R"])
    except (KeyError, ValueError):
        raise NotProven from None
    if said.get("CHAP_N") != name or not hmac.compare_digest(proof, expected):
        raise NotProven


# ------------------------------------------------------------------------------------- in the user's terms


def explain(error: Exception, definition: Iscsi, portal: str) -> Problem:
    """What a login that failed means to whoever asked for it."""
    if isinstance(error, Refused):
        return _explain_status(error.status, definition, portal)
    if isinstance(error, NotProven):
        return Invalid(
            f"the target at {portal} does not prove that it knows the mutual secret: compare chap.mutual_user and "
            "chap.mutual_secret with the target's outgoing account; nothing is attached",
            path="$.chap.mutual_secret",
        )
    return Problem(
        f"what listens at {portal} is no iSCSI target: {error}; see host and port", path="$.host", step="log in"
    )


def _explain_status(status: int, definition: Iscsi, portal: str) -> Problem:
    code = f"iSCSI login status {status:#06x}"
    if status == AUTHENTICATION_FAILED:
        return _unauthentic(definition, portal, code)
    if status == 0x0202:
        return Invalid(
            f"target {definition.target} does not let initiator {definition.initiator} in: add it to the target's "
            "access list",
            path="$.initiator",
            detail=code,
        )
    if status in (0x0203, 0x0204):
        return Invalid(
            f"there is no target {definition.target} at {portal} for initiator {definition.initiator}: see the "
            "target's name, and whom it is shown to",
            path="$.target",
            detail=code,
        )
    later = status >> 8 == 3
    hint = "it is busy or being changed, try again" if later else "see the target's log"
    return Problem(f"target {definition.target} at {portal} refuses the login: {hint}", step="log in", detail=code)


def _unauthentic(definition: Iscsi, portal: str, code: str) -> Problem:
    if definition.chap is None:
        return Invalid(
            f"target {definition.target} at {portal} wants CHAP: give chap.user and chap.secret",
            path="$.chap",
            detail=code,
        )
    mutual = "it has an account to prove itself with" if definition.chap.mutual_secret else "it demands mutual CHAP"
    return Invalid(
        f"target {definition.target} refuses user '{definition.chap.user}': compare chap.user and chap.secret with "
        f"the target's account, and see whether {mutual}",
        path="$.chap.secret",
        detail=code,
    )
