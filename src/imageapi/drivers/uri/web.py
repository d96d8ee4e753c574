"""A web server's content: RFC 9110 for what is asked and answered, urllib3 for the transport.

Imported only by the worker that needs it. Nothing that urllib3 says in its own words is repeated, since it names the
whole address, signature included.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from ssl import SSLCertVerificationError
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3 import exceptions
from urllib3.response import BaseHTTPResponse

from imageapi import __version__
from imageapi.drivers.uri import paced
from imageapi.drivers.uri.source import PIECE, Interrupted
from imageapi.errors import Invalid, Problem, TimedOut

logging.getLogger("urllib3").propagate = False  # it writes whole addresses

CONNECT = 3.0
"""Seconds to reach a server."""
SILENCE = 8.0
"""Seconds that it may say nothing, and, after those for reaching it, all that it has for the head of an answer, also
where that leads elsewhere."""
TRIES = 2
"""Of an address that has not brought anything yet."""
PERSISTENCE = 11.0
"""Seconds for which one that has is tried again: a server that is started again is soon there. The last try may begin
at their end, and all is over before the 25 s for which an operation may stand still."""
PAUSE = 0.25
"""Seconds before the second try; twice as long before each further one, up to the longest."""
LONGEST_PAUSE = 2.0
REDIRECTS = 5
_REDIRECT = (301, 302, 303, 307, 308)
_TRY_AGAIN = (408, 429, 500, 502, 503, 504)
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class _Broken(Exception):
    """A try that failed in a way that the next one may not."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class Web:
    """One address."""

    def __init__(self, address: str, *, known: bool) -> None:
        self._address = address
        self._known = known
        self._validator: str | None = None
        """What says that it is still the same content (RFC 9110, 13.1.5)."""
        self.total: int | None = None
        self.where = where(address)

    def pieces(self, position: int) -> Iterator[bytes]:
        tries, moved = 0, 0.0
        while True:
            try:
                for piece in self._once(position):
                    tries, moved = 0, time.monotonic()
                    position += len(piece)
                    yield piece
                return
            except _Broken as broken:
                tries += 1
                if (time.monotonic() - moved > PERSISTENCE) if moved else tries == TRIES:
                    raise broken.problem from None
                self._check_can_go_on(broken, position)
            time.sleep(min(PAUSE * 2 ** (tries - 1), LONGEST_PAUSE))

    def _check_can_go_on(self, broken: _Broken, position: int) -> None:
        """Raises: Interrupted, when the rest may be of another content."""
        if position and not (self._known or self._validator):
            raise Interrupted(
                f"{broken.problem.message}; it was broken off after {position} bytes, and the server says nothing by "
                "which to know that the rest is of the same image: give its sha256"
            )

    def _once(self, position: int) -> Iterator[bytes]:
        """The content from `position` on, as long as one connection brings it.

        Raises: _Broken; errors.Problem.
        """
        with self._answer(position) as answer:
            skip = self._begin(answer, position)
            while piece := self._read(answer):
                wanted = piece[skip:]
                skip -= len(piece) - len(wanted)
                position += len(wanted)
                yield wanted
        if self.total is not None and position < self.total:
            raise _Broken(self._silent(f"it ended after {position} of {self.total} bytes"))

    def _read(self, answer: BaseHTTPResponse) -> bytes:
        """What has come, as soon as there is something: a slow server is to be seen moving."""
        with self._transport(SILENCE):
            return answer.read1(PIECE, decode_content=False)

    # --------------------------------------------------------------------------------------------- the answer

    def _begin(self, answer: BaseHTTPResponse, position: int) -> int:
        """Take the head of the answer; how many bytes of it are there already.

        Raises: _Broken; errors.Problem.
        """
        headers, status = answer.headers, answer.status
        if status not in (200, 206):
            raise self._refused(status)
        validator = _validator(headers)
        if position and not self._known and validator != self._validator:
            raise Interrupted("it was changed while it was fetched; ask again")
        self._validator = validator
        if status == 206:
            self.total = self._ranged(headers, position)
            return 0
        self.total = _length(headers)
        return position

    def _ranged(self, headers: Mapping[str, str], position: int) -> int | None:
        """The size of the whole of which a part comes, that from `position` on."""
        found = _RANGE.fullmatch(headers.get("content-range", ""))
        if found is None or int(found[1]) != position:
            raise Invalid("it answers with another part than the one asked for; give another address")
        return None if found[2] == "*" else int(found[2])

    def _refused(self, status: int) -> Problem | _Broken:
        says = f"it answers {status}"
        if status in _TRY_AGAIN:
            return _Broken(TimedOut(f"{says}: it cannot serve it now; ask again later"))
        if status in (401, 403):
            return Invalid(f"{says}: it does not serve it to us; the signature or password is wrong, or has expired")
        if status in (404, 410):
            return Invalid(f"{says}: there is no such file; look at the path")
        return Invalid(f"{says} instead of the file")

    def _silent(self, what: str) -> TimedOut:
        return TimedOut(f"it is not served: {what}")

    # -------------------------------------------------------------------------------------------- the request

    @contextmanager
    def _answer(self, position: int) -> Iterator[BaseHTTPResponse]:
        """The head of the answer to the last of the addresses that one leads to."""
        address, headers = self._address, self._headers(position)
        end = time.monotonic() + CONNECT + SILENCE
        for _ in range(REDIRECTS + 1):
            with _manager(address) as manager, closing(self._ask(manager, address, headers, end)) as answer:
                if answer.status not in _REDIRECT:
                    yield answer
                    return
                following = self._following(address, answer.headers.get("location", ""))
            if where(following) != where(address):
                headers.pop("authorization", None)
            address = following
        raise Invalid(f"it leads from one address to the next, more than {REDIRECTS} times; give the last")

    def _ask(self, manager: urllib3.PoolManager, address: str, headers: dict[str, str], end: float) -> BaseHTTPResponse:
        with self._transport(end - time.monotonic()):
            return manager.request(
                "GET",
                _bare(address),
                headers=headers,
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
            )

    def _headers(self, position: int) -> dict[str, str]:
        """Of the request. The content is wanted as it is stored: its digest is of that."""
        headers = {"accept-encoding": "identity", "user-agent": f"imageapi/{__version__}", **_login(self._address)}
        if position:
            headers["range"] = f"bytes={position}-"
            if self._validator and not self._known:
                headers["if-range"] = self._validator
        return headers

    def _following(self, address: str, location: str) -> str:
        """Where a redirect leads. Raises: errors.Invalid, when it is not to be followed."""
        schemes = ("https",) if address.startswith("https:") else ("http", "https")
        following, parts = "", urlsplit("")
        with suppress(ValueError):
            following = urljoin(address, location)
            parts = urlsplit(following)
        if not location or parts.scheme not in schemes or not parts.hostname:
            raise Invalid(f"it leads to an address that is not {' or '.join(schemes)}; it is not followed")
        return following

    @contextmanager
    def _transport(self, seconds: float) -> Iterator[None]:
        """What goes wrong on the way, in our words. What is read within must be there in so many seconds."""
        try:
            with paced.within(seconds):
                yield
        except (exceptions.HTTPError, OSError, ValueError) as error:
            raise self._meaning(error) from None

    def _meaning(self, error: Exception) -> Problem | _Broken:
        if isinstance(error, exceptions.SSLError) and (reason := _certificate_problem(error)):
            return Invalid(
                f"its certificate is not accepted: {reason}; have the host trust who signed it "
                "(update-ca-certificates, or SSL_CERT_FILE in the server's environment), or give the name it is for"
            )
        if isinstance(error, exceptions.LocationValueError):
            return Invalid("it is no address that can be asked")
        for kind, words in _MEANINGS.items():
            if isinstance(error, kind):
                return _Broken(self._silent(words))
        return _Broken(self._silent("the connection failed"))


