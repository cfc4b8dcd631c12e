"""How often and how long apart what failed is tried again: one table for all of hive (C1-C4).

`calls` counts the first one, too. Jitter belongs to the row. Whoever retries does not begin what
does not fit into its caller's deadline (C3); an exhausted retry names the delay that would have
come next.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """One row. Seconds; `delays` are those before the second, third … call, the last one repeats."""

    calls: int
    delays: tuple[float, ...]
    jitter_s: float = 0.0
    jitter: float = 0.0  # a share of the delay

    def delay_s(self, calls: int, chance: float) -> float:
        """Seconds to wait after `calls` calls (1 or more) have failed; `chance` is from 0 to 1."""
        delay = self.delays[min(calls, len(self.delays)) - 1]
        return delay * (1 + self.jitter * chance) + self.jitter_s * chance

    def allows(self, calls: int) -> bool:
        """Whether there is another call after so many."""
        return calls < self.calls


def _doubling(first: float, count: int, cap: float = 3600.0) -> tuple[float, ...]:
    return tuple(min(cap, first * 2**n) for n in range(count))


ONCE = RetryPolicy(1, (0.0,))  # no row: nothing is tried again

RETRIES = {
    # To a worker's engine: transport errors before the first byte of an answer (R001-R003).
    "network": RetryPolicy(5, _doubling(1.0, 5), jitter_s=1.0),
    # Files of windows (R089, R090, R101): a block that a freeze needs, and everything else.
    "block_write": RetryPolicy(8, _doubling(1.0, 7, cap=10.0)),
    "storage": RetryPolicy(3, _doubling(1.0, 2, cap=10.0)),
    # The catalogue's database, where somebody else holds a lock (R161); up to a quarter more (C4).
    "db_lock": RetryPolicy(4, (0.1, 0.1, 0.1), jitter_s=0.025),
    # The command line to the daemon, which may be starting just now (EC1, EH-002a).
    "connect": RetryPolicy(3, (0.2, 0.4)),
    # Clients of the HTTP API (R173, R176): what only reads, everything else, what the engine or an
    # operation had no time for (R095, R096).
    "control.read": RetryPolicy(6, _doubling(0.5, 5)),
    "control.default": RetryPolicy(4, _doubling(1.0, 3, cap=30.0)),
    "engine_timeout": RetryPolicy(2, (1.0,)),
}


def until_taken(cap_s: float) -> RetryPolicy:
    """Of alerts to a webhook (R235): from 1 s, doubling up to `cap_s`, and up to a tenth more.

    Their age ends it, not a count: `calls` is more than there can be.
    """
    return RetryPolicy(1_000_000, _doubling(1.0, 18, cap=cap_s), jitter=0.1)
