"""What one API key may use at once and in a minute (R037, C12). Pure: calls take the time."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

WINDOW_S = 60.0
BUSY_HINT_S = 1.0  # nobody knows when this caller's own requests end


class Refusal(NamedTuple):
    """Which limit is reached, by its setting's name, and the seconds to wait."""

    limit: str
    wait_s: float


@dataclass(slots=True)
class Quota:
    """One key's use; 0 means no limit. `take` and `give_back` frame each request."""

    max_concurrent: int
    per_minute: int
    in_flight: int = 0
    _taken: deque[float] = field(default_factory=deque)

    def take(self, now: float) -> Refusal | None:
        """None: the request counts from now on. Else why not; nothing was counted."""
        while self._taken and now >= self._taken[0] + WINDOW_S:
            self._taken.popleft()
        if self.per_minute and len(self._taken) >= self.per_minute:
            return Refusal("requests_per_minute", self._taken[0] + WINDOW_S - now)
        if self.max_concurrent and self.in_flight >= self.max_concurrent:
            return Refusal("max_concurrent", BUSY_HINT_S)
        self.in_flight += 1
        if self.per_minute:
            self._taken.append(now)
        return None

    def give_back(self) -> None:
        self.in_flight -= 1
