"""An engine's pulse: what its gauges and processes tell of aborts, of progress and of hanging."""

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from hive.workers.client import EngineClient, ProbeFailed
from hive.workers.pulse import (
    ABORT_S,
    FIRST_S,
    HEALTHY_S,
    LISTENING_S,
    REFUSALS,
    Pulse,
    Sample,
    cpu_of,
    read_sample,
)
from tests.patience import awaited, short_directory, until, wait_until

OFTEN_S = 0.25
EXCERPT = Path(__file__).parents[2] / "docs/engines.md"


def gauges(
    running: float = 0, waiting: float = 0, kv: float = 0.0, prompt: float = 0, made: float = 0
) -> str:
    """As vLLM writes them."""
    labels = '{engine="0",model_name="m"}'
    return (
        "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
        "# TYPE vllm:num_requests_running gauge\n"
        f"vllm:num_requests_running{labels} {running}\n"
        f"vllm:num_requests_waiting{labels} {waiting}\n"
        f"vllm:kv_cache_usage_perc{labels} {kv}\n"
        f"vllm:prompt_tokens_total{labels} {prompt}\n"
        f"vllm:generation_tokens_total{labels} {made}\n"
    )


class Scripted(EngineClient):
    """An engine's metrics: `running` and the counters are what the test says."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), "m")
        self.running = self.waiting = self.made = 0
        self.text: str | None = None  # instead of gauges
        self.status = 200
        self.fails = False
        self.listens = True
        self.looked: list[float] = []  # whether anybody listens
        self.asked: list[float] = []
        self.held: asyncio.Event | None = None  # an answer waits for it

    async def is_listening(self) -> bool:
        self.looked.append(time.monotonic())
        return self.listens

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        within_s: float = 0,  # noqa: ARG002
    ) -> tuple[int, bytes]:
        assert (method, path, body) == ("GET", "/metrics", None)
        self.asked.append(time.monotonic())
        running, waiting, made = self.running, self.waiting, self.made
        if self.held is not None:
            await self.held.wait()
        if self.fails:
            raise ProbeFailed("GET /metrics: ClientError")
        text = gauges(running, waiting, made=made) if self.text is None else self.text
        return self.status, text.encode()


class Watched:
    """A pulse whose poller runs, its engine's gauges, and what it told."""

    def __init__(self, root: int, **options: Any) -> None:
        self.engine = Scripted()
        self.hung: list[str] = []
        self.ended: list[tuple[str, str]] = []
        limits = {"cleanup_s": 60.0, "longest_s": 60.0, "has_gauges": True, "vital": ()}
        self.pulse = Pulse(self.engine, root, hung=self.hung.append, **{**limits, **options})

    def begin(self, *weights: int) -> None:
        for weight in weights:
            self.pulse.began(weight)
            self.engine.running += weight

    def abort(self, name: str, weight: int = 1) -> None:
        self.pulse.aborted(weight, lambda how: self.ended.append((name, how)))

    async def sampled(self, times: int = 1) -> None:
        """So many samples more were taken and looked at."""
        before = len(self.engine.asked)
        await until(lambda: len(self.engine.asked) >= before + times, "a sample")
        await asyncio.sleep(0)


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at every second and every five is looked at more often."""
    monkeypatch.setattr("hive.workers.pulse.WATCH_S", OFTEN_S)
    monkeypatch.setattr("hive.workers.pulse.LISTENING_S", 2 * OFTEN_S)


often = pytest.mark.usefixtures("_often")


@asynccontextmanager
async def watched(root: int = 0, **options: Any) -> AsyncIterator[Watched]:
    it = Watched(root, **options)
    async with asyncio.TaskGroup() as tasks:
        polling = tasks.create_task(it.pulse.run(), name="pulse")
        await asyncio.sleep(0)
        try:
            yield it
        finally:
            it.pulse.stop()
            if it.engine.held:
                it.engine.held.set()
            await asyncio.wait([polling])
            assert polling.exception() is None
            await it.engine.close()


# ── What an engine publishes ────────────────────────────────────────────────────────────────────


def test_what_vllm_publishes_is_read() -> None:
    """Its own text, as it is in docs/engines.md."""
    text = EXCERPT.read_text()
    begin = text.index("vllm:num_requests_running{")
    excerpt = text[begin : text.index("```", begin)]
    sample = read_sample(excerpt)

    assert sample == Sample(1, (383.0, 0.0007324665812122877, 123.0))


def test_what_waits_counts_as_what_runs() -> None:
    """(R050)"""
    assert read_sample(gauges(running=2, waiting=3)) == Sample(5, (0.0, 0.0, 0.0))


def test_the_ranks_of_one_engine_are_added_up() -> None:
    two = gauges(running=2, made=10) + gauges(running=1, waiting=1, made=5).replace(
        'engine="0"', 'engine="1"'
    )

    assert read_sample(two) == Sample(4, (15.0, 0.0, 0.0))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing of the kind",
        "# HELP vllm:num_requests_running x\n",
        "other:num_requests_running 1.0\n",
        'vllm:num_requests_running_total{engine="0"} 1.0\n',
        "vllm:num_requests_waiting 1.0\n",
        "vllm:num_requests_running\n",
        " vllm:num_requests_running 1.0\n",
        "vllm:num_requests_running NaN\n",
        "vllm:num_requests_running 1e999\n",
    ],
)
def test_an_engine_without_gauges_is_seen_to_have_none(text: str) -> None:
    assert read_sample(text) is None


def test_a_number_without_end_is_none() -> None:
    text = "vllm:num_requests_running 1.0\nvllm:generation_tokens_total 1e999\n"

    assert read_sample(text) == Sample(1, ())


def test_a_gauge_without_labels_is_one_too() -> None:
    assert read_sample("vllm:num_requests_running 1.0\n") == Sample(1, ())


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1), st.integers(0, 10**12))
def test_whatever_the_numbers_are_they_are_read(
    running: int, waiting: int, kv: float, made: int
) -> None:
    sample = read_sample(gauges(running, waiting, kv, 0, made))

    assert sample == Sample(running + waiting, (float(made), kv, 0.0))


# ── Confirming aborts ───────────────────────────────────────────────────────────────────────────


@awaited
async def test_an_abort_is_confirmed_when_the_engine_runs_no_more_than_is_open() -> None:
    """(R050)"""
    async with watched() as it:
        it.begin(1, 1)
        it.abort("a")
        await it.sampled(2)
        assert it.ended == []
        it.engine.running = 1
        await until(lambda: it.ended, "the abort to be confirmed")

        assert it.ended == [("a", "yes")]
        assert repr(it.pulse) == "<Pulse 1 open, 0 aborted>"


@awaited
async def test_the_first_samples_come_soon_and_never_more_than_ten_in_a_second() -> None:
    async with watched() as it:
        it.begin(1)
        it.abort("a")
        began = time.monotonic()
        await it.sampled(12)
        asked = it.engine.asked

        assert asked[0] - began >= FIRST_S - 0.002
        assert asked[2] - began < 2 * ABORT_S  # three soon: most engines are that quick
        assert asked[10] - asked[0] >= 0.95
        later = itertools.pairwise(asked[3:])
        assert all(b - a >= ABORT_S - 0.01 for a, b in later)


@awaited
async def test_many_aborts_ask_no_more_often_than_one() -> None:
    async with watched() as it:
        it.begin(*[1] * 50)
        began = time.monotonic()
        for number in range(50):
            it.abort(str(number))
            await asyncio.sleep(0.01)
        took_s = time.monotonic() - began

        assert len(it.engine.asked) <= took_s / ABORT_S + 3


@awaited
async def test_an_engine_whose_metrics_fail_is_not_condemned_for_an_abort() -> None:
    """Nothing says that it still runs: its other requests would pay for a broken page."""
    async with watched(cleanup_s=0.2) as it:
        it.engine.status, it.engine.text = 500, "boom"
        it.begin(1)
        it.abort("a")
        await until(lambda: it.ended, "the end of the wait")

        assert it.ended == [("a", "unknown")]
        assert it.hung == []


@often
@awaited
async def test_a_request_that_the_engine_does_not_count_can_hang_as_well() -> None:
    """To tokenize, for example: what stands still must be found out."""
    async with watched(longest_s=0.3) as it:
        it.begin(0)
        await until(lambda: it.hung, "the hanging engine")
        it.pulse.ended(0)

        assert "no progress" in it.hung[0]


@awaited
async def test_what_a_request_weighs_is_what_the_engine_counts() -> None:
    """`n` and lists of prompts: it is over when all of them are."""
    async with watched() as it:
        it.begin(4, 2)
        it.abort("a", 4)
        for running in (5, 3):
            it.engine.running = running
            await it.sampled(2)
            assert it.ended == []
        it.engine.running = 2
        await until(lambda: it.ended, "all of it to be over")

        assert it.pulse.open_weight == 2


@awaited
async def test_of_several_the_oldest_ones_are_confirmed_first() -> None:
    """The engine does not tell which; it acts in order."""
    async with watched() as it:
        it.begin(1, 1, 1, 1)
        for name in "abc":
            it.abort(name)
        for running, ended in ((4, ""), (3, "a"), (2, "ab"), (1, "abc")):
            it.engine.running = running
            await it.sampled(2)
            assert [name for name, _ in it.ended] == list(ended)


@awaited
async def test_a_sample_from_before_an_abort_says_nothing_of_it() -> None:
    async with watched() as it:
        it.begin(1)
        it.abort("a")
        it.engine.held = asyncio.Event()
        await it.sampled()
        it.begin(1)
        it.engine.running = 0
        it.abort("b")  # while the sample is under way
        it.engine.held.set()
        it.engine.held = None
        await it.sampled()
        await until(lambda: len(it.ended) == 2, "both to be confirmed")

        assert it.ended == [("a", "yes"), ("b", "yes")]


@awaited
async def test_a_request_that_ends_while_a_sample_is_under_way_explains_nothing() -> None:
    """The count may still have it in, or not: only the sure reading confirms."""
    async with watched() as it:
        it.begin(1, 1)
        it.abort("a")
        it.engine.running = 1  # which of the two it is, nobody knows
        it.engine.held = asyncio.Event()
        await it.sampled()
        it.pulse.ended(1)
        it.engine.held.set()
        it.engine.held = None
        await asyncio.sleep(0)
        assert it.ended == []
        it.engine.running = 0
        await until(lambda: it.ended, "the next sample")

        assert it.ended == [("a", "yes")]


@awaited
async def test_a_request_that_begins_while_a_sample_is_under_way_explains_nothing() -> None:
    async with watched() as it:
        it.begin(1)
        it.abort("a")
        it.engine.held = asyncio.Event()
        await it.sampled()
        it.pulse.began(1)
        it.engine.held.set()
        it.engine.held = None
        for _ in range(3):
            await asyncio.sleep(0)

        assert it.ended == []


@awaited
async def test_a_sample_that_fails_says_nothing_and_is_taken_again() -> None:
    async with watched() as it:
        it.begin(1)
        it.engine.running = 0
        it.engine.fails = True
        it.abort("a")
        await it.sampled(2)
        it.engine.fails, it.engine.status, it.engine.text = False, 500, "broken"
        await it.sampled(2)
        assert it.ended == []
        it.engine.status, it.engine.text = 200, None
        await until(lambda: it.ended, "the abort to be confirmed")

        assert it.ended == [("a", "yes")]


@awaited
async def test_without_gauges_the_closed_connection_counts() -> None:
    """Never asked, never killed for a cancel."""
    async with watched(has_gauges=False, cleanup_s=0) as it:
        it.begin(1)
        it.abort("a")
        assert it.ended == [("a", "unknown")]
        await asyncio.sleep(0.05)

        assert it.engine.asked == []
        assert it.hung == []


@awaited
async def test_an_engine_that_answers_without_gauges_is_asked_no_more() -> None:
    async with watched() as it:
        it.engine.text = "# nothing is published here\n"
        it.begin(1, 1, 1)
        it.abort("a")
        it.abort("b")
        await until(lambda: len(it.ended) == 2, "the answer")
        it.abort("c")

        assert it.ended == [("a", "unknown"), ("b", "unknown"), ("c", "unknown")]
        assert len(it.engine.asked) == 1


@awaited
async def test_the_end_of_the_engine_confirms_every_abort() -> None:
    """(R051)"""
    async with watched() as it:
        it.begin(1, 1, 1)
        it.abort("a")
        it.abort("b")
        it.pulse.stop()
        it.abort("c")

        assert it.ended == [("a", "yes"), ("b", "yes"), ("c", "yes")]


@given(st.lists(st.integers(1, 5), max_size=6), st.integers(0, 8), st.integers(0, 30))
def test_what_is_left_can_always_explain_what_runs(
    weights: list[int], open_weight: int, running: int
) -> None:
    """As many as possible are confirmed, the oldest first, and not one more."""

    async def confirm() -> list[int]:
        it = Watched(0)
        for weight in [open_weight, *weights]:
            it.pulse.began(weight)
        for number, weight in enumerate(weights):
            it.abort(str(number), weight)
        it.pulse._least = it.pulse.open_weight
        it.pulse._confirm(running, time.monotonic() + 1)
        await it.engine.close()
        assert [name for name, _ in it.ended] == [str(n) for n in range(len(it.ended))]
        return weights[len(it.ended) :]

    left = asyncio.run(confirm())
    excess = max(0, running - open_weight)
    if len(left) < len(weights):
        assert sum(left) >= excess
    if left:
        assert sum(left[1:]) < excess


# ── When nothing is asked ───────────────────────────────────────────────────────────────────────


@often
@awaited
async def test_an_idle_engine_is_not_asked() -> None:
    async with watched() as it:
        await asyncio.sleep(2 * OFTEN_S)
        it.begin(1)
        it.pulse.ended(1)
        await asyncio.sleep(2 * OFTEN_S)

        assert it.engine.asked == []


@often
@awaited
async def test_while_bytes_come_the_engine_is_not_asked() -> None:
    async with watched() as it:
        it.begin(1)
        began = time.monotonic()
        while time.monotonic() - began < 4 * OFTEN_S:
            it.pulse.relayed += 1
            await asyncio.sleep(0.01)
        assert it.engine.asked == []
        await until(lambda: it.engine.asked, "a look after the last byte")


# ── Hanging ─────────────────────────────────────────────────────────────────────────────────────


@awaited
async def test_an_abort_that_is_not_confirmed_in_time_is_told_once_where_nothing_moves() -> None:
    """(R050, R051)"""
    async with watched(cleanup_s=0.3) as it:
        it.begin(1)
        await it.sampled()
        began = time.monotonic()
        it.abort("a")
        await until(lambda: it.hung, "the verdict")
        assert time.monotonic() - began >= 0.3 - 0.002
        await it.sampled(4)

        assert it.hung == ["it did not end a cancelled request within 0.3 s"]


@awaited
async def test_an_abort_may_take_longer_while_the_engine_gets_on() -> None:
    """A long prefill is not interrupted between two steps."""
    async with watched(cleanup_s=0.3) as it:
        it.begin(1)
        it.abort("a")
        for _ in range(10):
            it.engine.made += 1
            await it.sampled()
        assert it.hung == []
        await until(lambda: it.hung, "the verdict, now that nothing moves")


@often
@awaited
async def test_work_without_progress_is_told_once() -> None:
    async with watched(longest_s=0.6) as it:
        it.begin(1)
        began = time.monotonic()
        await until(lambda: it.hung, "the verdict")
        took_s = time.monotonic() - began
        await it.sampled(2)

        assert took_s >= 0.6 - 0.002
        assert it.hung == ["it has requests and made no progress for 0.6 s"]


@often
@awaited
async def test_an_engine_that_does_not_answer_its_metrics_makes_no_progress() -> None:
    async with watched(longest_s=0.6) as it:
        it.engine.fails = True
        it.begin(1)
        await until(lambda: it.hung, "the verdict")


@pytest.mark.parametrize("sign", ["tokens", "bytes"])
@often
@awaited
async def test_any_sign_of_progress_is_enough(sign: str) -> None:
    async with watched(longest_s=0.8) as it:
        it.begin(1)
        began = time.monotonic()
        while time.monotonic() - began < 2:
            if sign == "tokens":
                it.engine.made += 1
            else:
                it.pulse.relayed += 1
            await asyncio.sleep(0.02)

        assert it.hung == []


@often
@awaited
async def test_time_without_work_is_no_hanging() -> None:
    async with watched(longest_s=0.9) as it:
        await asyncio.sleep(1)
        it.begin(1)
        await asyncio.sleep(2 * OFTEN_S)
        it.pulse.ended(1)

        assert it.hung == []


# ── Who listens ─────────────────────────────────────────────────────────────────────────────────

NOBODY = "nobody listens on its socket any more"


@awaited
async def test_when_a_connection_is_refused_and_nobody_listens_that_is_told_once() -> None:
    """Idle or not: its process may be gone without its guard having said so."""
    async with watched() as it:
        it.engine.listens = False
        began = time.monotonic()
        for _ in range(5):
            it.pulse.refused()
        await until(lambda: it.hung, "the verdict")
        assert time.monotonic() - began < LISTENING_S
        assert len(it.engine.looked) == REFUSALS
        it.pulse.refused()
        await until(lambda: len(it.engine.looked) >= 2 * REFUSALS, "another look")
        await asyncio.sleep(0)

        assert it.hung == [NOBODY]
        assert it.engine.asked == []


@awaited
async def test_who_refuses_once_and_listens_again_is_not_gone() -> None:
    async with watched() as it:
        it.engine.listens = False
        it.pulse.refused()
        await until(lambda: it.engine.looked, "the first look")
        it.engine.listens = True
        await until(lambda: len(it.engine.looked) == 2, "the second look")
        await asyncio.sleep(3 * ABORT_S)

        assert len(it.engine.looked) == 2
        assert it.hung == []


@often
@awaited
async def test_an_idle_engine_whose_socket_nobody_serves_is_found_from_time_to_time() -> None:
    async with watched() as it:
        it.engine.listens = False
        began = time.monotonic()
        await until(lambda: it.hung, "the verdict")

        assert time.monotonic() - began >= 2 * OFTEN_S - 0.002
        assert it.hung == [NOBODY]
        assert it.engine.asked == []


@often
@awaited
async def test_who_hangs_and_does_not_listen_either_is_told_once() -> None:
    async with watched(longest_s=0.6) as it:
        it.engine.listens = False
        it.begin(1)
        await until(lambda: it.hung, "the verdict")
        it.pulse.refused()
        await until(lambda: len(it.engine.looked) >= REFUSALS, "the looks")
        await it.sampled(2)

        assert len(it.hung) == 1


@awaited
async def test_after_its_end_nobody_needs_to_listen() -> None:
    async with watched() as it:
        it.engine.listens = False
        it.pulse.refused()
        await until(lambda: it.engine.looked, "the first look")
        it.pulse.stop()

    assert it.hung == []


@pytest.mark.parametrize("backlog", [8, 0], ids=["slow", "full"])
@awaited
async def test_a_slow_or_a_full_listener_is_not_gone(backlog: int) -> None:
    with short_directory() as home, ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(home / "s"))
        listener.listen(backlog)
        with suppress(BlockingIOError):
            for _ in range(2):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(home / "s"))
        it = Watched(0)
        real = EngineClient(home / "s", "m")
        it.pulse._client = real
        async with asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(it.pulse.run(), name="pulse")
            for _ in range(3):
                it.pulse.refused()
                await until(lambda: not it.pulse._is_refused, "a look")
                await asyncio.sleep((REFUSALS + 1) * ABORT_S)
            it.pulse.stop()
            await asyncio.wait([polling])
            assert it.hung == []
        await real.close()
        await it.engine.close()


@awaited
async def test_an_engine_whose_socket_is_left_over_is_gone() -> None:
    with short_directory() as home:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(home / "s"))
            left.listen()
        it = Watched(0)
        it.pulse._client = real = EngineClient(home / "s", "m")
        async with asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(it.pulse.run(), name="pulse")
            it.pulse.refused()
            await until(lambda: it.hung, "the verdict")
            it.pulse.stop()
            await asyncio.wait([polling])
        await real.close()
        await it.engine.close()

    assert it.hung == [NOBODY]


# ── Who is asked for its health ─────────────────────────────────────────────────────────────────


class Patient:
    """A server that says how it is: `status`, or nothing at all while it is None."""

    def __init__(self) -> None:
        self.status: int | None = 200
        self.told: list[int] = []  # it says these first
        self.asked: list[int | None] = []

    async def answer(self, request: web.Request) -> web.Response:
        assert request.path == "/healthcheck"
        status = self.told.pop(0) if self.told else self.status
        self.asked.append(status)
        if status is None:
            await asyncio.Event().wait()
        return web.Response(status=status or 0)


@asynccontextmanager
async def cared_for(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Watched, Patient]]:
    """A pulse that asks a real server, often; no request of a client goes there."""
    monkeypatch.setattr("hive.workers.pulse.HEALTHY_S", 0.02)
    monkeypatch.setattr("hive.workers.client.HEALTH_S", 0.3)
    patient, app = Patient(), web.Application()
    app.router.add_get("/healthcheck", patient.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    it = Watched(0, has_gauges=False, health_path="/healthcheck")
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with EngineClient(Path("/nowhere"), "", address) as client:
        it.pulse._client = client
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(it.pulse.run(), name="pulse")
            yield it, patient
            it.pulse.stop()
    await it.engine.close()
    await runner.cleanup()


@awaited
async def test_who_is_well_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cared_for(monkeypatch) as (it, patient):
        await until(lambda: len(patient.asked) > 20, "many checks")

        assert it.hung == []


@pytest.mark.parametrize("status", [503, 500, 404, 204, None])
@awaited
async def test_who_fails_three_checks_in_a_row_is_condemned_once(
    status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who takes the connection and says nothing, too."""
    async with cared_for(monkeypatch) as (it, patient):
        failed: list[int] = []

        def hung(why: str) -> None:
            it.hung.append(why)
            failed.append(len(patient.asked))

        it.pulse._hung = hung
        patient.told, patient.status = [200], status
        await until(lambda: it.hung, "the verdict")
        assert failed == [1 + REFUSALS]
        patient.status = 503
        await until(lambda: len(patient.asked) > 3 * REFUSALS, "more of them")

    assert it.hung == ["it failed 3 health checks in a row"]


