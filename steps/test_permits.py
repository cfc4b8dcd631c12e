"""However requests end, every permit comes back: by the thousand, in every way, in random order.

At each idle point hive's counts, the engines' own and the keys' quotas are all zero, and every slot
can really be taken again. PERMITS_SEED repeats an order, though not its exact moments;
PERMITS_COUNT says how many requests `--soak` makes of it.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from steps import load
from steps.driver import Answer, Double, Hive, chat_body
from steps.load import CHAT, Cut, Line, Reply, expected
from steps.operator import key_of
from tests.patience import within

SEED = int(os.environ.get("PERMITS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
MANY = int(os.environ.get("PERMITS_COUNT", "20000"))
FEW = 750
BETWEEN_RESTS, BETWEEN_MANY_RESTS = 375, 1000
CLIENTS = 24  # at once
ROUND_S = 120.0
REST_S = 15.0
SLOTS, DEPTH = 4, 4
QUOTA = SLOTS + 2  # of the key "few", at once
OPERATOR, FREE, LIMITED = "operator", "free", "few"
TOKENS = 40  # of an answer at most, if it is one that shall end
ENDLESS = 100_000
PAD = 300_000  # bytes of an event for a client that reads nothing


@dataclass(frozen=True)
class Model:
    """One of those that are asked: how its engine is, and how long it has."""

    knobs: tuple[str, ...]
    timeouts: dict[str, float] = field(default_factory=dict)
    replicas: int = 1
    depth: int = DEPTH  # for each replica

    @property
    def slots(self) -> int:
        """Of each replica."""
        return SLOTS // self.replicas


PACE = ("--token-s", "0.004", "--abort-s", "0.02", "--good-requests", "1")
MODELS = {
    "calm": Model((*PACE, "--max-model-len", "200000")),
    "strict": Model(PACE, depth=0),
    # Its engine stops in the middle, or before the beginning, and the limits are short.
    "limited": Model(
        ("--token-s", "0.01", "--good-requests", "1"),
        {"queue_s": 0.3, "inference_s": 0.5, "stall_s": 0.5, "stream_total_s": 3.0, "cleanup_s": 5},
    ),
    # Their engines answer with errors, with nothing, with what is no HTTP, and die.
    "lone": Model(PACE, {"cleanup_s": 2}),
    "pair": Model(PACE, {"cleanup_s": 2}, replicas=2, depth=DEPTH // 2),
}
WORKERS = {f"{name}-{n}": name for name, model in MODELS.items() for n in range(model.replicas)}
FAIR: dict[str, Any] = {"answer_status": "", "malformed": "", "hang_up": 0, "die_after": None}
STEADY: dict[str, Any] = {"stop_after": None, "silent": False, "first_token_s": 0.0}
ROUGH: list[dict[str, Any]] = [
    *({"answer_status": told} for told in ("500", "503:1", "429", "404")),
    *({"malformed": how} for how in ("status-line", "chunk-size", "content-length")),
    *({"hang_up": count} for count in (1, 2, 4)),
    {"die_after": 3, "die_how": "hangup"},
    {"die_after": 3, "die_how": "hangup-midchunk"},
    {"die_after": 0, "die_how": "exit1"},
    {"die_after": 5, "die_how": "midchunk"},
    {},
]
STUCK: list[dict[str, Any]] = [
    {"stop_after": 5},
    {"stop_after": 0},
    {"silent": True},
    {"first_token_s": 0.3},
    {},
    {},
]
# What hive may say of a request beyond what the request itself was out for.
NO_PLACE = {"slots_busy", "queue_full", "queue_timeout"}
TROUBLE = {
    *("WORKER_CRASHED", "BAD_GATEWAY", "CIRCUIT_BREAKER_OPEN", "RETRY_BACKOFF"),
    *("loading", "draining", "NotFoundError", "InternalServerError"),
    *("ServiceUnavailableError", "RateLimitError"),
}
SLOW = {"INFERENCE_TIMEOUT"}
MAY_HAPPEN = {"limited": SLOW, "lone": TROUBLE, "pair": TROUBLE}


@pytest.mark.double
@pytest.mark.timeout(1500)
def test_however_requests_end_every_permit_comes_back(
    hive: Hive, pytestconfig: pytest.Config
) -> None:
    is_long = bool(pytestconfig.getoption("soak"))
    count, between = (MANY, BETWEEN_MANY_RESTS) if is_long else (FEW, BETWEEN_RESTS)
    print(f"PERMITS_SEED={SEED}")
    ends = Ends(hive, random.Random(f"permits {SEED}"))
    ends.begin()
    try:
        for done in range(0, count, between):
            ends.round(between)
            ends.rest(done + between)
        ends.count_retries()
    except Exception as exc:
        told = [f"{exc}", *load.uncaught(hive)[:3], f"PERMITS_SEED={SEED}; {ends.summary()}"]
        raise AssertionError("\n".join(told)) from exc
    print(ends.summary())
    if is_long:
        assert not (missing := ends.missing()), f"chance never made {missing}: let it run longer"


class Ends:
    """Requests, and the ways in which they end."""

    def __init__(self, hive: Hive, chance: random.Random) -> None:
        self.hive, self.chance = hive, chance
        self.counts: Counter[str] = Counter()
        self.number = 0
        # A way, how often it is taken, and the models that it is for.
        anything, faulty = tuple(MODELS), ("lone", "pair")
        self.ways: list[tuple[Callable[[Ask], Awaitable[None]], int, tuple[str, ...]]] = [
            (whole, 30, anything),
            (several, 4, ("calm",)),
            (refused_by_the_engine, 4, ("calm",)),
            (refused_by_hive, 8, anything),
            (leaves_before_all_is_sent, 4, anything),
            (leaves_before_the_first_byte, 12, anything),
            (leaves_in_the_middle, 12, anything),
            (sends_no_more, 8, anything),
            (is_ended_as_soon_as_it_is_seen, 14, anything),
            (is_cancelled, 12, anything),
            (has_little_time, 12, anything),
            (takes_too_long, 1, ("limited",)),
            (reads_nothing, 1, ("limited",)),
            (meets_a_fault, 4, faulty),
        ]
        self.acts: list[tuple[Callable[[str], None], int, tuple[str, ...]]] = [
            (self.turn, 12, faulty),
            (self.be_fair, 8, faulty),
            (self.get_stuck, 6, ("limited",)),
            (self.kill, 3, faulty),
            (self.restart, 1, faulty),
        ]

    def begin(self) -> None:
        hive = self.hive
        for name, model in MODELS.items():
            hive.model(
                name,
                *model.knobs,
                replicas=["cpu"] * model.replicas,
                max_concurrent=model.slots,
                queue_depth=model.depth,
                timeouts=model.timeouts,
            )
        hive.sections["restarts"] = {"starts": 1000, "backoff_s": 0.02, "backoff_max_s": 0.1}
        hive.sections["breaker"] = {"failures": 5, "cooldown_s": 0.2}
        for name, scope, most in (
            (OPERATOR, "admin", 0),
            (FREE, "inference", 0),
            (LIMITED, "inference", QUOTA),
        ):
            digest = hashlib.sha256(key_of(name).encode()).hexdigest()
            key = {"name": name, "sha256": digest, "scopes": [scope], "max_concurrent": most}
            hive.keys.append(key)
        hive.key = key_of(OPERATOR)
        hive.start()

    # ── a round ─────────────────────────────────────────────────────────────────────────────────

    def round(self, count: int) -> None:
        """So many requests, a few at a time; everybody has ended when it is over."""
        ways, weights, _ = zip(*self.ways, strict=True)
        places = {way: models for way, _, models in self.ways}
        asks = []
        for way in self.chance.choices(ways, weights, k=count):
            self.number += 1
            model = self.chance.choice(places[way])
            key = LIMITED if self.chance.random() < 0.4 else FREE
            one = random.Random(f"{SEED} {self.number}")
            asks.append((way, Ask(self, self.number, model, key, one)))
        load.run(self._all(iter(asks)), ROUND_S)

    async def _all(self, asks: Iterator[tuple[Callable[["Ask"], Awaitable[None]], "Ask"]]) -> None:
        is_over = asyncio.Event()

        async def client() -> None:
            for way, ask in asks:
                await ask.end(way)

        async def trouble() -> None:
            acts, weights, _ = zip(*self.acts, strict=True)
            places = {act: models for act, _, models in self.acts}
            while not is_over.is_set():
                (act,) = self.chance.choices(acts, weights)
                worker = self.chance.choice(_workers_of(self.chance.choice(places[act])))
                self.counts[act.__name__] += 1
                await asyncio.to_thread(act, worker)
                with contextlib.suppress(TimeoutError):
                    await within(is_over.wait(), self.chance.uniform(0, 0.4))

        async with asyncio.TaskGroup() as group:
            acting = group.create_task(trouble())
            clients = [group.create_task(client()) for _ in range(CLIENTS)]
            await asyncio.wait(clients)
            is_over.set()
            await acting

    # ── what befalls engines ────────────────────────────────────────────────────────────────────

    def turn(self, worker: str) -> None:
        self.tell(worker, FAIR | self.chance.choice(ROUGH))

    def be_fair(self, worker: str) -> None:
        self.tell(worker, FAIR)

    def get_stuck(self, worker: str) -> None:
        self.tell(worker, STEADY | self.chance.choice(STUCK))

    def kill(self, worker: str) -> None:
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill(self.hive.worker(worker)["pid"], signal.SIGKILL)

    def restart(self, worker: str) -> None:
        assert self.hive.ask("POST", f"/hive/v1/workers/{worker}/restart").status in (202, 409)

    def tell(self, worker: str, knobs: dict[str, Any]) -> None:
        """Where the engine is there; a new one is fair."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            self.double(worker).set(**knobs)

    def double(self, worker: str) -> Double:
        return self.hive.double_of(worker)

    # ── at rest ─────────────────────────────────────────────────────────────────────────────────

    def rest(self, done: int) -> None:
        """Nobody asks: every count is zero, and every slot is there to be taken."""
        said = f"after {done} requests"
        self.hive.wait_ready()
        for worker, model in WORKERS.items():
            self.tell(worker, STEADY if model == "limited" else FAIR)
        self.hive.wait_ready()  # what was dying then is there again
        load.run(self._close_breakers(), REST_S)
        doubles = {worker: self.double(worker) for worker in WORKERS}
        load.must_rest(self.hive, doubles, REST_S, said)
        for name in MODELS:
            load.run(self._fill(name), REST_S)
            load.must_rest(self.hive, doubles, REST_S, f"{said}, and after taking all of {name}")
        assert not (lines := load.uncaught(self.hive)), lines[0]
        load.run(self._fill_quota(), REST_S)
        load.must_rest(self.hive, doubles, REST_S, f"{said}, and after taking all of a quota")

    async def _close_breakers(self) -> None:
        """A worker that failed is asked once after its pause, beside the one that is preferred."""

        async def is_so() -> bool:
            for name in ("lone", "pair"):
                asks = [Ask(self, 0, name, FREE, self.chance) for _ in range(SLOTS)]
                async with asyncio.TaskGroup() as group:
                    for ask in asks:
                        group.create_task(ask.end(whole))
            workers = await asyncio.to_thread(lambda: self.hive.workers)
            return all(worker["breaker"]["state"] == "closed" for worker in workers)

        await load.event(is_so, REST_S, "closed breakers")

    async def _fill(self, name: str) -> None:
        """Every slot and place of a model, exactly; one more is told."""
        model, crowd = MODELS[name], Lines(self, name)
        slots, places = model.slots * model.replicas, model.depth * model.replicas
        try:
            await crowd.stream(slots)
            if name == "limited":  # who waits there does not wait for long
                reply = await crowd.one_more()
                assert load.check_refusal(reply)["reason"] == "queue_timeout"
                return
            await crowd.wait(places)
            reply = await crowd.one_more()
            details = load.check_refusal(reply)
            reason = "queue_full" if places else "slots_busy"
            assert (reply.status, details["reason"]) == (503, reason)
            assert details["resource_info"] == {
                "slots_total": slots,
                "slots_busy": slots,
                "waiting": places,
                "queue_depth": model.depth,
            }
            states = [self.double(worker).state for worker in _workers_of(name)]
            assert [state["running"] for state in states] == [model.slots] * model.replicas
            assert sum(w["in_flight"] for w in self.hive.workers) == slots
            listed = self.hive.ask("GET", "/hive/v1/requests").json["requests"]
            assert len(listed) == slots + places
        finally:
            crowd.leave()

    async def _fill_quota(self) -> None:
        """All that one key may do at once, exactly; another key still may."""
        crowd = Lines(self, "calm", LIMITED)
        try:
            await crowd.stream(SLOTS)
            await crowd.wait(QUOTA - SLOTS)
            reply = await crowd.one_more()
            assert (reply.status, reply.code) == (429, "RATE_LIMITED")
            assert reply.error is not None
            assert reply.error["details"]["current_requests"] == QUOTA
            await crowd.wait(1, FREE)
        finally:
            crowd.leave()

    # ── what was seen ───────────────────────────────────────────────────────────────────────────

    def summary(self) -> str:
        return ", ".join(f"{what} {count}" for what, count in sorted(self.counts.items()))

    def count_retries(self) -> None:
        for outcome in ("success", "exhausted", "deadline"):
            count = self.hive.metric("hive_retries_total", operation="network", outcome=outcome)
            self.counts[f"retried: {outcome}"] = round(count)

    def missing(self) -> set[str]:
        """What should have been among so many."""
        ways = {way.__name__ for way, _, _ in self.ways} | {act.__name__ for act, _, _ in self.acts}
        outcomes = {"answered", "left", *NO_PLACE, *TROUBLE, *SLOW, "RATE_LIMITED"}
        outcomes |= {"REQUEST_TIMEOUT", "REQUEST_CANCELLED", "cut", "ended while queued"}
        outcomes |= {"retried: success", "retried: deadline"}
        return {what for what in ways | outcomes if not self.counts[what]}


