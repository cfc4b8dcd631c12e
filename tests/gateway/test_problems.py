"""An error as clients get it: the body, the headers, and the event inside a stream."""

import json
from datetime import datetime
from typing import Any

import pytest

from hive import errors
from hive.errors import HiveError, every_error
from hive.gateway import problems

ALL = list(every_error())
COMMON = {"suggested_action", "retryable", "request_id", "timestamp", "http_status"}


def made(cls: type[HiveError], **facts: Any) -> HiveError:
    if cls is errors.HttpError:
        return cls("This path takes GET only.", status=405, **facts)
    return cls(**facts)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.code)
def test_every_error_has_the_contracts_body(cls: type[HiveError]) -> None:
    """Code, message and advice, in the shape that OpenAI's clients parse (R027-R029, R043)."""
    error = made(cls)
    body = problems.body(error, "req-1")
    told = body["error"]

    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(told) == {"message", "type", "code", "param", "details"}
    assert told["code"] == cls.code
    assert told["message"]
    assert set(told["details"]) >= COMMON
    assert told["details"]["http_status"] == error.status
    assert told["details"]["request_id"] == "req-1"
    assert datetime.fromisoformat(told["details"]["timestamp"]).utcoffset() is not None
    assert told["details"].get("number") == cls.number
    json.dumps(body)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.code)
def test_a_clients_library_is_told_whether_to_try_again(cls: type[HiveError]) -> None:
    """By the flag, not by the status (R045)."""
    error = made(cls)
    expected = "true" if error.retryable else "false"

    assert problems.headers(error)["x-should-retry"] == expected
    assert problems.body(error)["error"]["details"]["retryable"] is error.retryable


def test_the_header_and_the_body_name_the_same_delay() -> None:
    """Whole seconds in both, the exact hint beside them (R030, R058)."""
    error = errors.ServiceUnavailable(reason="loading", retry_after_s=2.345)
    headers = problems.headers(error)

    assert headers["Retry-After"] == "3"
    assert headers["retry-after-ms"] == "2345"
    assert headers["X-Hive-Reason"] == "loading"
    assert problems.body(error)["error"]["details"]["retry_after_seconds"] == 3
    assert problems.body(error)["error"]["details"]["reason"] == "loading"


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.code)
def test_without_a_hint_there_is_no_delay_anywhere(cls: type[HiveError]) -> None:
    """(R030)"""
    error = made(cls)

    assert "Retry-After" not in problems.headers(error)
    assert "retry-after-ms" not in problems.headers(error)
    assert "retry_after_seconds" not in problems.body(error)["error"]["details"]


def test_a_401_says_how_to_authenticate() -> None:
    """(R034)"""
    assert problems.headers(errors.Unauthorized())["WWW-Authenticate"] == "Bearer"
    assert problems.headers(errors.InvalidCredentials())["WWW-Authenticate"] == "Bearer"
    assert "WWW-Authenticate" not in problems.headers(errors.Forbidden())


def test_a_405_says_what_there_is() -> None:
    error = errors.HttpError("No.", status=405, allowed=["GET", "HEAD"])

    assert problems.headers(error)["Allow"] == "GET, HEAD"
    assert "Allow" not in problems.headers(errors.NotFound(allowed=["a"]))


def test_the_advice_of_a_401_arrives_whole() -> None:
    details = problems.body(errors.Unauthorized())["error"]["details"]

    assert details["suggested_action"] == errors.Unauthorized.action


def test_what_may_not_leave_does_not() -> None:
    """Unlisted details are left out, listed ones and texts redacted, at any depth (R076)."""
    error = errors.WorkerCrashed(
        "The engine could not read /srv/models/llama/config.json at http://10.1.2.3:8000/x.",
        action="Look at /var/log/engine with hive_abcdefghijklmnop0123.",
        cause="signal",
        traceback="Traceback …",
        resource_info={"holders": ["pid 1 of /opt/secret/bin"], "free_mb": 12},
    )
    text = json.dumps(problems.body(error, "req-1"))

    for private in ("/srv", "10.1.2.3", "/var/log", "hive_abc", "Traceback", "/opt/secret"):
        assert private not in text
    assert "could not read [path]" in text
    assert problems.body(error)["error"]["details"]["resource_info"]["free_mb"] == 12


def test_the_measured_facts_of_an_error_are_in_its_details() -> None:
    vram = errors.GpuVramExhausted(
        "GPU out of memory: 24GB required, 3.5GB available",
        required_vram_gb=24,
        available_vram_gb=3.5,
        device="cuda:0",
        model="llama",
        alternative_models=["tiny"],
    )
    told = problems.body(vram)["error"]

    assert told["message"] == "GPU out of memory: 24GB required, 3.5GB available"
    assert told["details"]["required_vram_gb"] == 24
    assert told["details"]["available_vram_gb"] == 3.5
    assert told["details"]["device"] == "cuda:0"
    assert told["details"]["alternative_models"] == ["tiny"]


def test_the_response_has_the_errors_status_and_headers() -> None:
    response = problems.response(errors.RateLimited(retry_after_s=1), "req-1")

    assert response.status == 429
    assert response.headers["Retry-After"] == "1"
    assert response.content_type == "application/json"
    assert json.loads(response.text or "")["error"]["code"] == "RATE_LIMITED"


def test_an_error_in_a_stream_is_one_event_of_one_line() -> None:
    error = errors.WorkerCrashed("It ended.\n\nWith a blank line.", cause="crashed")
    text = problems.event(error, "req-1").decode()
    name, data, *rest = text.split("\n")

    assert name == "event: error"
    assert rest == ["", ""]
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "WORKER_CRASHED"
    assert "[DONE]" not in text
