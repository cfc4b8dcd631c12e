"""GET /metrics: hive's own numbers and, with the label `worker`, those of its engines.

All engines are asked at once, each for READ_S at most; what they say is read in a thread, which
lets the event loop run meanwhile. Whoever scrapes while that is going on gets the same reading.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from prometheus_client import CollectorRegistry
from prometheus_client import exposition as text_format
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics

from hive.policy.lifecycle import State
from hive.telemetry.exposition import Told, Unreadable, merged, read
from hive.telemetry.metrics import Metrics
from hive.workers.client import EngineClient, ProbeFailed
from hive.workers.worker import Worker

PATH = "/metrics"
READ_S = 1.0  # from the question to the last byte of an engine's answer
MOST_BYTES = 8 * 2**20  # of an answer; vLLM's has 64 KiB
PARSE_S = 1.0  # of CPU time for all answers of one reading, the shortest first
OK = 200
HAS_NONE = (404, 405, 501)  # an engine that answers so has no metrics, and that is no failure
TEXT_TYPE = text_format.CONTENT_TYPE_LATEST
OPENMETRICS_TYPE = openmetrics.CONTENT_TYPE_LATEST
VERSIONS = ("1.0.0", "0.0.4")  # of formats, that hive writes
_TEXT = {"Accept": "text/plain;version=0.0.4"}

log = logging.getLogger(__name__)

Sources = Callable[[], Iterable[tuple[str, EngineClient]]]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the engines told at one time, by worker; `was_read` has those that have metrics."""

    families: list[Metric]
    was_read: Mapping[str, bool]
    left_out: Mapping[str, int]


def answering(workers: Iterable[Worker]) -> Iterator[tuple[str, EngineClient]]:
    """The workers whose engine should answer just now, each with the way to it."""
    for worker in workers:
        if worker.life is not None and worker.state in (State.READY, State.DRAINING):
            yield worker.id, worker.life.client


class Engines:
    """Asks engines for their metrics; one reading at a time, shared by all who wait for it."""

    def __init__(self, sources: Sources, parse_s: float = PARSE_S) -> None:
        """`sources` names, whenever it is asked, the workers to ask and the ways to them."""
        self._sources = sources
        self._parse_s = parse_s
        self._reading = asyncio.Lock()
        self._count = 0
        self._last = Reading([], {}, {})

    async def read(self) -> Reading:
        """What they tell now, or told whoever was asking them already."""
        before = self._count
        async with self._reading:
            if self._count == before:
                self._last = await self._read()
                self._count += 1
            return self._last

    async def _read(self) -> Reading:
        sources = list(self._sources())
        answers = await asyncio.gather(*(_answer(client) for _, client in sources))
        found = {
            worker: answer
            for (worker, _), answer in zip(sources, answers, strict=True)
            if answer is not None
        }
        return await asyncio.to_thread(_parsed, found, self._parse_s)

    def __repr__(self) -> str:
        return f"<Engines {self._count} readings>"


class Scrape:
    """What a scraper gets."""

    def __init__(self, metrics: Metrics, sources: Sources) -> None:
        self._metrics = metrics
        self._engines = Engines(sources)

    async def text(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type, in the format that the Accept header prefers."""
        found = await self._engines.read()
        self._metrics.engines_were_read(found.was_read, found.left_out)
        # Of hive's own in the loop, so that they fit together; the text of it all in the thread.
        families = [*self._metrics.registry.collect(), *found.families]
        if wants_openmetrics(accept):
            return await asyncio.to_thread(openmetrics_text, families), OPENMETRICS_TYPE
        return await asyncio.to_thread(plain_text, families), TEXT_TYPE


def wants_openmetrics(accept: str) -> bool:
    """Whether an Accept header prefers OpenMetrics 1.0 to the text format, or likes it as much."""
    liked = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for one in accept.lower().split(","):
        kind, *params = (part.strip() for part in one.split(";"))
        named = dict(param.split("=", 1) for param in params if "=" in param)
        if kind in liked and named.get("version", "1.0.0").strip('"') in VERSIONS:
            liked[kind] = max(liked[kind], _weight(named.get("q", "1")))
    return 0 < liked["application/openmetrics-text"] >= liked["text/plain"]


def _weight(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0


def plain_text(families: Iterable[Metric]) -> bytes:
    """Prometheus' text format."""
    return text_format.generate_latest(cast("CollectorRegistry", _Families(families)))


def openmetrics_text(families: Iterable[Metric]) -> bytes:
    """OpenMetrics. All names are classic, and the library's other way of escaping spoils colons: of
    vllm:x it would make samples vllm_x under the TYPE of vllm:x."""
    escaping = openmetrics.ALLOWUTF8
    made: bytes = openmetrics.generate_latest(_Families(families), escaping)  # type: ignore[no-untyped-call]
    return made


class _Families:
    """Families, as generators of text take them; the thread that asks lets others run between."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            time.sleep(0)
            yield family


async def _answer(client: EngineClient) -> bytes | None:
    """What an engine says: nothing where it does not answer well, None where it has no metrics."""
    try:
        status, body = await client.read(PATH, READ_S, MOST_BYTES, _TEXT)
    except ProbeFailed as exc:
        log.debug("an engine's metrics were not read: %s", exc)
        return b""
    if status in HAS_NONE:
        return None
    return body if status == OK else b""


def _parsed(answers: Mapping[str, bytes], within_s: float) -> Reading:
    """In a thread: every answer that can be read within so much CPU time, the shortest first."""
    told: dict[str, Told] = {}
    began = time.thread_time()

    def check() -> None:
        if time.thread_time() - began > within_s:
            raise Unreadable(f"not read within {within_s:g} s of CPU time")

    for worker in sorted(answers, key=lambda one: len(answers[one])):
        if not answers[worker]:
            continue
        try:
            told[worker] = read(answers[worker].decode(), worker, check)
        except (Unreadable, UnicodeDecodeError) as exc:
            log.debug("the metrics of worker %s are left out: %s", worker, exc)
    families = merged(told[worker] for worker in answers if worker in told)
    return Reading(
        families,
        {worker: worker in told for worker in answers},
        {worker: one.left_out for worker, one in told.items()},
    )