def _workers_of(model: str) -> list[str]:
    return [worker for worker, its in WORKERS.items() if its == model]


class Lines:
    """Clients that take slots and places one by one, and keep them."""

    def __init__(self, ends: Ends, model: str, key: str = FREE) -> None:
        self._ends, self._model, self._key = ends, model, key
        self._lines: list[Line] = []
        self._waiting = 0

    async def stream(self, count: int) -> None:
        """So many are being answered."""
        for _ in range(count):
            line = self._line(self._key)
            body = chat_body(self._model, stream=True, max_tokens=ENDLESS)
            async with asyncio.timeout(5):
                reply = await line.begin(CHAT, body)
                assert reply.status == 200, f"{self._model}: {await _rest_of(line, reply)!r}"
                assert await line.until_events(reply, 2)

    async def wait(self, count: int, key: str = "") -> None:
        """So many more wait for a slot."""
        self._waiting += count
        for _ in range(count):
            await self._line(key or self._key).send(CHAT, chat_body(self._model, stream=True))
        metric = self._ends.hive.metric

        async def is_so() -> bool:
            here = await asyncio.to_thread(metric, "hive_waiting", model=self._model)
            return here == self._waiting

        await load.event(is_so, 5, f"{self._waiting} waiting for {self._model}")

    async def one_more(self) -> Reply:
        return await self._line(self._key).ask(CHAT, chat_body(self._model))

    def leave(self) -> None:
        for line in self._lines:
            line.leave()

    def _line(self, key: str) -> Line:
        self._lines.append(Line(self._ends.hive.port, key_of(key)))
        return self._lines[-1]


