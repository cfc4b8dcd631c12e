"""hive's own surface against its OpenAPI document: what is documented is what is answered, and all of it.

schemathesis makes requests of the document, good ones and bad ones, for a real daemon with windows; its
checks compare every answer with the document. In every test run a few of each; many under `--soak`.
OPENAPI_SEED repeats a choice.
"""

import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode
from schemathesis.config import GenerationConfig, SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hive.errors import InternalError
from steps.driver import ROOT, Answer, Hive, chat_body, new_hive
from steps.story import CHAT
from steps.waiting import must
from tests.doubles.nvml import Gpus
from tests.gateway.serving import bearer, key, secret_of
from tests.windows.daemon import IMPATIENT, WINDOWS, Owner, new_name

SEED = int(os.environ.get("OPENAPI_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
FEW, MANY = 4, 150  # examples of each kind for each operation
AGAIN = 8  # rounds more for an operation that no example has met well
KINDS = ((1, True), (1, False), (0, False))
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
# What is looked at by itself: the first ends the daemon, the other has no end.
APART = {("POST", "/hive/v1/drain"), ("GET", "/hive/v1/events")}
# No good answer is to be had without a fault (features/resilience/device_faults.feature).
ONLY_AFTER_A_FAULT = {"POST /hive/v1/devices/{id}/release"}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}
ENDED = "ended-lately"  # the id of a request
LIMIT_S = 20.0
# Members that a version may add to, and a code has more of (hive/gateway/shapes.py).
OPEN = {"ErrorDetails"}


@pytest.fixture(scope="module")
def hive() -> Iterator[Hive]:
    """With windows, a GPU, and a key that may do everything."""
    with new_hive() as it:
        gpus = Gpus(it.home / "gpu")
        gpus.add(0)
        it.env |= gpus.env
        it.starter = (sys.executable, "-c", IMPATIENT)
        it.sections |= {"windows": WINDOWS, "restarts": {"starts": 1000, "backoff_s": 0.02}}
        it.keys = [
            key("root", "inference", "admin"),
            key("ada", "inference"),
            key("eve", "metrics"),
        ]
        it.keys[0]["max_concurrent"] = 0
        it.key = secret_of("root")
        it.model("m", windows=True)
        it.model("n", "--vram-mib", "1024", device="cuda:0")
        it.start(is_shared=True)
        yield it


@pytest.fixture(scope="module")
def told(hive: Hive) -> Any:
    answer = hive.ask("GET", "/hive/v1/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    return answer.json


class Things:
    """What there is to ask about: a session, a window and a backup, made anew when they are gone."""

    def __init__(self, hive: Hive) -> None:
        self.root = Owner(hive, "root")
        self.window = self.backup = self.session = ""
        self.renew()
        headers = {"X-Request-Id": ENDED}
        assert hive.ask("POST", CHAT, chat_body(), headers).status == 200

    def renew(self) -> None:
        """Windows that were made meanwhile go: a page of them need not be long."""
        if self.root.ask("GET", f"/hive/v1/sessions/{self.session or 'x'}").status != 200:
            self.session = self.root.talk(40)
        if self.root.ask("GET", f"/hive/v1/windows/{self.window or 'x'}").status != 200:
            _, self.window = self.root.frozen(40, description="made before", tags=["a"])
        made = self.root.ask("POST", "/hive/v1/backups", {"window": self.window})
        assert made.status == 201, made.body
        self.backup = made.json["timestamp"]

    def put_into(self, case: "Case[Any]") -> None:
        """Real names in place of drawn ones."""
        real = {
            "session_id": self.session,
            "window": self.window,
            "timestamp": self.backup,
            "model": "m",
            "request_id": ENDED,
            "action": "restart",
            "owner": "root",
        }
        path = case.operation.path
        names = {**real, "name": self.window, "id": self._id(path)}
        for name in case.path_parameters or {}:
            case.path_parameters[name] = names[name]
        if isinstance(case.body, dict):
            told = {**real, "name": new_name()}
            for name in case.body.keys() & told.keys():
                case.body[name] = told[name]
            if path.endswith("/thaw") and case.body.get("session_id"):
                del case.body["session_id"]
        for name in (case.query or {}).keys() & real.keys():
            case.query[name] = real[name]

    def _id(self, path: str) -> str:
        return self.session if "sessions" in path else "n-0" if "workers" in path else "cuda:0"


def test_whatever_is_asked_the_answer_is_one_that_is_documented(
    hive: Hive, told: Any, pytestconfig: pytest.Config
) -> None:
    """No 500, no status, code, header, type or member of an answer that the document does not have."""
    print(f"OPENAPI_SEED={SEED}")
    most = MANY if pytestconfig.getoption("soak") else FEW
    things, failures = Things(hive), list[str]()
    asked: dict[str, Counter[int]] = defaultdict(Counter)
    operations = [one.ok() for one in schema_of(told, hive).get_all_operations()]
    # Those that stop engines come last: a model that is not there answers little else.
    operations.sort(key=lambda one: "{action}" in one.path)
    for operation in operations:
        if (operation.method.upper(), operation.path) in APART:
            continue
        for again, (mode, is_real) in enumerate([*KINDS, *KINDS[:1] * AGAIN]):
            if again >= len(KINDS) and _is_met(asked[operation.label]):
                break
            ask = Asking(hive, things, operation, is_real=is_real)
            kind = GenerationMode.POSITIVE if mode else GenerationMode.NEGATIVE
            try:
                ask.run(kind, most, again)
            except (Exception, FailureGroup) as exc:  # noqa: BLE001 (all operations are looked at)
                failures.append(f"{operation.label} ({kind.value}): {_told(exc)}")
            asked[operation.label] += ask.statuses
    for label, statuses in asked.items():
        print(label, dict(statuses))
    assert not failures, f"OPENAPI_SEED={SEED}\n" + "\n\n".join(failures)
    bad = [label for label, statuses in asked.items() if not _is_met(statuses)]
    bad = [label for label in bad if label not in ONLY_AFTER_A_FAULT]
    assert not bad, f"OPENAPI_SEED={SEED}: never answered well: {bad}"
    assert not [line for line in hive.log if line.get("code") == InternalError.code]
    assert hive.ask("GET", "/livez").status == 200


def _is_met(statuses: Counter[int]) -> bool:
    return any(200 <= status < 300 for status in statuses)


class Asking:
    """Examples of one operation."""

    def __init__(
        self,
        hive: Hive,
        things: Things,
        operation: "APIOperation[Any, Any, Any, Any]",
        *,
        is_real: bool,
    ) -> None:
        self.hive, self.things, self.operation, self.is_real = hive, things, operation, is_real
        self.statuses: Counter[int] = Counter()
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {hive.key}"

    def run(self, kind: GenerationMode, most: int, again: int) -> None:
        if kind is GenerationMode.NEGATIVE and not self.operation.body and not self.operation.query:
            return  # any text will do in a path or a header: nothing of it can be bad
        drawn = self.operation.as_strategy(kind)

        @seed(SEED + again)
        @settings(
            max_examples=most,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=drawn)
        def each(case: "Case[Any]") -> None:
            if self.is_real:
                self.things.put_into(case)
            self.send(case)

        try:
            each()
        finally:
            self.session.close()
        if self.is_real and self.operation.method.upper() != "GET":
            self.things.renew()

    def send(self, case: "Case[Any]") -> None:
        if case.query:
            case.query.pop("follow", None)
        answer = case.call(base_url=self.hive.url, session=self.session, timeout=LIMIT_S)
        self.statuses[answer.status_code] += 1
        assert answer.status_code != 500, answer.text
        case.validate_response(answer, checks=CHECKS)


def schema_of(told: Any, hive: Hive) -> Any:
    """The document, but that an answer may have nothing beyond it."""
    strict = json.loads(json.dumps(told))
    for name, schema in strict["components"]["schemas"].items():
        if "properties" in schema and name not in OPEN:
            schema["additionalProperties"] = False
    generation = GenerationConfig(database="none", with_security_parameters=False)
    config = SchemathesisConfig.from_dict({"base-url": hive.url})
    config.projects.default.generation = generation
    return schemathesis.openapi.from_dict(strict, config=config)


def _told(exc: BaseException) -> str:
    found = [exc]
    while isinstance(found[0], BaseExceptionGroup):
        found = [*found[0].exceptions, *found[1:]]
    return "\n".join(f"{type(one).__name__}: {str(one)[:1500]}" for one in found)


# ── what is looked at by itself ─────────────────────────────────────────────────────────────────


def test_the_document_is_that_of_the_docs(told: Any) -> None:
    """But for what this version is called, if that has changed since."""
    kept = json.loads((ROOT / "docs" / "openapi.json").read_text())
    assert told == {**kept, "info": told["info"]}


def test_who_may_ask_is_as_it_is_documented(hive: Hive, told: Any) -> None:
    """401 without a key, 403 with one that has another scope; what is public asks for none."""
    for path, method, operation in operations_of(told):
        needed = {
            scope for one in operation["security"] for scopes in one.values() for scope in scopes
        }
        stranger = plainly(hive, method, path, {"Authorization": ""})
        assert (stranger.status == 401) == bool(operation["security"]), (method, path, stranger)
        for who, scopes in (("ada", {"inference"}), ("eve", {"metrics"})):
            if needed - scopes:
                answer = plainly(hive, method, path, bearer(who))
                assert (answer.status, answer.code) == (403, "FORBIDDEN"), (method, path, answer)
        assert_documented(told, operation, stranger)


def test_any_other_method_is_refused_with_those_that_there_are(hive: Hive, told: Any) -> None:
    for path in told["paths"]:
        known = {method.upper() for at, method, _ in operations_of(told) if at == path}
        for method in METHODS - known - {"HEAD"}:
            answer = plainly(hive, method, path)
            assert (answer.status, answer.code) == (405, "HTTP_ERROR"), (method, path, answer)
            assert set(answer.headers["allow"].split(", ")) - {"HEAD"} == known


def test_a_stream_of_progress_ends_with_what_is_documented(hive: Hive, told: Any) -> None:
    things = Things(hive)
    path = "/hive/v1/windows/{name}/verify"
    operation = told["paths"][path]["post"]
    headers = {"Accept": "text/event-stream"}
    stream = hive.stream(path.replace("{name}", things.window), None, headers)
    assert_documented(told, operation, stream.answer)
    assert stream.headers["x-request-id"]
    jsonschema_rs.validate(
        {"$ref": "#/components/schemas/WindowReport", "components": told["components"]},
        json.loads(stream.events[-1]),
    )


@pytest.mark.parametrize("path", ["/hive/v1/events", "/hive/v1/workers/{id}/logs"])
def test_a_stream_without_an_end_begins_as_it_is_documented(
    hive: Hive, told: Any, path: str
) -> None:
    query = "?follow=1" if path.endswith("logs") else ""
    stream = hive.stream(path.replace("{id}", "m-0") + query, method="GET")
    must(lambda: stream.pieces, 5, "its beginning")
    assert stream.status == 200
    assert stream.headers["x-request-id"]
    kind = stream.headers["content-type"].partition(";")[0]
    assert kind in told["paths"][path]["get"]["responses"]["200"]["content"]
    assert stream.ended_at is None
    stream.leave()


def test_draining_is_answered_as_it_is_documented() -> None:
    with new_hive() as hive:
        hive.model("m")
        hive.start()
        answer = hive.ask("POST", "/hive/v1/drain")
        told = json.loads((ROOT / "docs" / "openapi.json").read_text())
        assert answer.status == 202
        assert_documented(told, told["paths"]["/hive/v1/drain"]["post"], answer)
        assert hive.wait_exit() == 0


def operations_of(told: Any) -> Iterator[tuple[str, str, Any]]:
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def plainly(hive: Hive, method: str, path: str, headers: dict[str, str] | None = None) -> Answer:
    """Ask as it is written, with a name that nothing has in place of each variable."""
    named = path.replace("{action}", "start")
    return hive.ask(method, re.sub(r"\{\w+\}", "nobody", named), None, headers or {})


def assert_documented(told: Any, operation: Any, answer: Answer) -> None:
    found = operation["responses"][str(answer.status)]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in found["content"], (kind, list(found["content"]))
    if kind == "application/json":
        schema = {**found["content"][kind]["schema"], "components": told["components"]}
        jsonschema_rs.validate(schema, answer.json)
