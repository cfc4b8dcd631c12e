"""One absolute deadline for each request, made at its arrival, and the phases inside it.

Pure: monotonic seconds. A caller may shorten the deadline and never extend it (DEAD group,
R046-R049, C13, C15; contract, Deadlines). The phase that expires first is named.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


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


class Due(NamedTuple):
    """When a phase is over, its name and its limit (as configured, seconds)."""

    at: float
    phase: Phase
    limit_s: float


@dataclass(slots=True)
class Deadline:
    """Where one request stands. The gateway sets the times as they come; `due` says what ends it.

    `own_s` is the caller's own limit, seconds from the arrival; it counts where it is the shorter.
    The connection to the engine has a limit of its own (Phase.CONNECT), kept by who makes it.
    """

    limits: Limits
    arrived: float
    is_stream: bool = False
    own_s: float | None = None
    queued_at: float = 0.0  # when it asked for a slot again
    slot_at: float | None = None
    first_byte_at: float | None = None
    last_byte_at: float = 0.0  # set with the first one

    @property
    def answer_by(self) -> float:
        """When the answer must have begun: hive keeps `cleanup_s` back for itself, callers do not."""
        by = self.arrived + self.limits.request_s - self.limits.cleanup_s
        return by if self.own_s is None else min(by, self.arrived + self.own_s)

    @property
    def request(self) -> Due:
        """The limit of the whole way to the answer's first byte."""
        limit_s = self.limits.request_s
        if self.own_s is not None:
            limit_s = max(0.0, min(limit_s, self.own_s))
        return Due(self.arrived + limit_s, Phase.REQUEST, limit_s)

    @property
    def due(self) -> Due:
        """The limit that ends the request next."""
        limits = self.limits
        if self.slot_at is None:
            queued_at = max(self.arrived, self.queued_at)
            first = Due(queued_at + limits.queue_s, Phase.QUEUE, limits.queue_s)
            # A slot that leaves no time for an answer is of no use.
            request = self.request
            useful_by = self.arrived + limits.request_s - limits.cleanup_s
            other = Due(min(request.at, useful_by), Phase.REQUEST, request.limit_s)
        elif self.first_byte_at is None:
            name = Phase.FIRST_TOKEN if self.is_stream else Phase.INFERENCE
            by = self.arrived + limits.request_s - limits.cleanup_s
            first = Due(min(self.slot_at + limits.inference_s, by), name, limits.inference_s)
            if self.own_s is None:
                return first
            other = self.request
        else:
            first = Due(self.last_byte_at + limits.stall_s, Phase.STALL, limits.stall_s)
            total_s = limits.stream_total_s
            if not self.is_stream or not total_s:
                return first
            other = Due(self.slot_at + total_s, Phase.TOTAL, total_s)
        return other if other.at < first.at else first