async def _rest_of(line: Line, reply: Reply) -> bytes:
    while await line.more(reply):
        pass
    return bytes(reply.body)


# ── one request ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class Ask:
    """One request of somebody, before it is known how it ends."""

    ends: Ends
    number: int
    model: str
    key: str
    chance: random.Random
    may_be: set[str] = field(default_factory=set)  # codes that this request is out for
    tokens: int = 0
    is_stream: bool = True

    def __post_init__(self) -> None:
        self.tag = f"r{self.number}"
        self.line = Line(self.ends.hive.port, key_of(self.key))
        self.tokens = self.chance.randint(1, TOKENS)
        self.is_stream = self.chance.random() < 0.6

    async def end(self, way: Callable[["Ask"], Awaitable[None]]) -> None:
        self.ends.counts[way.__name__] += 1
        try:
            async with asyncio.timeout(load.LONGEST_S):
                await way(self)
        except Cut as exc:
            # What goes wrong inside an event is told by a cut; those of "limited" may be large.
            assert self.model not in ("calm", "strict"), f"{self}: {exc!r}"
            self.count("cut")
        except Exception as exc:
            raise AssertionError(f"{way.__name__}, {self}: {exc!r}") from exc
        finally:
            self.line.leave()

    @property
    def body(self) -> dict[str, Any]:
        return chat_body(self.model, self.tag, stream=self.is_stream, max_tokens=self.tokens)

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Request-Id": self.tag} if self.number else {}

    def count(self, what: str) -> None:
        self.ends.counts[what] += 1

    async def operator(self, method: str, path: str) -> Answer:
        return await asyncio.to_thread(self.ends.hive.ask, method, path)

    async def cancel(self) -> int:
        """As its own key may."""
        other = Line(self.ends.hive.port, key_of(self.key))
        try:
            return (await other.ask(f"/hive/v1/requests/{self.tag}", method="DELETE")).status
        finally:
            other.leave()

    def judge(self, reply: Reply, texts: int = 1) -> None:
        """An answer is whole; an error is one of those that this request may meet."""
        told = self._told(reply)
        self.count(told)
        if told == "answered":
            assert reply.texts(texts) == [expected(self.tag, self.tokens)] * texts, self
            return
        allowed = self.may_be | NO_PLACE | MAY_HAPPEN.get(self.model, set())
        allowed |= {"RATE_LIMITED"} if self.key == LIMITED else set()
        assert told in allowed, f"{reply.status} {told}, {self}: {bytes(reply.body[-600:])!r}"

    def _told(self, reply: Reply) -> str:
        """What became of it in a word: a code, the reason of a 503, or the engine's own kind."""
        error = reply.error
        if error is None:
            assert reply.status == 200, (self, reply)
            return "answered"
        if "details" not in error:
            return str(error["type"])
        if error["code"] == "SERVICE_UNAVAILABLE":
            assert reply.is_stream or reply.headers["retry-after"], reply
            return str(error["details"]["reason"])
        return str(error["code"])

    def __str__(self) -> str:
        return f"request {self.number} of {self.key} to {self.model}"