@awaited
async def test_who_fails_two_checks_and_then_none_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cared_for(monkeypatch) as (it, patient):
        patient.told = [*[503] * (REFUSALS - 1), 200] * 3
        await until(lambda: len(patient.asked) > 3 * REFUSALS, "it to be well again")

        assert it.hung == []


@awaited
async def test_it_is_asked_while_requests_run_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cared_for(monkeypatch) as (it, patient):
        it.pulse.began(1)
        patient.status = 503
        await until(lambda: it.hung, "the verdict")
        it.pulse.ended(1)


@pytest.mark.parametrize(("path", "rest_s"), [(None, LISTENING_S), ("/healthcheck", HEALTHY_S)])
@awaited
async def test_only_who_has_a_path_is_asked_more_often(path: str | None, rest_s: float) -> None:
    it = Watched(0, health_path=path)
    await it.engine.close()

    assert it.pulse._rest_s == rest_s


# ── Processes ───────────────────────────────────────────────────────────────────────────────────


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        try:
            yield child
        finally:
            child.kill()


BUSY = "while True: pass"
PYTHON = Path(sys.executable).name[:15]  # of a process; it may be read before it has it
IDLE = "import time; time.sleep(600)"


def test_the_time_that_processes_had_is_added_up() -> None:
    with process(BUSY) as one, process(IDLE) as other:
        pids = [one.pid, other.pid]
        wait_until(lambda: cpu_of(pids)[0] > 0.2, "some CPU time")
        before, is_stopped = cpu_of(pids)
        assert not is_stopped
        wait_until(lambda: cpu_of(pids)[0] > before, "more CPU time")

    assert cpu_of(pids) == (0.0, False)
    assert cpu_of([]) == (0.0, False)


