"""The catalogue of errors against the contract, which is written out here a second time."""

import math
import re
from collections import Counter
from datetime import UTC
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive import errors
from hive.errors import Family, HiveError, Severity, by_code, every_error
from hive.policy.redaction import for_clients

ALL = list(every_error())

STATUS = {
    400: {
        "VALIDATION_ERROR",
        "INVALID_SESSION_ID",
        "INVALID_WINDOW_NAME",
        "INVALID_PARAMETER",
        "SCHEMA_INVALID",
        "HTTP_ERROR",  # only until an instance says otherwise
    },
    401: {"UNAUTHORIZED", "INVALID_CREDENTIALS"},
    403: {"FORBIDDEN", "ACCESS_DENIED", "SESSION_ISOLATION"},
    404: {"NOT_FOUND", "MODEL_NOT_FOUND", "SESSION_NOT_FOUND", "WINDOW_NOT_FOUND"},
    409: {
        "CONFLICT",
        "BLOCK_NOT_FOUND",
        "INVALID_STATE_TRANSITION",
        "MODEL_INCOMPATIBLE",
        "SESSION_ALREADY_FROZEN",
        "WINDOW_ALREADY_EXISTS",
        "SESSION_NOT_ACTIVE",
        "RELOAD_REFUSED",
    },
    413: {"PAYLOAD_TOO_LARGE"},
    422: {"CONFIG_INVALID"},  # of a reload; else it ends the start
    429: {"RATE_LIMITED"},
    499: {"REQUEST_CANCELLED"},
    500: {
        "INTERNAL_ERROR",
        "UNKNOWN_ERROR",
        "CUDA_DEVICE_FAILED",
        "CUDA_DEVICE_NOT_FOUND",
        "CUDA_DRIVER_MISSING",
        "GPU_VRAM_EXHAUSTED",
        "WORKER_SPAWN_FAILED",
        "RESOURCE_LEAK_DETECTED",
        "STORAGE_WRITE_FAILED",
        "STORAGE_READ_FAILED",
        "STORAGE_CORRUPTED",
        # Never sent over HTTP: they end the start, or the command line.
        "ADDRESS_IN_USE",
        "DAEMON_UNREACHABLE",
    },
    502: {
        "BAD_GATEWAY",
        "WORKER_CRASHED",
        "WORKER_HUNG",
        "ENGINE_UNREACHABLE",
        "KV_SERVER_UNREACHABLE",
        "STORE_UNREACHABLE",
        "STORE_CREDENTIALS_REFUSED",
    },
    503: {
        "SERVICE_UNAVAILABLE",
        "CIRCUIT_BREAKER_OPEN",
        "RETRY_BACKOFF",
        "CONCURRENCY_LIMIT",
        "GPU_QUARANTINED",
    },
    504: {
        "GATEWAY_TIMEOUT",
        "INFERENCE_TIMEOUT",
        "REQUEST_TIMEOUT",
        "LOADING_TIMEOUT",
        "ENGINE_TIMEOUT",
        "OPERATION_TIMEOUT",
        "STORAGE_TIMEOUT",
    },
    507: {
        "INSUFFICIENT_RAM",
        "INSUFFICIENT_DISK",
        "STORAGE_QUOTA_EXCEEDED",
        "MEMORY_EXHAUSTED",
    },
}

