"""Who generates and who waits, token by token, and the gauges that vLLM publishes about it."""

import asyncio
import math
import time
from collections import Counter, deque
from typing import Protocol

from tests.doubles.engine.knobs import Knobs


class Sink(Protocol):
    """Where a generation's tokens go."""

    def tokens(self, first: int, end: int) -> bool:
        """Take the tokens first … end - 1; false: come again when `Generation.resume` is called."""

    def finished(self) -> None: ...

    def must_die(self) -> None:
        """It has as many tokens as `--die-after` says."""


class Generation:
    """One request's sequences, advancing together."""

    def __init__(
        self,
        scheduler: "Scheduler",
        sink: Sink,
        faults: Knobs,
        *,
        prompt_tokens: int,
        target: int,
        parts: int,
        reason: str,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.target = target  # tokens, of each part
        self.parts = parts  # choices x prompts: what vLLM counts as requests
        self.generated = 0
        self.faults = faults
        self.started: float | None = None
        self.is_over = False
        self._scheduler = scheduler
        self._sink = sink
        self._reason = reason
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._may_write = True

    def start(self) -> None:
        self.started = time.monotonic()
        if self.faults.die_after == 0:
            self._sink.must_die()
            return
        loop, wait_s = self._scheduler.loop, self._scheduler.knobs.first_token_s
        self._due = loop.time() + wait_s
        self._timer = loop.call_at(self._due, self._step) if wait_s else loop.call_soon(self._step)

    @property
    def kv_tokens(self) -> float:
        """Tokens in the KV cache; they grow in the prefill, which makes no other progress."""
        if self.started is None:
            return 0.0
        if self.generated:
            return self.prompt_tokens + self.generated * self.parts
        if self._hangs():
            return 0.0
        prefill_s = self._scheduler.knobs.first_token_s
        done = min(1.0, (time.monotonic() - self.started) / prefill_s) if prefill_s else 1.0
        return self.prompt_tokens * done

    def resume(self) -> None:
        """The client reads again, or a knob was turned: go on if something had stopped it."""
        self._may_write = True
        if self._timer is None and self.started is not None and not self.is_over:
            self._due = self._scheduler.loop.time()
            self._timer = self._scheduler.loop.call_soon(self._step)

    def abort(self) -> None:
        """The client left. vLLM acts on it after its current step; `--abort-s` is that step."""
        if self.is_over:
            return
        self._stop()
        wait_s = self._scheduler.knobs.abort_s
        if self.started is None or wait_s == 0:
            self._scheduler.leave(self, "abort")
        elif not math.isinf(wait_s):
            self._scheduler.loop.call_later(wait_s, self._scheduler.leave, self, "abort")

    def fail(self) -> None:
        self._stop()
        self._scheduler.leave(self, "error")

    def _stop(self) -> None:
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hangs(self) -> bool:
        stop = self.faults.stop_after
        return self.faults.silent or (stop is not None and self.generated >= stop)

    def _step(self) -> None:
        self._timer = None
        if self._hangs() or not self._may_write:
            return
        knobs, faults, before = self._scheduler.knobs, self.faults, self.generated
        end = min(self.target, before + (1 if knobs.token_s else max(knobs.burst, 1)))
        if faults.die_after is not None:
            end = max(min(end, faults.die_after), before)
        if faults.stop_after is not None:
            end = min(end, faults.stop_after)
        self.generated = end
        self._scheduler.generation_tokens += (end - before) * self.parts
        # The last token's event says why it was the last one: it is written with the end.
        self._may_write = self._sink.tokens(before, min(end, self.target - 1))
        if faults.die_after is not None and end >= faults.die_after:
            self._sink.must_die()
        elif end == self.target:
            self._stop()
            self._scheduler.leave(self, self._reason)
            self._sink.finished()
        elif knobs.token_s:
            # A fixed pace; but no burst to catch up after a pause.
            self._due = max(self._due + knobs.token_s, self._scheduler.loop.time())
            self._timer = self._scheduler.loop.call_at(self._due, self._step)
        else:
            self._timer = self._scheduler.loop.call_soon(self._step)


class Scheduler:
    """First come, first served, up to `--max-running` sequences."""

    def __init__(self, knobs: Knobs, loop: asyncio.AbstractEventLoop) -> None:
        self.knobs = knobs
        self.loop = loop
        self.running: dict[Generation, None] = {}  # in order of arrival
        self.waiting: deque[Generation] = deque()
        self.held: dict[Generation, None] = {}  # until it is known what of them is cached
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Scheduler {self.running_parts} running {self.waiting_parts} waiting>"

    @property
    def running_parts(self) -> int:
        return sum(g.parts for g in self.running)

    @property
    def waiting_parts(self) -> int:
        return sum(g.parts for g in (*self.held, *self.waiting))

    def hold(self, generation: Generation) -> None:
        self.held[generation] = None

    def submit(self, generation: Generation) -> None:
        self.held.pop(generation, None)
        self.waiting.append(generation)
        self._admit()

    def leave(self, generation: Generation, reason: str) -> None:
        if generation in self.running:
            del self.running[generation]
        elif generation in self.waiting:
            self.waiting.remove(generation)
        elif generation in self.held:
            del self.held[generation]
        else:
            return
        self.finished[reason] += generation.parts
        self._admit()

    def poke(self) -> None:
        """A knob was turned."""
        for generation in list(self.running):
            generation.resume()
        self._admit()

    def everyone(self) -> list[Generation]:
        return [*self.running, *self.held, *self.waiting]

    def _admit(self) -> None:
        while self.waiting:
            # More parts than seats are let in alone: vLLM would run them in turns.
            free = self.knobs.max_running - self.running_parts
            if self.running and free < self.waiting[0].parts:
                return
            generation = self.waiting.popleft()
            self.running[generation] = None
            self.prompt_tokens += generation.prompt_tokens
            generation.start()

    def metrics(self) -> str:
        labels = f'engine="0",model_name="{self.knobs.model or "double"}"'
        usage = sum(g.kv_tokens for g in self.running) / max(self.knobs.kv_tokens, 1)
        lines: list[str] = []

        def family(name: str, kind: str, meaning: str, values: dict[str, float]) -> None:
            lines.extend((f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{{{labels}{more}}} {value}" for more, value in values.items())

        family(
            "vllm:num_requests_running",
            "gauge",
            "Number of requests in model execution batches.",
            {"": float(self.running_parts)},
        )
        family(
            "vllm:num_requests_waiting",
            "gauge",
            "Number of requests waiting to be processed.",
            {"": float(self.waiting_parts)},
        )
        family(
            "vllm:kv_cache_usage_perc",
            "gauge",
            "KV-cache usage. 1 means 100 percent usage.",
            {"": min(usage, 1.0)},
        )
        family(
            "vllm:prompt_tokens_total",
            "counter",
            "Number of prefill tokens processed.",
            {"": float(self.prompt_tokens)},
        )
        family(
            "vllm:generation_tokens_total",
            "counter",
            "Number of generation tokens processed.",
            {"": float(self.generation_tokens)},
        )
        family(
            "vllm:request_success_total",
            "counter",
            "Count of successfully processed requests.",
            {
                f',finished_reason="{reason}"': float(self.finished[reason])
                for reason in ("stop", "length", "abort", "error")
            },
        )
        return "\n".join(lines) + "\n"
