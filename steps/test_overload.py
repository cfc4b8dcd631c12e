"""Ten times more than can be served: what is let in is served as ever, the rest is told at once.

Clients that obey nothing ask again the moment they are refused; others come back when they were
told to. Then the worst moments: everybody leaves at once, everybody's time is over at once. A few
seconds in every test run, OVERLOAD_SECONDS (60) of each kind of client under `--soak`.
"""

import asyncio
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from steps import load
from steps.driver import Hive, chat_body
from steps.load import CHAT, Line, Reply
from steps.waiting import must

MODEL, WORKER = "m", "m-0"
SLOTS, DEPTH = 8, 8
TIMES = 10  # as many clients as there are slots
TOKENS, MANY_TOKENS, TOKEN_S = 80, 250, 0.02  # an answer takes 1.6 or 5 s, as a model's may
LONG_S = float(os.environ.get("OVERLOAD_SECONDS", "60"))
SHORT_S = 5.0  # of each of the two kinds of clients
CAPACITY_S, LONG_CAPACITY_S = 3.0, 15.0
# Of what is served at capacity. A crowd that asks again at once keeps hive's one thread busy with
# refusals, a thousand and more a second, on a machine whose two cores the engine, the clients and
# others share: each slot is then empty for about 0.1 s between two answers, however long they are.
# Of the short answers of a short measurement that is more.
LEAST, LEAST_SHORT = 0.95, 0.85
REFUSED_S = 0.25  # the 99th percentile of a refusal, on such a machine
REST_S = 5.0
GROWTH_MB = 8.0
# The worst moments: so many in slots, and as many waiting.
WIDE = 100
ROUNDS, MANY_ROUNDS = 3, 25
TIME_S, LATE_S = 1.0, 1.0  # of everybody, and how much later the last of them may know
PROMPT_S = 3.0  # within this the next request is served


class Crowd:
    """Clients that ask for one answer after the other, and what became of it."""

    def __init__(self, hive: Hive, tokens: int) -> None:
        self.hive, self.tokens = hive, tokens
        self.is_over = asyncio.Event()
        self.times: list[tuple[float, int]] = []  # of what came of answers that became whole
        self.refused_s: list[float] = []
        self.counts: Counter[str] = Counter()

    async def client(self, number: int, pause_s: Callable[[Reply], float]) -> None:
        """`pause_s` is for how long it stays away after a refusal."""
        line = Line(self.hive.port)
        # The same id again and again: hive remembers ids that ended, which is not what is measured.
        headers = {"X-Request-Id": f"client-{number}"}
        asked = 0
        try:
            while not self.is_over.is_set():
                asked += 1
                reply = await load.whole_chat(
                    line, MODEL, f"{number}-{asked}", self.tokens, headers
                )
                if reply.status == 200:
                    assert reply.error is None, reply.error
                    self.counts["whole"] += 1
                    self.times += reply.times
                    continue
                self.counts[str(load.check_refusal(reply)["reason"])] += 1
                self.refused_s.append(reply.seconds)
                if wait_s := pause_s(reply):
                    await self._stay_away(wait_s)
        finally:
            line.leave()

    async def _stay_away(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.is_over.wait()

    async def offer(self, clients: int, seconds: float, pause_s: Callable[[Reply], float]) -> float:
        """Events a second that came of whole answers; everybody finishes what it is at."""
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self.client(number, pause_s))
            began = time.monotonic()
            await asyncio.sleep(seconds)
            ended = time.monotonic()
            self.is_over.set()
        came = sum(events for at, events in self.times if began <= at < ended)
        return came / (ended - began)


def at_once(_reply: Reply) -> float:
    return 0.0


def as_told(reply: Reply) -> float:
    """Half of the clients know the unrounded hint, as OpenAI's do."""
    if len(reply.body) % 2:
        return float(reply.headers["retry-after-ms"]) / 1000
    return float(reply.headers["retry-after"])


