"""The OpenAPI document: every own route is in it, and it is made of what stands at the handlers.

What a daemon answers is compared with it in steps/test_openapi.py.
"""

import json
import re
from collections import Counter
from typing import Any, TypedDict

import msgspec
import pytest
import schemathesis
from aiohttp import web

from docs import generate
from hive.errors import ConcurrencyLimit, NotFound, WindowNotFound
from hive.gateway import openapi
from hive.gateway.openapi import described, document, served, undescribed


@pytest.fixture(scope="module")
def app() -> web.Application:
    return generate.application()


@pytest.fixture(scope="module")
def whole(app: web.Application) -> Any:
    return document(app)


class Thing(TypedDict):
    size: int


class Wanted(TypedDict, total=False):
    most: int


class Body(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    is_new: bool = False


class Easy(msgspec.Struct):
    why: str = ""


@described({201: Thing}, body=Body, query=Wanted, errors=[ConcurrencyLimit, WindowNotFound])
async def make(_request: web.Request) -> web.Response:
    """Make one: 201, the thing (R001, C11).

    More that nobody is told.
    """
    return web.Response()


@described({204: None}, body=Easy)
async def end(_request: web.Request) -> web.Response:
    """End it."""
    return web.Response()


async def quiet(_request: web.Request) -> web.Response:
    return web.Response()


@pytest.fixture
def small() -> web.Application:
    app = web.Application()
    app.add_routes(
        [
            web.post("/hive/v1/leaks/{name}/{action:start|stop}", make),
            web.delete("/livez", end),
            web.get("/hive/v1/quiet", quiet),
            web.post("/v1/embeddings", quiet),
        ]
    )
    return app


@pytest.fixture(autouse=True, scope="module")
def only_of_this_file() -> Any:
    """What is described here is no part of hive."""
    mine = {one: openapi._descriptions.pop(one) for one in (make, end)}
    yield mine
    for one in mine:
        openapi._descriptions.pop(one, None)


@pytest.fixture
def mine(only_of_this_file: Any) -> Any:
    openapi._descriptions.update(only_of_this_file)
    yield
    for one in only_of_this_file:
        openapi._descriptions.pop(one, None)


# ── all of it ───────────────────────────────────────────────────────────────────────────────────


def test_every_own_route_is_described_and_every_description_has_a_route(
    app: web.Application,
) -> None:
    """Write @described beside the handler, and @described goes with its route."""
    assert undescribed(app) == []


def test_every_own_route_is_in_the_document(app: web.Application, whole: Any) -> None:
    routes = {(one.method.lower(), one.path) for one in served(app) if one.is_own}
    told = {(method, path) for path, methods in whole["paths"].items() for method in methods}

    assert told == routes
    assert len(told) > 30


def test_the_document_is_openapi(whole: Any) -> None:
    schemathesis.openapi.from_dict(whole).validate()


def test_every_reference_leads_somewhere_and_nothing_is_told_for_nobody(whole: Any) -> None:
    used = set(re.findall(r'"#/components/(\w+/\w+)"', json.dumps(whole)))
    there = {
        f"{kind}/{name}"
        for kind, named in whole["components"].items()
        if kind != "securitySchemes"
        for name in named
    }

    assert used == there


def test_every_operation_has_a_name_of_its_own_and_says_what_it_does(whole: Any) -> None:
    operations = [one for methods in whole["paths"].values() for one in methods.values()]
    twice = [name for name, n in Counter(o["operationId"] for o in operations).items() if n > 1]

    assert twice == []
    assert all(one["summary"] for one in operations)


# ── one ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("mine")
def test_a_route_that_nobody_described_is_named(small: web.Application) -> None:
    assert undescribed(small)[0] == "GET /hive/v1/quiet"


@pytest.mark.usefixtures("mine")
def test_a_description_without_a_route_is_named() -> None:
    assert {"make", "end"} <= set(undescribed(web.Application()))


@pytest.mark.usefixtures("mine")
def test_an_operation_is_what_stands_at_its_handler(small: web.Application) -> None:
    told = document(small)
    operation = told["paths"]["/hive/v1/leaks/{name}/{action}"]["post"]

    assert operation["summary"] == "Make one: 201, the thing."
    assert operation["security"] == [{"bearer": ["admin"]}, {"key": ["admin"]}]
    parameters = {one["name"]: one for one in operation["parameters"] if "name" in one}
    assert parameters["most"] == {"name": "most", "in": "query", "schema": {"type": "integer"}}
    assert parameters["action"]["schema"]["enum"] == ["start", "stop"]
    assert operation["requestBody"]["required"]
    good = operation["responses"]["201"]["content"]["application/json"]["schema"]
    assert told["components"]["schemas"][good["$ref"].rpartition("/")[2]]["title"] == "Thing"
    assert "Wanted" not in told["components"]["schemas"]


@pytest.mark.usefixtures("mine")
def test_refusals_are_by_status_with_the_codes_that_there_are(small: web.Application) -> None:
    responses = document(small)["paths"]["/hive/v1/leaks/{name}/{action}"]["post"]["responses"]
    codes = {
        status: one["content"]["application/json"]["schema"]["allOf"][1]["properties"]["error"][
            "properties"
        ]["code"]["enum"]
        for status, one in responses.items()
        if status != "201"
    }

    assert codes == {
        "400": ["SCHEMA_INVALID", "VALIDATION_ERROR"],
        "401": ["UNAUTHORIZED"],
        "403": ["FORBIDDEN"],
        "404": [NotFound.code, WindowNotFound.code],
        "409": ["CONFLICT"],
        "500": ["INTERNAL_ERROR"],
        "503": [ConcurrencyLimit.code],
        "504": ["REQUEST_TIMEOUT"],
    }
    assert "Retry-After" in responses["503"]["headers"]
    assert "Retry-After" not in responses["404"]["headers"]
    assert "WWW-Authenticate" in responses["401"]["headers"]


@pytest.mark.usefixtures("mine")
def test_what_is_public_needs_no_key_and_an_empty_body_may_be_left_out(
    small: web.Application,
) -> None:
    operation = document(small)["paths"]["/livez"]["delete"]

    assert operation["security"] == []
    assert not {"401", "403"} & operation["responses"].keys()
    assert "content" not in operation["responses"]["204"]
    assert not operation["requestBody"]["required"]


@pytest.mark.usefixtures("mine")
def test_inference_is_not_told(small: web.Application) -> None:
    assert "/v1/embeddings" not in document(small)["paths"]