def test_a_stopped_process_is_seen() -> None:
    with process(BUSY) as child:
        wait_until(lambda: cpu_of([child.pid])[0] > 0, "some CPU time")
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: cpu_of([os.getpid(), child.pid])[1], "it to be stopped")
        child.send_signal(signal.SIGCONT)
        wait_until(lambda: not cpu_of([child.pid])[1], "it to go on")


@often
@awaited
async def test_without_gauges_an_engine_that_computes_gets_on_and_one_that_stands_hangs() -> None:
    with process(BUSY) as child:
        async with watched(os.getpid(), has_gauges=False, longest_s=0.8) as it:
            it.begin(1)
            await asyncio.sleep(1.6)
            assert it.hung == []
            child.send_signal(signal.SIGSTOP)
            await until(lambda: it.hung, "the verdict")


@often
@awaited
async def test_a_stopped_process_makes_no_progress_whatever_the_gauges_say() -> None:
    """(R051)"""
    with process(BUSY) as child:
        async with watched(os.getpid(), vital=(PYTHON,), longest_s=0.6) as it:
            await until(lambda: cpu_of([child.pid])[0], "it to compute")
            child.send_signal(signal.SIGSTOP)
            it.begin(1)
            while not it.hung:
                it.engine.made += 1
                await asyncio.sleep(0.05)

        assert it.hung == ["it has requests and made no progress for 0.6 s"]


@often
@awaited
async def test_a_process_that_goes_on_after_a_stop_gets_on_while_bytes_flow() -> None:
    """What was seen in a silence is forgotten when it speaks again."""
    with process(BUSY) as child:
        async with watched(os.getpid(), vital=(PYTHON,), longest_s=1) as it:
            await until(lambda: cpu_of([child.pid])[0], "it to compute")
            it.begin(1)
            child.send_signal(signal.SIGSTOP)
            await until(lambda: it.pulse._is_stopped, "a look")
            child.send_signal(signal.SIGCONT)
            began = time.monotonic()
            while time.monotonic() - began < 1.8:
                it.pulse.relayed += 1
                await asyncio.sleep(0.02)

            assert it.hung == []