@pytest.mark.double
@pytest.mark.timeout(3 * LONG_S + 120)
def test_ten_times_more_than_can_be_served(hive: Hive, pytestconfig: pytest.Config) -> None:
    is_long = bool(pytestconfig.getoption("soak"))
    seconds, tokens = (LONG_S, MANY_TOKENS) if is_long else (SHORT_S, TOKENS)
    knobs = ("--token-s", str(TOKEN_S), "--max-running", str(SLOTS))
    timeouts = {"queue_s": 15}  # who has a place gets a slot
    hive.model(MODEL, *knobs, max_concurrent=SLOTS, queue_depth=DEPTH, timeouts=timeouts)
    hive.start()
    double = hive.double(MODEL)

    capacity = load.run(
        Crowd(hive, tokens).offer(SLOTS, LONG_CAPACITY_S if is_long else CAPACITY_S, at_once), 60
    )
    print(f"capacity: {capacity:.0f} events/s, of {SLOTS / TOKEN_S:.0f} at the engine's pace")
    load.must_rest(hive, {WORKER: double}, REST_S, "after the measurement")
    descriptors = load.descriptors(hive)
    rss: list[float] = []
    for name, pause_s in (("at once", at_once), ("as told", as_told)):
        crowd = Crowd(hive, tokens)
        served = load.run(crowd.offer(TIMES * SLOTS, seconds, pause_s), seconds + 60)
        rss.append(load.rss_mb(hive))
        print(f"again {name}: {_summary(crowd, served / capacity)}; {rss[-1]:.1f} MB")
        assert served >= capacity * (LEAST if is_long else LEAST_SHORT)
        assert _percentile(crowd.refused_s, 99) < REFUSED_S
        load.must_rest(hive, {WORKER: double}, REST_S, f"after clients that come {name}")
        must(lambda: load.descriptors(hive) <= descriptors, REST_S, "descriptors as before")
    assert rss[1] - rss[0] < GROWTH_MB
    assert hive.metric("hive_retry_after_error_seconds_count", model=MODEL) > 0
    assert hive.worker(WORKER)["starts"] == 1
    assert not load.uncaught(hive)


def _summary(crowd: Crowd, share: float) -> str:
    refused = crowd.refused_s
    return (
        f"{share:.1%} of capacity; {dict(crowd.counts)}; refused in "
        f"{1000 * statistics.median(refused):.1f} ms (median), "
        f"{1000 * _percentile(refused, 99):.1f} ms (99 %)"
    )


def _percentile(seconds: list[float], percent: float) -> float:
    """The least number that so many percent do not exceed."""
    return sorted(seconds)[math.ceil(len(seconds) * percent / 100) - 1]


# ── the worst moments ───────────────────────────────────────────────────────────────────────────


