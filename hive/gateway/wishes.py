"""What a client asks of hive itself, by headers: how long, how urgent, for which session."""

import re
import time
from collections.abc import Mapping
from datetime import datetime

from hive.errors import InvalidSessionId, ValidationFailed
from hive.policy.admission import Priority

_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?\Z")


def own_limit_s(headers: Mapping[str, str], began: float) -> float | None:
    """Seconds from a request's arrival (`began`, monotonic) that its caller gives it, if any.

    The shorter one of X-Hive-Timeout (seconds) and X-Request-Deadline (ISO 8601, with its offset
    from UTC); below 0 for a deadline that has passed. Raises ValidationFailed.
    """
    limits = []
    if (told := headers.get("X-Hive-Timeout")) is not None:
        told = told.strip()  # float() strips less
        if not _SECONDS.match(told) or not float(told):
            raise ValidationFailed(
                "X-Hive-Timeout must be a number of seconds above 0, such as 2.5.",
                param="X-Hive-Timeout",
            )
        limits.append(float(told))
    if (told := headers.get("X-Request-Deadline")) is not None:
        try:
            deadline = datetime.fromisoformat(told.strip())
        except ValueError:
            deadline = None
        if deadline is None or deadline.tzinfo is None:
            raise ValidationFailed(
                "X-Request-Deadline must be a time in ISO 8601 with its offset from UTC, such as "
                "2030-01-31T12:00:00Z.",
                param="X-Request-Deadline",
            )
        limits.append(time.monotonic() - began + deadline.timestamp() - time.time())
    return min(limits, default=None)


def priority(headers: Mapping[str, str], own: Priority, highest: Priority) -> Priority:
    """X-Hive-Priority, lowered to what the key may ask for; `own` without one.

    Raises ValidationFailed.
    """
    told = headers.get("X-Hive-Priority")
    if told is None:
        return own
    try:
        return max(highest, Priority[told.strip().upper()])
    except KeyError:
        raise ValidationFailed(
            "X-Hive-Priority must be interactive, normal or batch.",
            param="X-Hive-Priority",
            allowed=[one.name.lower() for one in Priority],
        ) from None


def session(headers: Mapping[str, str]) -> str | None:
    """X-Hive-Session. Raises InvalidSessionId."""
    told = headers.get("X-Hive-Session")
    if told is not None and not _SESSION.match(told):
        raise InvalidSessionId(param="X-Hive-Session")
    return told
