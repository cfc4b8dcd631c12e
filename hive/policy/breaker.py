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
    _era: int = 0  # what began in an earlier one says nothing of this one

    @property
    def is_closed(self) -> bool:
        return self.state is BreakerState.CLOSED

    def allows(self, now: float) -> bool:
        """Whether a call may go to the target now. Asking changes nothing."""
        if self.state is BreakerState.CLOSED:
            return True
        return self.retry_in_s(now) <= 0 and not self.is_probing

    def retry_in_s(self, now: float) -> float:
        """Seconds until a probe may go through; 0 also when one may, or is under way."""
        if self.state is BreakerState.CLOSED:
            return 0.0
        return max(0.0, self.opened_at + self.cooldown_s - now)

    def began(self, now: float) -> int:
        """A call that `allows` let through goes; what it is known by when it ends."""
        if self.state is not BreakerState.CLOSED:
            assert self.allows(now)
            self.state, self.is_probing = BreakerState.HALF_OPEN, True
            self._era += 1
        return self._era

    def succeeded(self, era: int) -> None:
        """A call ended well: the count begins anew, and a probe closes the breaker."""
        if era == self._era:
            if self.state is BreakerState.CLOSED:
                self.count = 0
            else:
                self.reset()

    def failed(self, era: int, now: float) -> None:
        """A call met a fault: it counts, and opens the breaker if it is one too many or a probe."""
        if era != self._era:
            return
        self.count += 1
        if self.count >= self.failures:  # of a probe, too: nothing has brought it down
            self.state, self.opened_at, self.is_probing = BreakerState.OPEN, now, False
            self._era += 1

    def left(self, era: int) -> bool:
        """A call ended without saying anything of the target; True: another probe may go."""
        if era != self._era or not self.is_probing:
            return False
        self.is_probing = False
        return True

    def reset(self) -> None:
        """The target is well, or another one now: a new process."""
        self.state, self.count, self.is_probing = BreakerState.CLOSED, 0, False
        self._era += 1
