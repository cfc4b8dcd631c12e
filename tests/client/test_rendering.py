"""Errors as agents and workflows get them, each by its contract (C11)."""

import json
from typing import Any

import pytest

from hive.client.rendering import LOOK_FIRST, envelope, is_retryable, workflow
from hive.client.repeating import TRIED, Tried
from hive.errors import (
    DaemonUnreachable,
    EngineUnreachable,
    Family,
    HiveError,
    InvalidSessionId,
    RateLimited,
    StorageReadFailed,
    StorageWriteFailed,
    WindowNotFound,
    every_error,
)

FIELDS = {
    *("error", "error_code", "error_category", "severity", "message", "details"),
    *("recovery_strategy", "recovery_details", "user_action", "technical_notes"),
    *("workflow", "workflow_phase", "timestamp", "request_id"),
}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            InvalidSessionId(),
            '{"error": "CWM-1001", "message": "Invalid session ID format", "retryable": false}',
        ),
        (
            StorageWriteFailed(),
            '{"error": "CWM-4001", "message": "Failed to save context data", "retryable": true}',
        ),
        (
            RateLimited("Rate limit exceeded, try again in 30s", retry_after_s=29.5),
            '{"error": "CWM-7002", "message": "Rate limit exceeded, try again in 30s", "retryable": true}',
        ),
    ],
)
def test_the_sources_three_samples_are_byte_for_byte_the_same(error: HiveError, text: str) -> None:
    """R112"""
    assert envelope(error) == text


@pytest.mark.parametrize(
    "cls", [c for c in every_error() if c.code != "HTTP_ERROR"], ids=lambda cls: cls.code
)
def test_an_envelope_has_these_keys_in_this_order(cls: type[HiveError]) -> None:
    """R111, R109: nothing of what hive knows beside."""
    error = cls()
    error.details = {"secret": "sk-abc", "path": "/var/lib/hive"}
    told = json.loads(envelope(error))
    assert list(told) == ["error", "message", "retryable"]
    assert told["error"] == (cls.number or cls.code)
    assert told["retryable"] is is_retryable(error)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (StorageWriteFailed(), "CWM-4001"),
        (StorageReadFailed(), "CWM-4002"),
        (EngineUnreachable(), "CWM-5001"),
    ],
)
def test_storage_and_engine_have_the_sources_numbers(error: HiveError, number: str) -> None:
    """R127"""
    told = json.loads(envelope(error))
    assert (told["error"], told["retryable"]) == (number, True)


def test_what_must_not_leave_does_not_leave() -> None:
    """R073, R076, C21"""
    error = StorageWriteFailed("cannot write /var/lib/hive/kv/x of http://10.0.0.7:7411/")
    for text in (envelope(error), json.dumps(workflow(error, "window_freeze"))):
        assert "/var/lib" not in text
        assert "10.0.0.7" not in text


@pytest.mark.parametrize(
    "cls", [c for c in every_error() if c.code != "HTTP_ERROR"], ids=lambda cls: cls.code
)
def test_a_workflow_gets_every_field(cls: type[HiveError]) -> None:
    """R250, R206, R208"""
    told = workflow(cls(), "window_list")
    assert set(told) == FIELDS
    assert told["error"] is True
    assert told["error_category"] in ("tool", "data", "compliance", "system")
    assert told["recovery_strategy"] in ("retry", "fallback", "skip", "abort")
    assert set(told["recovery_details"]) == {
        *("retry_attempt", "max_retries", "next_attempt_delay_ms", "auto_retry")
    }
    assert told["user_action"]
    json.dumps(told)


@pytest.mark.parametrize("family", Family)
def test_each_family_has_a_category(family: Family) -> None:
    """C31"""
    cls = next(cls for cls in every_error() if cls.family is family)
    assert workflow(cls(), "x")["error_category"]


def test_how_often_it_was_tried_is_told() -> None:
    """C1: and what would have come next."""
    error: Any = StorageReadFailed()
    setattr(error, TRIED, Tried(calls=4, most=6, next_delay_s=4.0))
    assert workflow(error, "window_list")["recovery_details"] == {
        "retry_attempt": 3,
        "max_retries": 5,
        "next_attempt_delay_ms": 4000,
        "auto_retry": True,
    }
    assert workflow(WindowNotFound(), "x")["recovery_details"]["auto_retry"] is False
    limited = workflow(RateLimited(retry_after_s=2.5), "x")
    assert limited["recovery_details"]["next_attempt_delay_ms"] == 2500


def test_what_was_known_last_is_told_as_such() -> None:
    """R238"""
    cached = {"last_validated": "2 seconds ago", "age_hours": 0.001, "still_valid": False}
    details = workflow(DaemonUnreachable(), "health_check", cached)["details"]
    assert details == {
        "component": "daemon",
        "status": "unreachable",
        "cached_data": cached,
        "retry_options": {
            "auto_retry": False,
            "next_attempt": None,
            "manual_retry": "health_check",
        },
    }


def test_a_change_whose_answer_was_lost_is_not_to_be_tried_again() -> None:
    """Whoever does as told would have a second session, or lose track of the first change."""
    error = DaemonUnreachable()
    assert json.loads(envelope(error, changes=False))["retryable"] is True
    assert json.loads(envelope(error, changes=True))["retryable"] is False
    told = workflow(error, "window_thaw", changes=True)
    assert (told["recovery_strategy"], told["user_action"]) == ("abort", LOOK_FIRST)
    error.details = {"http_status": 502}  # the daemon itself has said so
    assert json.loads(envelope(error, changes=True))["retryable"] is True


def test_what_was_never_asked_is_told_as_such() -> None:
    assert workflow(InvalidSessionId(), "x")["details"]["status"] == "not asked"
    assert workflow(DaemonUnreachable(), "x")["details"]["status"] == "unreachable"
