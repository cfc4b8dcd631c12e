"""`make bench-gateway`: what hive's relay costs, beside proxies and gateways, in one run.

CPU time is of the contestant's process tree, from /proc, in microseconds. The contestant is pinned
to core 0; clients and stub engine share core 1. Rounds are interleaved: each goes through all
contestants. Printed are the median of the rounds and, behind it, the least and the most.
"""

import argparse
import contextlib
import functools
import os
import statistics
import time
from collections.abc import Awaitable, Callable

import uvloop

from benchmarks.gateway import load
from benchmarks.gateway.contestants import OURS, Contestant, available

Figures = dict[str, dict[str, list[float]]]  # of each row, of each contestant
PLAIN_CLIENTS, PLAIN_S = 16, 3.0
REFUSED_CLIENTS, REFUSED_S = 4, 2.0
PACES = ((32, 100), (64, 200), (64, 800))  # streams, events a second in each
PACED_S = 3
FIRSTS = 200
OPEN = 1000


async def cpu_of(who: Contestant, work: Callable[[], Awaitable[int]]) -> tuple[float, float, int]:
    """CPU seconds, wall seconds, and what was counted."""
    before, began = who.cpu_s(), time.perf_counter()
    count = await work()
    return who.cpu_s() - before, time.perf_counter() - began, count


async def measure(who: Contestant, model: str) -> dict[str, float]:
    """One round of one contestant: a figure for each row of the table."""
    rows: dict[str, float] = {}
    plain = load.request_of(load.CHAT, load.body_of(model))
    cpu, wall, count = await cpu_of(
        who,
        lambda: load.answers(
            who.address, plain, clients=PLAIN_CLIENTS, seconds=PLAIN_S, status=200
        ),
    )
    rows["plain request, µs"] = cpu / count * 1e6
    rows["plain requests a second"] = count / wall
    for streams, rate in PACES:
        cpu, _, count = await cpu_of(
            who,
            functools.partial(
                load.streams, who.address, model, count=streams, rate=rate, events=rate * PACED_S
            ),
        )
        rows[f"streamed event, {streams} x {rate}/s, µs"] = cpu / count * 1e6
    took = await load.first_event_s(who.address, model, times=FIRSTS)
    rows["first event, p50, µs"] = statistics.median(took) * 1e6
    if who.refusal is not None:
        cpu, _, count = await refusals(who)
        rows["refusal, µs"] = cpu / count * 1e6
    return rows


async def refusals(who: Contestant) -> tuple[float, float, int]:
    """Of a proxy by a rule on its path; hive's own are decided: its model's one slot is taken."""
    assert who.refusal is not None
    holder = load.Held()
    request = load.request_of(who.refusal, load.body_of("m"))
    if not who.refusal.startswith("/"):
        await holder.open(who.address, who.refusal, 1)
        request = load.request_of(load.CHAT, load.body_of(who.refusal))
    try:
        return await cpu_of(
            who,
            lambda: load.answers(
                who.address, request, clients=REFUSED_CLIENTS, seconds=REFUSED_S, status=503
            ),
        )
    finally:
        holder.close()


async def once(who: Contestant, model: str, rows: dict[str, float]) -> None:
    """What one look is enough for: memory, and whether a client's leaving is noticed."""
    for what, fields in load.SITUATIONS.items():
        for reset in (False, True):
            seen: list[float] = []
            for _ in range(5):
                at = await load.left_at(who.address, who.engine, model, fields, reset=reset)
                seen.append(float("inf") if at is None else at * 1000)
            how = "RST" if reset else "FIN"
            rows[f"leaves {what}, {how}, ms"] = statistics.median(seen)
    if who.pids:
        rows["RSS, MB"] = who.rss_mb()
        held = load.Held()
        await held.open(who.address, model, OPEN)
        rows[f"RSS more with {OPEN} open streams, MB"] = who.rss_mb() - rows["RSS, MB"]
        held.close()


async def looked_at_once(who: Contestant) -> dict[str, float]:
    rows: dict[str, float] = {}
    try:
        await once(who, "m", rows)
    except AssertionError as exc:
        print(f"{who.name}: {exc}")
    return rows


def show(figures: Figures, names: list[str]) -> None:
    print(f"{'':<44}" + "".join(f"{name:>26}" for name in names))
    for row, of in figures.items():
        cells = []
        for name in names:
            values = of.get(name)
            if not values:
                cells.append("-")
                continue
            digits = 0 if statistics.median(values) >= 1000 else 1
            text = f"{statistics.median(values):.{digits}f}".replace("inf", "never")
            if len(values) > 1:
                text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            cells.append(text)
        print(f"{row:<44}" + "".join(f"{cell:>26}" for cell in cells))


def started(stack: contextlib.ExitStack, wanted: list[str] | None) -> list[Contestant]:
    """Those that are installed and wanted, each in front of its engine."""
    there: list[Contestant] = []
    for name, start in available().items():
        if wanted and name not in wanted:
            continue
        if start is None:
            print(f"{name} is not installed: 'make bench-tools' installs it")
            continue
        try:
            there.append(stack.enter_context(start()))
        except AssertionError as exc:
            print(f"{name} is left out: {exc}")
    return there


async def run(rounds: int, wanted: list[str] | None) -> None:
    figures: Figures = {}
    with contextlib.ExitStack() as stack:
        there = started(stack, wanted)
        for number in range(rounds):
            for who in there:
                for row, value in (await measure(who, "m")).items():
                    figures.setdefault(row, {}).setdefault(who.name, []).append(value)
                print(f"round {number + 1} of {rounds}: {who.name}", flush=True)
        for who in there:
            for row, value in (await looked_at_once(who)).items():
                figures.setdefault(row, {}).setdefault(who.name, []).append(value)
        names = [who.name for who in there]
    if "direct" in names:
        first = figures["first event, p50, µs"]
        figures["first event, added, µs"] = {
            name: [value - statistics.median(first["direct"]) for value in values]
            for name, values in first.items()
        }
    print()
    show(figures, names)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("only", nargs="*", help="contestants; all without")
    args = parser.parse_args()
    os.sched_setaffinity(0, {OURS})
    uvloop.run(run(args.rounds, args.only))


if __name__ == "__main__":
    main()