NUMBERS = {
    "CWM-1001": "INVALID_SESSION_ID",
    "CWM-1002": "INVALID_WINDOW_NAME",
    "CWM-1003": "INVALID_PARAMETER",
    "CWM-1004": "SCHEMA_INVALID",
    "CWM-2001": "SESSION_NOT_FOUND",
    "CWM-2002": "WINDOW_NOT_FOUND",
    "CWM-2003": "BLOCK_NOT_FOUND",
    "CWM-3001": "INVALID_STATE_TRANSITION",
    "CWM-3002": "SESSION_ALREADY_FROZEN",
    "CWM-3003": "WINDOW_ALREADY_EXISTS",
    "CWM-3004": "SESSION_NOT_ACTIVE",
    "CWM-4001": "STORAGE_WRITE_FAILED",
    "CWM-4002": "STORAGE_READ_FAILED",
    "CWM-4003": "STORAGE_QUOTA_EXCEEDED",
    "CWM-4004": "STORAGE_CORRUPTED",
    "CWM-5001": "ENGINE_UNREACHABLE",
    "CWM-5002": "KV_SERVER_UNREACHABLE",
    "CWM-5003": "STORE_UNREACHABLE",
    "CWM-6001": "ENGINE_TIMEOUT",
    "CWM-6002": "OPERATION_TIMEOUT",
    "CWM-6003": "STORAGE_TIMEOUT",
    "CWM-7001": "MEMORY_EXHAUSTED",
    "CWM-7002": "RATE_LIMITED",
    "CWM-7003": "CONCURRENCY_LIMIT",
    "CWM-8001": "ACCESS_DENIED",
    "CWM-8002": "INVALID_CREDENTIALS",
    "CWM-8003": "SESSION_ISOLATION",
    "CWM-9001": "INTERNAL_ERROR",
    "CWM-9999": "UNKNOWN_ERROR",
}

THOUSAND = {
    "1": Family.VALIDATION,
    "2": Family.NOT_FOUND,
    "3": Family.STATE,
    "4": Family.STORAGE,
    "5": Family.CONNECTION,
    "6": Family.TIMEOUT,
    "7": Family.RESOURCE,
    "8": Family.SECURITY,
    "9": Family.INTERNAL,
}

LEVEL = {
    Family.VALIDATION: "info",
    Family.NOT_FOUND: "info",
    Family.STATE: "info",
    Family.STORAGE: "warning",
    Family.CONNECTION: "warning",
    Family.TIMEOUT: "warning",
    Family.RESOURCE: "warning",
    Family.SECURITY: "warning",
    Family.INTERNAL: "error",
}
# GPU errors are errors (C29), and so is what an operator must look at, or what ends the start.
LOUDER = {
    "CUDA_DEVICE_FAILED",
    "CUDA_DEVICE_NOT_FOUND",
    "CUDA_DRIVER_MISSING",
    "GPU_VRAM_EXHAUSTED",
    "GPU_QUARANTINED",
    "WORKER_CRASHED",
    "WORKER_HUNG",
    "LOADING_TIMEOUT",
    "CONFIG_INVALID",
    "RELOAD_REFUSED",
    "ADDRESS_IN_USE",
}

RETRYABLE = {
    "RATE_LIMITED",
    "BAD_GATEWAY",
    "WORKER_CRASHED",
    "WORKER_HUNG",
    "ENGINE_UNREACHABLE",
    "KV_SERVER_UNREACHABLE",
    "STORE_UNREACHABLE",
    "SERVICE_UNAVAILABLE",
    "CIRCUIT_BREAKER_OPEN",
    "RETRY_BACKOFF",
    "GATEWAY_TIMEOUT",
    "INFERENCE_TIMEOUT",
    "REQUEST_TIMEOUT",
    "LOADING_TIMEOUT",
    "ENGINE_TIMEOUT",
    "OPERATION_TIMEOUT",
    "STORAGE_TIMEOUT",
    "STORAGE_WRITE_FAILED",
    "STORAGE_READ_FAILED",
    "CONCURRENCY_LIMIT",
}


def made(cls: type[HiveError], **facts: Any) -> HiveError:
    if cls is errors.HttpError:
        return cls("The method is not allowed.", status=405, **facts)
    return cls(**facts)


def one(code: str) -> type[HiveError]:
    found = by_code(code)
    assert found is not None
    return found


def test_every_code_has_the_status_of_the_contract() -> None:
    """The HTTP statuses of the daemon and of the window errors (R033-R036, R038, R042)."""
    found: dict[int, set[str]] = {}
    for cls in ALL:
        found.setdefault(cls.status, set()).add(cls.code)

    assert found == STATUS