# ── the ways ────────────────────────────────────────────────────────────────────────────────────


async def whole(ask: Ask) -> None:
    ask.judge(await ask.line.ask(CHAT, ask.body, ask.headers))


async def several(ask: Ask) -> None:
    """Which the engine counts as several requests."""
    count = ask.chance.randint(2, 4)
    if ask.chance.random() < 0.5:
        ask.judge(await ask.line.ask(CHAT, {**ask.body, "n": count}, ask.headers), count)
        return
    prompts = [f"tag={ask.tag}"] * count
    body = {"model": ask.model, "prompt": prompts, "max_tokens": ask.tokens}
    body["stream"] = ask.is_stream
    ask.judge(await ask.line.ask("/v1/completions", body, ask.headers), count)


async def refused_by_the_engine(ask: Ask) -> None:
    ask.may_be = {"BadRequestError"}
    ask.tokens = ask.chance.choice((0, 10**6))
    ask.judge(await ask.line.ask(CHAT, ask.body, ask.headers))


async def refused_by_hive(ask: Ask) -> None:
    """Before it came to any slot."""
    bodies: list[tuple[str, Any, dict[str, str]]] = [
        ("VALIDATION_ERROR", b"{", {}),
        ("VALIDATION_ERROR", ask.body, {"X-Hive-Timeout": "soon"}),
        ("VALIDATION_ERROR", ask.body, {"X-Hive-Priority": "urgent"}),
        ("MODEL_NOT_FOUND", chat_body("nobody"), {}),
        ("INVALID_SESSION_ID", ask.body, {"X-Hive-Session": "no id!"}),
        ("REQUEST_TIMEOUT", ask.body, {"X-Request-Deadline": _in_seconds(-5)}),
        ("HTTP_ERROR", ask.body, {"Content-Encoding": "gzip"}),
        ("UNAUTHORIZED", ask.body, {"X-Api-Key": "nobody's"}),
    ]
    code, body, headers = ask.chance.choice(bodies)
    line = Line(ask.ends.hive.port) if code == "UNAUTHORIZED" else ask.line
    ask.may_be = {code}
    try:
        reply = await line.ask(CHAT, body, {**ask.headers, **headers})
        assert reply.code != "answered"
        ask.judge(reply)
    finally:
        line.leave()


