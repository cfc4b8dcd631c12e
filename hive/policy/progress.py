"""Does an engine get on with its work? What counts as progress, and when a worker is hung.

Pure: monotonic seconds. vLLM publishes no output during a chunked prefill; then only its KV-cache
usage moves, once a step, so any change of a counter or of that gauge counts, and so does CPU time
of EngineCore or a Worker. A stopped process (state T) makes no progress, whatever others of its
tree burn while they wait for it (design, Progress; R050, R051).
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Signs:
    """What was seen of an engine at one moment; None is what it does not publish."""

    counters: tuple[float, ...] | None  # tokens, KV usage
    cpu_s: float  # of the processes that compute
    relayed: int  # bytes of answers that came from it
    is_stopped: bool = False  # a process that computes is in state T


class Progress:
    """When signs of an engine last changed."""

    def __init__(self, now: float) -> None:
        self.at = now
        self._last: Signs | None = None

    def see(self, signs: Signs, now: float) -> None:
        last = self._last
        if last is not None and signs.counters is None:
            signs = replace(signs, counters=last.counters)  # a look that failed tells nothing
        self._last = signs
        if last is None or signs.is_stopped:
            return
        counters = last.counters is not None and signs.counters != last.counters
        if counters or signs.cpu_s > last.cpu_s or signs.relayed != last.relayed:
            self.at = now

    def still_s(self, now: float) -> float:
        """Seconds since the last change."""
        return now - self.at


def abort_is_lost(asked_at: float, progress: Progress, now: float, cleanup_s: float) -> bool:
    """Whether an abort that is not confirmed will not be: its time is over, and nothing moves."""
    return now - asked_at >= cleanup_s and progress.still_s(now) >= cleanup_s


def work_is_lost(progress: Progress, busy_since: float, now: float, longest_s: float) -> bool:
    """Whether work is running and nothing moved for `longest_s` of it."""
    return now - max(progress.at, busy_since) >= longest_s