def test_every_numbered_cause_exists_with_its_number() -> None:
    """The leaves of the taxonomy, 29 numbers, the default 9999 among them (R078)."""
    assert {cls.number: cls.code for cls in ALL if cls.number} == NUMBERS
    assert all(issubclass(cls, HiveError) for cls in ALL)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_lies_in_the_range_of_its_family(number: str) -> None:
    """CWM-1xxx to 9xxx are the nine families (R079)."""
    assert one(number).family is THOUSAND[number[4]]


def test_all_nine_families_have_an_error() -> None:
    """(R078)"""
    assert {cls.family for cls in ALL} == set(Family)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.code)
def test_the_log_level_is_the_familys_unless_it_must_be_louder(cls: type[HiveError]) -> None:
    """Validation, not found and state info; GPU and internal error; the rest warning (R113)."""
    assert cls.level == ("error" if cls.code in LOUDER else LEVEL[cls.family])


def test_the_retryable_errors_are_those_where_trying_again_can_help() -> None:
    """The flag decides, never the status: GPU errors are 5xx and final (R045)."""
    assert {cls.code for cls in ALL if cls.retryable} == RETRYABLE
    assert not {cls.code for cls in ALL if issubclass(cls, errors.DeviceError)} & RETRYABLE


def test_codes_are_unique_and_in_upper_snake_case() -> None:
    """(R027, R032, R065)"""
    codes = Counter(cls.code for cls in ALL)

    assert [code for code, count in codes.items() if count > 1] == []
    assert [code for code in codes if not re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", code)] == []


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.code)
def test_every_error_says_what_happened_and_what_to_do(cls: type[HiveError]) -> None:
    """(R028, R029, R076)"""
    error = made(cls)

    assert error.message
    assert error.suggested_action.endswith(".")
    assert len(error.suggested_action) > 15
    assert for_clients(cls.summary) == cls.summary
    advice = cls.action.replace("Bearer KEY", "a key")  # test_problems knows about this one
    assert for_clients(advice) == advice
    assert str(error) == error.message


def test_the_sources_own_words_are_kept() -> None:
    assert one("CWM-1001").summary == "Invalid session ID format"
    assert one("CWM-1002").summary == "Invalid window name format"
    assert one("CWM-2003").summary == "Some context data is unavailable"
    assert "freeze the session again" in one("CWM-2003").action
    assert one("CWM-3001").summary == "Cannot perform this operation in current state"
    assert "window_status" in one("CWM-3001").action
    assert "window_list" in one("CWM-2002").action
    assert one("CWM-3002").summary == "Session is already frozen"
    assert one("CWM-5001").summary == "Cannot connect to inference server"
    assert one("CWM-7001").summary == "Insufficient memory"
    assert one("CWM-8001").summary == "Access denied"
    assert one("UNAUTHORIZED").summary == "Authentication required"
    assert one("RATE_LIMITED").summary == "Too many requests"


def test_exit_codes_are_those_of_the_command_line() -> None:
    """(R061, R062, R064)"""
    found = {cls.code: cls.exit_code for cls in ALL if cls.exit_code != 1}
    timeouts = {cls.code: 124 for cls in ALL if cls.family is Family.TIMEOUT}

    assert found == timeouts | {
        "ADDRESS_IN_USE": 70,
        "INTERNAL_ERROR": 70,
        "DAEMON_UNREACHABLE": 255,
    }


def test_every_gpu_error_ends_with_exit_code_1() -> None:
    """Whatever else fails, a GPU error is never restarted by the service manager."""
    devices = [cls for cls in ALL if issubclass(cls, errors.DeviceError)]

    assert len(devices) >= 5
    assert {cls.exit_code for cls in devices} == {1}
    assert {cls.severity for cls in devices} == {Severity.CRITICAL}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_hint_is_a_whole_number_of_seconds_from_1_to_30(hint_s: float) -> None:
    """(R030, R058)"""
    seconds = errors.ServiceUnavailable(retry_after_s=hint_s).retry_after_seconds

    assert isinstance(seconds, int)
    assert 1 <= seconds <= 30
    if 1 <= hint_s <= 30:
        assert seconds == math.ceil(hint_s)


