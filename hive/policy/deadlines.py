"""One absolute deadline for each request, made at its arrival, and the phases inside it.

Pure: monotonic seconds. A caller may shorten the deadline and never extend it (DEAD group,
R046-R049, C13, C15; contract, Deadlines). The phase that expires first is named.
"""

from dataclasses import dataclass, replace
from enum import StrEnum


class Phase(StrEnum):
    """What a request waits for; each has its own limit."""

    QUEUE = "queue"
    CONNECT = "connect"
    FIRST_TOKEN = "first_token"  # noqa: S105 (no password)
    INFERENCE = "inference"
    STALL = "stall"
    TOTAL = "total"
    REQUEST = "request"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one request, seconds; 0 is no limit for `stream_total_s`."""

    request_s: float
    queue_s: float
    connect_s: float
    inference_s: float
    stall_s: float
    stream_total_s: float
    cleanup_s: float

    def shortened(self, request_s: float | None) -> "Limits":
        """With the caller's own limit where that is shorter."""
        if request_s is None or request_s >= self.request_s:
            return self
        return replace(self, request_s=request_s)


@dataclass(frozen=True, slots=True)
class Due:
    """When a phase is over, its name and its limit (as configured, seconds)."""

    at: float
    phase: Phase
    limit_s: float


@dataclass(slots=True)
class Deadline:
    """Where one request stands. The gateway sets the times as they come; `due` says what ends it."""

    limits: Limits
    arrived: float
    is_stream: bool = False
    is_shortened: bool = False  # by the caller
    queued_at: float = 0.0  # later than `arrived` when it waits a second time
    slot_at: float | None = None
    first_byte_at: float | None = None
    last_byte_at: float = 0.0

    @property
    def request_at(self) -> float:
        return self.arrived + self.limits.request_s

    @property
    def due(self) -> Due:
        """The limit that ends the request next."""
        limits = self.limits
        request = Due(self.request_at, Phase.REQUEST, limits.request_s)
        if self.slot_at is None:
            queued_at = max(self.arrived, self.queued_at)
            queue = Due(queued_at + limits.queue_s, Phase.QUEUE, limits.queue_s)
            return min(queue, request, key=lambda due: due.at)
        if self.first_byte_at is None:
            name = Phase.FIRST_TOKEN if self.is_stream else Phase.INFERENCE
            inference = Due(self.slot_at + limits.inference_s, name, limits.inference_s)
            if self.is_shortened:
                # The caller's own limit is for the whole answer's begin: nothing is kept back.
                return min(inference, request, key=lambda due: due.at)
            cleanup = Due(self.request_at - limits.cleanup_s, name, limits.inference_s)
            return min(inference, cleanup, key=lambda due: due.at)
        stall = Due(self.last_byte_at + limits.stall_s, Phase.STALL, limits.stall_s)
        if not (self.is_stream and limits.stream_total_s):
            return stall
        total = Due(self.slot_at + limits.stream_total_s, Phase.TOTAL, limits.stream_total_s)
        return min(stall, total, key=lambda due: due.at)

    def left_s(self, now: float) -> float:
        """Seconds until the answer must have begun."""
        return self.request_at - now
