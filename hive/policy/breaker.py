"""The circuit breaker: who keeps failing is not asked for a while (R006-R012, C5).

Pure: every call takes the monotonic time. A cause is a fault or it is neutral: a 4xx is the
caller's, a 429 or 503 of the engine is back-pressure; neither says that the worker is broken.
"""

from dataclasses import dataclass
from enum import StrEnum


class BreakerState(StrEnum):
    """CLOSED lets everything through, OPEN nothing, HALF_OPEN exactly one probe."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class Breaker:
    """One target's breaker. `failures` consecutive faults open it, for `cooldown_s` seconds."""

    failures: int
    cooldown_s: float
    state: BreakerState = BreakerState.CLOSED
    count: int = 0  # consecutive faults
    opened_at: float = 0.0
    is_probing: bool = False

    def allows(self, now: float) -> bool:
        """Whether a call may go to the target now. Asking changes nothing."""
        if self.state is BreakerState.CLOSED:
            return True
        return self.retry_in_s(now) <= 0 and not self.is_probing

    def retry_in_s(self, now: float) -> float:
        """Seconds until a probe may go through; 0 when one may, or nothing is in its way."""
        if self.state is BreakerState.CLOSED:
            return 0.0
        return max(0.0, self.opened_at + self.cooldown_s - now)

    def began(self, now: float) -> bool:
        """A call that `allows` let through goes; True if it is the one probe."""
        if self.state is BreakerState.CLOSED:
            return False
        assert self.allows(now)
        self.state, self.is_probing = BreakerState.HALF_OPEN, True
        return True

    def succeeded(self, *, probe: bool) -> bool:
        """A call ended well; True if the state changed. Late news of calls made before it opened
        changes nothing: only the probe closes it."""
        if self.state is BreakerState.CLOSED:
            self.count = 0
            return False
        if not probe:
            return False
        self.reset()
        return True

    def failed(self, now: float, *, probe: bool) -> bool:
        """A call met a fault; True if the state changed."""
        self.count += 1
        is_due = self.state is BreakerState.CLOSED and self.count >= self.failures
        if not is_due and not probe:
            return False
        self.state, self.opened_at, self.is_probing = BreakerState.OPEN, now, False
        return True

    def left(self, *, probe: bool) -> None:
        """A call ended without saying anything of the target; another probe may go."""
        if probe:
            self.is_probing = False

    def reset(self) -> None:
        """The target is another one now: a new process."""
        self.state, self.count, self.is_probing = BreakerState.CLOSED, 0, False
