"""The OpenAPI document describes what the service does, no more and no less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from imageapi import spec
from imageapi.api.openapi import TEMPLATE
from pure.memory_engine import MemoryEngine
from pure.test_routes import Client

pytestmark = pytest.mark.pure

PARAMETERS = ("id", "name", "kind", "state", "force", "colour")
METHODS = {"get", "post", "put", "patch", "delete"}


@pytest.fixture(scope="module")
def document() -> Any:
    return Client(MemoryEngine()).get("/openapi.json")


@pytest.fixture
def client() -> Client:
    return Client(MemoryEngine())


def places(document: Any) -> Iterator[tuple[str, str, Any]]:
    """Each path below the base, with values in it that are nobody's; and each of its methods."""
    for path, methods in document["paths"].items():
        filled = path.removeprefix("/imageapi/v1").format(id=7, name="x", state="exited")
        for method in METHODS:
            yield method.upper(), filled, methods.get(method)


def test_every_path_takes_the_methods_it_is_said_to_take_and_no_other(document: Any, client: Client) -> None:
    for method, path, operation in places(document):
        code = client.ask(method, path).status_code
        assert (code == 405) == (operation is None), f"{method} {path}: {code}"


def test_every_line_of_the_contracts_tables_is_there(document: Any) -> None:
    kinds = [f"/attach/{kind}" for kind in spec.kinds(spec.Attachment)]
    kinds += [f"/mount/{kind}" for kind in (*spec.kinds(spec.Mount), *spec.kinds(spec.Attachment))]
    one = "/container/byname/{name}"
    assert {path.removeprefix("/imageapi/v1") for path in document["paths"]} == {
        "/attach", "/mount", "/container", "/attach/{id}", "/mount/{id}", "/container/{id}", "/container/{id}/{state}",
        "/check", "/progress", one, f"{one}/{{state}}", *kinds, *(f"{kind}/{{id}}" for kind in kinds),
    }  # fmt: skip


def test_the_parameters_of_a_query_are_those_that_are_known(document: Any, client: Client) -> None:
    for method, path, operation in places(document):
        if operation is None:
            continue
        said = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"}
        for name in PARAMETERS:
            answer = client.ask(method, path, params={name: "0"}).json()
            refused = isinstance(answer, dict) and "there is no query parameter" in answer["message"]
            assert refused == (name not in said), f"{method} {path}?{name}"


def test_every_reference_leads_somewhere_and_everything_is_referred_to(document: Any) -> None:
    schemas = document["components"]["schemas"]
    named = set(re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(document)))
    assert named <= set(schemas)
    assert set(schemas) - named == set()


def test_a_kinds_own_form_is_its_definition_and_what_the_server_knows(document: Any) -> None:
    schemas = document["components"]["schemas"]
    rbd, by_rbd, overlay = (schemas[name] for name in ("Attachment_rbd", "Mount_rbd", "Mount_overlay"))
    assert {"id", "monitors", "device_id", "device_file", "refs", "problem"} < set(rbd["properties"])
    assert (set(rbd["required"]), by_rbd["required"]) == ({"monitors", "pool", "image"}, ["fs_type"])
    assert {"id", "rbd_id", "rbd", "fs_type", "mount_options", "mountpoint"} < set(by_rbd["properties"])
    assert "attach" not in by_rbd["properties"]
    assert overlay["properties"]["upperdir"]["readOnly"]


def test_every_field_of_the_vocabulary_is_described(document: Any) -> None:
    schemas = document["components"]["schemas"]
    for struct in (spec.Container, spec.RbdOptions, spec.Loopback, spec.Iscsi, spec.Chap, spec.Uri):
        assert set(struct.__struct_fields__) <= set(schemas[struct.__name__]["properties"])
    assert TEMPLATE.format(name="Mount") == schemas["Container"]["properties"]["mount"]["$ref"]
    assert r"\Z" not in str(document)