async def leaves_before_all_is_sent(ask: Ask) -> None:
    await ask.line.send(CHAT, ask.body, ask.headers, part=ask.chance.uniform(0.2, 0.95))
    await _moment(ask, 0.01)
    _go(ask)


async def leaves_before_the_first_byte(ask: Ask) -> None:
    """Or just after it; at once, or a moment later."""
    ask.tokens = TOKENS
    await ask.line.send(CHAT, ask.body, ask.headers)
    await _moment(ask, ask.chance.choice((0.0, 0.003, 0.03)))
    _go(ask)


async def leaves_in_the_middle(ask: Ask) -> None:
    ask.is_stream, ask.tokens = True, TOKENS
    reply = await ask.line.begin(CHAT, ask.body, ask.headers)
    if reply.status == 200 and await ask.line.until_events(reply, ask.chance.randint(1, 20)):
        _go(ask)
    else:
        await _rest_of(ask.line, reply)
        ask.judge(reply)


async def sends_no_more(ask: Ask) -> None:
    """It closes its half of the connection, which is leaving; at once, or in the middle."""
    ask.is_stream, ask.tokens = True, TOKENS
    began = await ask.line.send(CHAT, ask.body, ask.headers)
    if ask.chance.random() < 0.6:
        with contextlib.suppress(Cut):
            reply = await ask.line.head(began)
            if reply.status == 200:
                await ask.line.until_events(reply, ask.chance.randint(1, 20))
    else:
        await _moment(ask, 0.02)
    with contextlib.suppress(OSError, AssertionError):
        ask.line.half_close()
        await ask.line.until_closed()
    ask.count("left")


