"""What the tests of the kind `uri` have: a web server that does as it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imageapi.drivers.uri import web as transport
from lab.web import Web, make_certificate, serving


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server, which is asked again at once."""
    monkeypatch.setattr(transport, "PAUSE", 0.0)
    with serving() as web:
        yield web


@pytest.fixture
def impatient(web: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """The same, for one that gives it up as soon as it breaks off."""
    monkeypatch.setattr(transport, "PERSISTENCE", 0.0)
    return web


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return make_certificate(tmp_path / "localhost.pem")


@pytest.fixture
def secure(certificate: Path) -> Iterator[Web]:
    """A server that speaks TLS, with a certificate that nobody trusts."""
    with serving(certificate) as web:
        yield web