class Hall:
    """A wide model whose every slot and place is taken, again and again."""

    def __init__(self, hive: Hive) -> None:
        self.hive = hive
        knobs = ("--token-s", "0.05", "--tokens", "2000", "--max-running", str(WIDE))
        hive.model(MODEL, *knobs, max_concurrent=WIDE, queue_depth=WIDE)
        hive.start()
        self.double = hive.double(MODEL)
        self.lines = [Line(hive.port) for _ in range(2 * WIDE)]
        self.counts: Counter[str] = Counter()

    async def come(self, **fields: Any) -> None:
        """Everybody asks, and half of them wait for a slot."""
        for line in self.lines[:WIDE]:
            await line.send(CHAT, chat_body(MODEL, **fields))
        await self._must_hold(WIDE, 0)
        for line in self.lines[WIDE:]:
            await line.send(CHAT, chat_body(MODEL, **fields))
        await self._must_hold(WIDE, WIDE)

    async def _must_hold(self, busy: int, waiting: int) -> None:
        def counts() -> tuple[float, ...]:
            names = ("hive_in_flight", "hive_waiting")
            here = (self.hive.metric(name, model=MODEL) for name in names)
            return (*here, self.double.state["running"])

        async def is_so() -> bool:
            return await asyncio.to_thread(counts) == (busy, waiting, busy)

        await load.event(is_so, 15, f"{busy} in slots and {waiting} waiting")

    def go(self, first: int = 0) -> None:
        """From that one on everybody leaves at once, one half of them without a proper end."""
        for number, line in enumerate(self.lines[first:]):
            line.reset() if number % 2 else line.leave()

    async def must_serve(self) -> None:
        """A newcomer's whole answer, soon: it comes back as often as it is refused."""
        line, began = Line(self.hive.port), time.monotonic()
        try:
            while (reply := await load.whole_chat(line, MODEL, "new", 1)).status != 200:
                load.check_refusal(reply)
                assert time.monotonic() < began + PROMPT_S, bytes(reply.body)
        finally:
            line.leave()
        took_s = time.monotonic() - began
        assert took_s < PROMPT_S, f"{took_s:.3f} s"
        self.counts["slowest newcomer, ms"] = max(
            self.counts["slowest newcomer, ms"], round(1000 * took_s)
        )

    def must_be_as_before(self) -> None:
        load.must_rest(self.hive, {WORKER: self.double}, REST_S)
        assert self.hive.worker(WORKER)["starts"] == 1
        assert not load.uncaught(self.hive)


@pytest.mark.double
def test_everybody_leaves_at_once(hive: Hive, pytestconfig: pytest.Config) -> None:
    hall = Hall(hive)

    async def all_leave() -> None:
        await hall.come(stream=True)
        hall.go()
        await hall.must_serve()

    async def who_waits_leaves_as_slots_become_free() -> None:
        await asyncio.to_thread(hall.double.set, first_token_s=TIME_S)
        await hall.come(max_tokens=1)
        answers = [asyncio.ensure_future(line.head(0)) for line in hall.lines[:WIDE]]
        await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        hall.go(WIDE)
        replies = await asyncio.gather(*answers)
        assert {reply.status for reply in replies} == {200}
        hall.go()
        await asyncio.to_thread(hall.double.set, first_token_s=0.0)
        await hall.must_serve()

    for _round in range(MANY_ROUNDS if pytestconfig.getoption("soak") else ROUNDS):
        load.run(all_leave(), 60)
        hall.must_be_as_before()
        load.run(who_waits_leaves_as_slots_become_free(), 60)
        hall.must_be_as_before()
    print(dict(hall.counts))


@pytest.mark.double
def test_everybodys_time_is_over_at_once(hive: Hive, pytestconfig: pytest.Config) -> None:
    hall = Hall(hive)

    async def all_run_out(first_token_s: float) -> None:
        """Of all of them at the same instant; the engine may just be answering then."""
        await asyncio.to_thread(hall.double.set, first_token_s=first_token_s)
        over_at = datetime.now(UTC) + timedelta(seconds=TIME_S)
        headers = {"X-Request-Deadline": over_at.isoformat()}
        body = chat_body(MODEL, max_tokens=1)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(line.ask(CHAT, body, headers)) for line in hall.lines]
        late_s = time.time() - over_at.timestamp()
        assert late_s < LATE_S, f"the last one was told {late_s:.3f} s late"
        for task in asked:
            reply = task.result()
            hall.counts[reply.code or "answered"] += 1
            assert (reply.status, reply.code) in ((504, "REQUEST_TIMEOUT"), (200, None)), reply
            assert first_token_s < TIME_S or reply.status == 504, reply
        hall.go()
        await asyncio.to_thread(hall.double.set, first_token_s=0.0)
        await hall.must_serve()

    for _round in range(MANY_ROUNDS if pytestconfig.getoption("soak") else ROUNDS):
        for first_token_s in (60.0, TIME_S * 0.9):
            load.run(all_run_out(first_token_s), 60)
            hall.must_be_as_before()
    print(dict(hall.counts))
