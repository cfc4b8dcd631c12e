"""The control plane's resilience: calls that are repeated, answered otherwise, or told as they failed.

Data comes back marked: where it is from, how old it is, and whether it is less than was asked for
(C6, C33). Which operation may have what is the table in `policy.control`.
"""

import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hive.client.http import is_told, was_not_sent
from hive.client.repeating import Ask, Tried, repeated, tried_of
from hive.errors import HiveError, OperationTimeout
from hive.policy.control import Failure, Operation, classify, operation

log = logging.getLogger(__name__)

LIVE, CACHE = "live", "cache"  # C37
REMEMBERED = 256  # answers


@dataclass(frozen=True, slots=True)
class Result:
    """An answer and where it is from (R218): `live`, `cache`, or the operation that stood in."""

    data: Any
    source: str = LIVE
    age_s: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def is_degraded(self) -> bool:
        return self.source != LIVE or bool(self.warnings)


@dataclass(slots=True)
class Counts:
    """Of one operation, since the start (R183)."""

    total_calls: int = 0
    total_errors: int = 0
    transient_errors: int = 0
    permanent_errors: int = 0
    retries_exhausted: int = 0

    @property
    def error_rate(self) -> float:
        """Errors a call; 0 where there was none (R185)."""
        return self.total_errors / self.total_calls if self.total_calls else 0.0

    def told(self) -> dict[str, float]:
        return {**asdict(self), "error_rate": round(self.error_rate, 4)}


@dataclass(frozen=True, slots=True)
class _Remembered:
    data: Any
    at: float


class ControlPlane:
    """Of one program; what it remembers is kept apart by `key`: whose it is, and what was asked."""

    def __init__(
        self,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts: dict[str, Counts] = {}
        self._chance, self._clock = chance, clock
        self._remembered: OrderedDict[Hashable, _Remembered] = OrderedDict()

    async def run(
        self, name: str, ask: Ask, key: Hashable, others: Mapping[str, Ask] | None = None
    ) -> Result:
        """What `ask` gives, else what the table allows instead; `others` are its fallbacks' calls.

        Raises the first error where nothing stands in: HiveError with a `tried`.
        """
        row = operation(name)
        counts = self.counts.setdefault(name, Counts())
        counts.total_calls += 1
        try:
            data = await self._repeated(name, row, ask)
        except HiveError as error:
            self._count(counts, error)
            if not row.changes and classify(error) in (Failure.TRANSIENT, Failure.UNIMPLEMENTED):
                stand_in = await self._stand_in(name, row, key, others or {}, error)
                if stand_in is not None:
                    return stand_in
            raise
        if row.cached_s:
            self._remember((name, key), data)
        return Result(data)

    def last(self, name: str, key: Hashable) -> tuple[Any, float] | None:
        """What was answered last, and how many seconds ago; for whoever says so (R237)."""
        found = self._remembered.get((name, key))
        return None if found is None else (found.data, self._clock() - found.at)

    def remember(self, name: str, key: Hashable, data: Any) -> None:
        """For `last` alone: an answer that never stands in for another."""
        self._remember((name, key), data)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    async def _repeated(self, name: str, row: Operation, ask: Ask) -> Any:
        def tell(_error: HiveError, tried: Tried) -> None:  # R174
            most = tried.most - 1
            log.warning(
                "%s failed, %d/%d after %.3g s", name, tried.calls, most, tried.next_delay_s
            )

        try:
            return await repeated(row, ask, tell, self._chance)
        except HiveError as error:
            tried = tried_of(error)
            if tried.calls > 1:
                log.error(  # noqa: TRY400 (whoever is told of it has the rest)
                    "%s given up after %d calls; the next would have come after %.3g s",
                    name,
                    tried.calls,
                    tried.next_delay_s,
                )
            if isinstance(error, OperationTimeout) and not is_told(error):
                error.message = f"{name} exceeded {row.limit_s:g}s timeout"  # R210
            raise

    async def _stand_in(
        self,
        name: str,
        row: Operation,
        key: Hashable,
        others: Mapping[str, Ask],
        error: HiveError,
    ) -> Result | None:
        for other in row.fallbacks:
            if other not in others or was_not_sent(error):
                continue  # where nobody listens it would be asked in vain
            log.warning("%s failed (%s): %s is asked instead", name, error.code, other)
            try:
                data = await self._repeated(other, operation(other), others[other])
            except HiveError as exc:
                log.error("%s, asked instead of %s, failed too (%s)", other, name, exc.code)  # noqa: TRY400
                continue
            if data is not None:
                told = (
                    f"{name} failed ({error.code}): from {other}, without what that does not tell"
                )
                return Result(data, other, warnings=(told,))
        remembered = self._remembered.get((name, key))
        if remembered is None:
            return None
        age_s = self._clock() - remembered.at
        if age_s >= row.cached_s:
            log.warning("%s: the answer of %s ago is too old to be given", name, _ago(age_s))
            return None
        log.info("%s failed (%s): answered from memory, %s old", name, error.code, _ago(age_s))
        told = f"Using cached data from {_ago(age_s)} ago ({error.code})"
        return Result(remembered.data, CACHE, round(age_s, 3), (told,))

    def _remember(self, key: Hashable, data: Any) -> None:
        self._remembered[key] = _Remembered(data, self._clock())
        self._remembered.move_to_end(key)
        while len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)

    def _count(self, counts: Counts, error: HiveError) -> None:
        counts.total_errors += 1
        if classify(error) is Failure.TRANSIENT:
            counts.transient_errors += 1
        else:
            counts.permanent_errors += 1
        if tried_of(error).calls > 1:
            counts.retries_exhausted += 1

    def __repr__(self) -> str:
        return f"<ControlPlane {len(self._remembered)} remembered>"


def _ago(seconds: float) -> str:
    if seconds >= 3600:  # noqa: PLR2004
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"  # noqa: PLR2004
