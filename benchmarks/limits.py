"""Refusals, cancellations, timeouts and scrapes: how soon a client knows, and a slot is free.

A refusal, and a scrape, for which each engine is asked for its own metrics, are compared with
/livez, hive's smallest answer, on the same connection settings. From a client's leaving to a free
slot is compared with when the engine itself, asked on its own control socket, no longer runs the
request. A timeout's overshoot is what the client waits beyond the limit.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from steps.driver import Answer, Hive, chat_body
from steps.waiting import must

RUNS = 100
APART_S = 0.3  # between two cancellations: one alone; hive samples an engine ten times a second
LIMIT_S = 0.2
CHAT = "/v1/chat/completions"
ENDLESS = ("--token-s", "0.02", "--tokens", "100000")


@contextmanager
def serving() -> Iterator[Hive]:
    """A hive with three models on the double: one full, one free, one that never answers."""
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as home:
        hive = Hive(Path(home))
        hive.model("full", *ENDLESS, max_concurrent=1, queue_depth=0)
        hive.model("free", *ENDLESS, max_concurrent=1, queue_depth=0)
        hive.model("silent", "--stop-after", "0", "--good-requests", "1")
        hive.start()
        try:
            yield hive
        finally:
            hive.stop()


def timed(ask: Callable[[], Answer], status: int) -> list[float]:
    """Milliseconds of each of RUNS answers, which all have this status."""
    took = []
    for _ in range(RUNS):
        answer = ask()
        assert answer.status == status, answer.body
        took.append(answer.seconds * 1000)
    return took


def cancelled(hive: Hive) -> tuple[list[float], list[float]]:
    """Milliseconds from a client's leaving to the engine's end of it, and to the free slot."""
    ended, freed = [], []
    double = hive.double("free")
    for _ in range(RUNS):
        stream = hive.stream(CHAT, chat_body("free", stream=True))
        stream.wait_for_events(2)
        left_at = time.monotonic()
        stream.leave()
        must(lambda: not double.state["running"], 5, "the engine's end of it")
        ended.append((time.monotonic() - left_at) * 1000)
        must(lambda: hive.metric("hive_in_flight", model="free") == 0, 5, "a free slot")
        freed.append((time.monotonic() - left_at) * 1000)
        time.sleep(APART_S)
    return ended, freed


def show(what: str, took: list[float], beside: list[float] | None = None) -> None:
    ranked = sorted(took)
    p99 = ranked[min(len(ranked) - 1, round(0.99 * len(ranked)))]
    ratio = ""
    if beside is not None:
        ratio = f"   ratio {statistics.median(took) / statistics.median(beside):.2f}"
    print(f"{what:<44}{statistics.median(took):8.1f}{p99:8.1f}{ranked[-1]:8.1f} ms{ratio}")


def main() -> None:
    print(f"{'':<44}{'median':>8}{'p99':>8}{'max':>8}")
    with serving() as hive:
        holder = hive.stream(CHAT, chat_body("full", stream=True))
        holder.wait_for_events(2)
        floor = timed(lambda: hive.ask("GET", "/livez"), 200)
        show("/livez", floor)
        scraped = timed(lambda: hive.ask("GET", "/metrics"), 200)
        show("/metrics, with three engines' own", scraped, floor)
        show("a refusal", timed(lambda: hive.ask("POST", CHAT, chat_body("full")), 503), floor)
        holder.leave()
        ended, freed = cancelled(hive)
        show("a client leaves: the engine has ended it", ended)
        show("a client leaves: its slot is free", freed, ended)
        headers = {"X-Hive-Timeout": str(LIMIT_S)}
        late = timed(lambda: hive.ask("POST", CHAT, chat_body("silent"), headers), 504)
        show(f"beyond a limit of {LIMIT_S:g} s", [ms - 1000 * LIMIT_S for ms in late], floor)


if __name__ == "__main__":
    main()
