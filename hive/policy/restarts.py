"""When a worker that ended unasked is started again, and when hive gives up.

At most `starts` unasked starts in any `window_s`; the pause doubles from `backoff_s` to
`backoff_max_s` with each start in the window, plus up to a tenth at random (C5).
"""

from dataclasses import dataclass

JITTER = 0.1


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Seconds throughout; `starts` 0 means that nothing is restarted."""

    starts: int
    window_s: float
    backoff_s: float
    backoff_max_s: float

    def recent(self, history: tuple[float, ...], now: float) -> tuple[float, ...]:
        """The unasked starts that still count at `now`."""
        return tuple(at for at in history if now - at < self.window_s)

    def pause_s(self, history: tuple[float, ...], now: float, chance: float) -> float | None:
        """Seconds until the next start, or None to give up.

        `history` holds the times of earlier unasked starts, `chance` is from 0 to 1.
        """
        count = len(self.recent(history, now))
        if count >= self.starts:
            return None
        doubled = self.backoff_s * 2 ** min(count, 30)  # bounded: 2**1000 is no float
        pause: float = min(doubled, self.backoff_max_s) * (1 + JITTER * chance)
        return pause