def test_without_a_hint_there_is_nothing_to_wait_for() -> None:
    """A worker that failed comes back by an operator only (R030)."""
    final = errors.ServiceUnavailable(reason="worker_failed")

    assert final.retry_after_seconds is None
    assert not final.retryable
    assert errors.ServiceUnavailable(reason="loading", retry_after_s=3).retryable


def test_only_allowed_details_leave_the_process() -> None:
    """An allow-list for each class: what nobody allowed is for the log (R076)."""
    error = errors.GpuVramExhausted(
        device="cuda:0",
        required_vram_gb=24.0,
        available_vram_gb=3.5,
        model="llama",
        reason=None,
        prompt="tell me a secret",
        path="/srv/models",
        xid=79,
    )

    assert error.public_details == {
        "device": "cuda:0",
        "required_vram_gb": 24.0,
        "available_vram_gb": 3.5,
        "model": "llama",
    }
    assert error.details["prompt"] == "tell me a secret"


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.code)
def test_no_class_allows_what_is_nobodys_business(cls: type[HiveError]) -> None:
    """(R076)"""
    private = {"prompt", "messages", "key", "path", "file", "url", "host", "cache_salt", "env"}
    error = made(cls, **dict.fromkeys(private | cls.shows, "x"))

    assert set(error.public_details) == cls.shows - {"reason"}


def test_the_specific_payloads_of_the_sources_may_be_shown() -> None:
    retry = {"attempt", "max_attempts", "next_retry_seconds", "backoff_strategy", "schedule"}
    breaker = {"failure_count", "failure_threshold", "cooldown_seconds", "state"}
    vram = {"required_vram_gb", "available_vram_gb", "device", "alternative_models"}
    timeout: dict[str, Any] = {
        "timeout_seconds": 25,
        "elapsed_seconds": 25.01,
        "phase": "inference",
    }

    assert retry <= errors.RetryBackoff.shows
    assert breaker <= errors.CircuitBreakerOpen.shows
    assert vram <= errors.GpuVramExhausted.shows
    assert {"leaked_processes", "leaked_temp_files"} <= errors.ResourceLeakDetected.shows
    assert {"current_requests", "max_concurrent"} <= errors.ServiceUnavailable.shows
    assert errors.InferenceTimeout(**timeout).public_details == timeout


def test_an_error_knows_when_it_was_made_in_utc() -> None:
    """(R108)"""
    assert errors.InternalError().timestamp.tzinfo is UTC


def test_an_instance_can_say_more_than_its_class() -> None:
    error = errors.ModelNotFound("No model 'x'.", action="Ask for 'y'.", param="model")

    assert (error.message, error.suggested_action, error.param) == (
        "No model 'x'.",
        "Ask for 'y'.",
        "model",
    )
    assert repr(error) == "<MODEL_NOT_FOUND \"No model 'x'.\">"


def test_any_other_status_is_an_http_error_of_that_status() -> None:
    """(R042)"""
    assert errors.HttpError("No.", status=405).status == 405
    assert errors.HttpError.status == 400


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.code)
def test_an_error_is_found_by_its_code_in_any_case(cls: type[HiveError]) -> None:
    assert by_code(f" {cls.code.lower()} ") is cls


@pytest.mark.parametrize(("number", "code"), NUMBERS.items())
def test_an_error_is_found_by_its_number_too(number: str, code: str) -> None:
    assert one(number.lower()).code == code


@pytest.mark.parametrize("unknown", ["", "CWM-1234", "NO_SUCH_CODE", "none"])
def test_what_no_error_has_finds_nothing(unknown: str) -> None:
    assert by_code(unknown) is None


def test_device_errors_as_a_group_have_no_code_of_their_own() -> None:
    assert errors.DeviceError not in ALL
    assert errors.TimeoutFailure not in ALL


def test_a_window_of_another_model_tells_what_differs() -> None:
    """The fields' names, and not their values."""
    error = errors.ModelIncompatible(fields=["dtype", "weights"], path="/srv/models")

    assert (error.status, error.code) == (409, "MODEL_INCOMPATIBLE")
    assert error.public_details == {"fields": ["dtype", "weights"]}
    assert not error.retryable