async def is_ended_as_soon_as_it_is_seen(ask: Ask) -> None:
    """Where an operator sees it: mostly in the waiting room."""
    ask.tokens = TOKENS
    began = await ask.line.send(CHAT, ask.body, ask.headers)
    answer = asyncio.ensure_future(ask.line.head(began))
    phase = ""
    while not phase and not answer.done():
        listed = (await ask.operator("GET", "/hive/v1/requests")).json["requests"]
        phase = next((one["phase"] for one in listed if one["request_id"] == ask.tag), "")
    if phase:
        ask.count(f"ended while {phase}")
    if ask.chance.random() < 0.5 and phase:
        _go(ask)
        with contextlib.suppress(Cut, asyncio.CancelledError):
            answer.cancel()
            await answer
        return
    if phase:
        assert await ask.cancel() == 204
        ask.may_be = {"REQUEST_CANCELLED"}
    reply = await answer
    await _rest_of(ask.line, reply)
    ask.judge(reply)


async def is_cancelled(ask: Ask) -> None:
    ask.tokens = TOKENS
    ask.may_be = {"REQUEST_CANCELLED"}
    if ask.is_stream and ask.chance.random() < 0.5:
        reply = await ask.line.begin(CHAT, ask.body, ask.headers)
        if reply.status == 200:
            await ask.line.until_events(reply, ask.chance.randint(1, 20))
        assert await ask.cancel() in (204, 404)
    else:
        began = await ask.line.send(CHAT, ask.body, ask.headers)
        await _moment(ask, 0.03)
        assert await ask.cancel() in (204, 404)  # it may not have come yet
        reply = await ask.line.head(began)
    await _rest_of(ask.line, reply)
    ask.judge(reply)