_MEANINGS: dict[type[Exception], str] = {
    exceptions.NameResolutionError: "its server's name is not known (see the DNS of this host)",
    exceptions.ProxyError: "the proxy that the server's environment names cannot be used",
    exceptions.NewConnectionError: "the server accepts no connection",
    exceptions.ConnectTimeoutError: f"no connection within {CONNECT:g}s",
    exceptions.ReadTimeoutError: f"the server said nothing for {SILENCE:g}s",
    exceptions.IncompleteRead: "the connection broke",
    exceptions.ProtocolError: "the connection broke",
    exceptions.SSLError: "the server does not speak TLS as it should",
}
"""What the errors of urllib3 mean, the more particular ones first."""


def where(address: str) -> str:
    """Whom an address asks, and nothing that is secret: `https://host:8443`."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _bare(address: str) -> str:
    """The address without its user, which goes into a header."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _login(address: str) -> dict[str, str]:
    """The header that says who asks (RFC 7617)."""
    user, _, password = urlsplit(address).netloc.rpartition("@")[0].partition(":")
    return urllib3.make_headers(basic_auth=f"{unquote(user)}:{unquote(password)}") if user else {}


def _manager(address: str) -> urllib3.PoolManager:
    """The way to an address: through the proxy that the server's environment names for it, if it names one."""
    parts = urlsplit(address)
    timeout = urllib3.Timeout(connect=CONNECT, read=SILENCE)
    proxy = getproxies().get(parts.scheme)
    if proxy is None or proxy_bypass(parts.hostname or ""):
        return paced.pace(urllib3.PoolManager(timeout=timeout))
    login = urlsplit(proxy).netloc.rpartition("@")[0]
    headers = urllib3.make_headers(proxy_basic_auth=unquote(login)) if login else None
    return paced.pace(urllib3.ProxyManager(_bare(proxy), proxy_headers=headers, timeout=timeout))


def _validator(headers: Mapping[str, str]) -> str | None:
    """A strong one: a weak entity tag is the same for contents that differ."""
    tag = headers.get("etag")
    return tag if tag and not tag.startswith("W/") else None


def _length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _certificate_problem(error: exceptions.SSLError) -> str:
    """Why a certificate was refused, or "" when that is not what happened."""
    for reason in error.args:
        if isinstance(reason, SSLCertVerificationError):
            return reason.verify_message
    return ""
