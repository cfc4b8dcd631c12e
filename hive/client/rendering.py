"""An error as agents and workflows get it: S0's envelope for MCP, S3's fields for workflows (C11)."""

import json
from collections.abc import Mapping
from typing import Any

from hive.client.http import is_told, was_not_sent
from hive.client.repeating import tried_of
from hive.errors import Family, HiveError
from hive.policy.control import Failure, classify
from hive.policy.redaction import for_clients

_CATEGORIES = {  # C31: S0's nine families as S3's four (R206)
    Family.VALIDATION: "data",
    Family.NOT_FOUND: "data",
    Family.STATE: "data",
    Family.SECURITY: "compliance",
    Family.CONNECTION: "tool",
    Family.TIMEOUT: "tool",
    Family.STORAGE: "system",
    Family.RESOURCE: "system",
    Family.INTERNAL: "system",
}
_STRATEGIES = {  # R208
    Failure.TRANSIENT: "retry",
    Failure.UNIMPLEMENTED: "fallback",
    Failure.PERMANENT: "abort",
    Failure.UNAUTHORIZED: "abort",
}


LOOK_FIRST = "Look first whether it happened (window_list, session_list); then decide."


def envelope(error: HiveError, *, changes: bool = False) -> str:
    """The text of an MCP error: `error`, `message` and `retryable`, in this order (R111, R112)."""
    return json.dumps(
        {
            "error": error.number or error.code,
            "message": for_clients(error.message),
            "retryable": is_retryable(error, changes=changes),
        },
        ensure_ascii=False,
    )


def is_retryable(error: HiveError, *, changes: bool = False) -> bool:
    """Whether the same call may work in a moment, and do no harm.

    Of a change whose answer was lost nobody knows whether it happened.
    """
    is_known = not changes or is_told(error) or was_not_sent(error)
    return classify(error) is Failure.TRANSIENT and is_known


def workflow(
    error: HiveError,
    tool: str,
    cached: Mapping[str, Any] | None = None,
    *,
    changes: bool = False,
) -> dict[str, Any]:
    """All that a workflow needs to go on or to stop (R250, R238).

    `cached` is what was known last, and when; it is told, and never taken for an answer.
    """
    tried, failure = tried_of(error), classify(error)
    delay_s = error.retry_after_s if error.retry_after_s is not None else tried.next_delay_s
    is_retried = tried.calls > 1
    is_unknown = failure is Failure.TRANSIENT and not is_retryable(error, changes=changes)
    is_asked = is_told(error) or error.family is not Family.VALIDATION
    details: dict[str, Any] = {
        "component": "engine" if error.details.get("worker") else "daemon",
        "status": "answered" if is_told(error) else "unreachable" if is_asked else "not asked",
        "number": error.number,
        "param": error.param,
    }
    if cached is not None:
        details["cached_data"] = dict(cached)
    if details["status"] == "unreachable":
        details["retry_options"] = {  # by its name: no URL leaves (C26)
            "auto_retry": is_retried,
            "next_attempt": None if delay_s is None else round(delay_s, 3),
            "manual_retry": tool,
        }
    return {
        "error": True,
        "error_code": error.code,
        "error_category": _CATEGORIES[error.family],
        "severity": str(error.severity),
        "message": for_clients(error.message),
        "details": {name: value for name, value in details.items() if value is not None},
        "recovery_strategy": "abort" if is_unknown else _STRATEGIES[failure],
        "recovery_details": {
            "retry_attempt": tried.calls - 1,
            "max_retries": tried.most - 1,
            "next_attempt_delay_ms": None if delay_s is None else round(1000 * delay_s),
            "auto_retry": is_retried,
        },
        "user_action": LOOK_FIRST if is_unknown else for_clients(error.suggested_action),
        "technical_notes": f"{tool}: {failure}, {tried.calls} of at most {tried.most} calls made",
        "workflow": "hive",
        "workflow_phase": tool,
        "timestamp": error.timestamp.isoformat(),
        "request_id": error.details.get("request_id"),
    }