async def has_little_time(ask: Ask) -> None:
    """Less than its answer takes, or barely enough."""
    ask.may_be = {"REQUEST_TIMEOUT"}
    ask.tokens = TOKENS
    seconds = ask.chance.choice((0.001, 0.02, 0.1, 0.2, 0.5, 1.5))
    told = {"X-Hive-Timeout": f"{seconds:g}"}
    if ask.chance.random() < 0.5:
        told = {"X-Request-Deadline": _in_seconds(seconds)}
    ask.judge(await ask.line.ask(CHAT, ask.body, {**ask.headers, **told}))


async def meets_a_fault(ask: Ask) -> None:
    """Alone, if nobody else meets it first; a hang-up alone is tried again, here or elsewhere."""
    worker, fault = ask.chance.choice(_workers_of(ask.model)), ask.chance.choice(ROUGH)
    await asyncio.to_thread(ask.ends.tell, worker, FAIR | fault)
    try:
        ask.judge(await ask.line.ask(CHAT, ask.body, ask.headers))
    finally:
        if "hang_up" not in fault:
            await asyncio.to_thread(ask.ends.tell, worker, FAIR)


async def takes_too_long(ask: Ask) -> None:
    """Longer than a stream may, if nothing else ends it before."""
    ask.is_stream, ask.tokens = True, ENDLESS
    reply = await ask.line.ask(CHAT, ask.body, ask.headers)
    assert ask._told(reply) != "answered"
    ask.judge(reply)


async def reads_nothing(ask: Ask) -> None:
    """While more comes than fits into any buffer: it is taken for one that has left."""
    ask.is_stream, ask.tokens = True, 100
    double = ask.ends.double(f"{ask.model}-0")
    await asyncio.to_thread(double.set, event_bytes=PAD)
    try:
        await ask.line.open(receive_bytes=4096)
        began = await ask.line.send(CHAT, ask.body, ask.headers)
        await ask.line.head(began)
    finally:
        await asyncio.to_thread(double.set, event_bytes=0)

    async def is_forgotten() -> bool:
        listed = (await ask.operator("GET", "/hive/v1/requests")).json["requests"]
        return all(one["request_id"] != ask.tag for one in listed)

    await load.event(is_forgotten, 15, "the end of a client that reads nothing")
    ask.count("left")


async def _moment(ask: Ask, most_s: float) -> None:
    await asyncio.sleep(ask.chance.uniform(0, most_s))


def _go(ask: Ask) -> None:
    ask.line.reset() if ask.chance.random() < 0.5 else ask.line.leave()
    ask.count("left")


def _in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
