"""Freeze and thaw on the real engine (CPU, tiny model), beside what they are made of; the catalogue.

Every figure stands beside another one of the same run: a freeze beside a plain checksum of the same bytes, a
thawed session's first token beside the same prompt computed anew, an operation among 10,000 windows beside
the same among 100.
"""

import asyncio
import contextlib
import http.client
import json
import socket
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import blake3

from hive.storage.catalogue import Catalogue, Window, opened
from hive.workers.environment import managed_python
from steps.driver import Hive
from steps.real import START_S, tiny_model

CHUNK = 32
SIZES = (1_000, 4_000, 8_000)  # tokens, about
REPETITIONS = 3
WINDOWS = (100, 1_000, 10_000)
ARGS = ["--enforce-eager", "--max-model-len=16384", f"--block-size={CHUNK}"]
TOKENS_A_WORD = 4  # of the tiny model's tokenizer, for these words


@contextlib.contextmanager
def serving() -> Iterator[Hive]:
    home = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    hive = Hive(home)
    hive.sections["windows"] = {"kv_chunk_tokens": CHUNK, "kv_tier_gib": 4, "kv_ram_gib": 1}
    hive.sections["timeouts"] = {"load_s": 170, "request_s": 130, "inference_s": 120}
    env = {"VLLM_SERVER_DEV_MODE": "1"}  # for `forget`
    hive.model("m", engine="vllm", path=str(tiny_model()), args=ARGS, env=env, windows=True)
    try:
        hive.start(within_s=START_S)
        yield hive
    finally:
        hive.stop()


def forget(hive: Hive) -> None:
    """The engine's own memory of prompts goes; LMCache's files stay."""
    (path,) = (hive.runtime / "w").glob("*/s")
    connection = http.client.HTTPConnection("engine", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(str(path))
        connection.request("POST", "/reset_prefix_cache")
        assert connection.getresponse().status == 200
    finally:
        connection.close()


def words(count: int, seed: int) -> str:
    return " ".join(f"{(seed * 7919 + n * 104729) % 10_000:04d}" for n in range(count))


def first_token_s(hive: Hive, body: dict[str, Any], session: str | None) -> float:
    """Seconds until the first event of a stream."""
    headers = {"Content-Type": "application/json"}
    if session:
        headers["X-Hive-Session"] = session
    data = json.dumps({**body, "stream": True}).encode()
    request = urllib.request.Request(f"{hive.url}/v1/chat/completions", data, headers)
    began = time.monotonic()
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.readline()
        seconds = time.monotonic() - began
        answer.read()
    return seconds


def one(hive: Hive, size: int, number: int) -> dict[str, float]:
    """One conversation: answered, frozen, forgotten by the engine, thawed, gone on with."""
    said = [{"role": "user", "content": words(size // TOKENS_A_WORD, number)}]
    body = {"model": "m", "messages": said, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    session = hive.ask("POST", "/hive/v1/sessions", {"model": "m"}).json["id"]
    answer = hive.ask(
        "POST", "/v1/chat/completions", body, {"X-Hive-Session": session}, timeout_s=120
    )
    assert answer.status == 200, answer.body
    name = f"w{size}-{number}"
    frozen = hive.ask("POST", "/hive/v1/windows", {"session_id": session, "name": name})
    assert frozen.status == 201, frozen.body
    folder = max((hive.state / "windows").iterdir(), key=lambda path: path.stat().st_ctime)
    began = time.monotonic()
    for block in folder.iterdir():
        blake3.blake3(block.read_bytes()).digest()
    plain_s = time.monotonic() - began
    thawed = hive.ask("POST", f"/hive/v1/windows/{name}/thaw", {})
    assert thawed.status == 200, thawed.body
    told = thawed.json
    messages = [*told["messages"], {"role": "user", "content": "go on"}]
    forget(hive)
    asked = {**body, "messages": messages}
    return {
        "tokens": frozen.json["tokens"],
        "mb": frozen.json["bytes"] / 1e6,
        "freeze_s": frozen.seconds,
        "checksum_s": plain_s,
        "thaw_s": thawed.seconds,
        "first_s": first_token_s(hive, asked, told["session_id"]),
        # Under a salt of its own nothing of it is cached.
        "recompute_s": first_token_s(hive, {**asked, "cache_salt": f"other{number}"}, None),
    }


def engine_part() -> None:
    if managed_python() is None:
        print("left out: no engine environment ('hive engine install cpu')")
        return
    samples: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    with serving() as hive:
        one(hive, SIZES[0], 0)  # what is used for the first time is compiled then
        for number in range(1, REPETITIONS + 1):
            for size in SIZES:
                samples[size].append(one(hive, size, number * 100 + size % 97))
    print(
        f"medians of {REPETITIONS}, ms; before the first token the engine's own cache was cleared"
    )
    print(
        f"{'tokens':>8}{'MB':>7}{'freeze':>9}{'checksum':>10}{'ratio':>7}{'thaw':>8}"
        f"{'1st token':>11}{'recompute':>11}{'ratio':>7}"
    )
    for found in samples.values():
        middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
        print(
            f"{middle['tokens']:8.0f}{middle['mb']:7.1f}{1000 * middle['freeze_s']:9.0f}"
            f"{1000 * middle['checksum_s']:10.1f}{middle['freeze_s'] / middle['checksum_s']:7.1f}"
            f"{1000 * middle['thaw_s']:8.0f}{1000 * middle['first_s']:11.0f}"
            f"{1000 * middle['recompute_s']:11.0f}{middle['recompute_s'] / middle['first_s']:7.1f}"
        )


# ── the catalogue ───────────────────────────────────────────────────────────────────────────────


def row(number: int) -> Window:
    return Window(
        id=f"{number:032x}",
        owner=f"key{number % 10}",
        name=f"window-{number}",
        session_id=f"s{number}",
        model="m",
        salt="x" * 22,
        created_at=float(number),
        tokens=1000 + number,
        blocks=31,
        bytes=2_000_000,
        tags=("one",),
    )


async def timed(work: Callable[[], Awaitable[object]], times: int = 20) -> float:
    """Milliseconds, the median."""
    found = []
    for _ in range(times):
        began = time.monotonic()
        await work()
        found.append(1000 * (time.monotonic() - began))
    return statistics.median(found)


async def at_size(catalogue: Catalogue, count: int, filled: int) -> dict[str, float]:
    for number in range(filled, count):
        await catalogue.add_window(row(number))
    extra = iter(range(10**6, 10**7))

    async def add_and_remove() -> None:
        new = replace(row(next(extra)), name=f"extra-{count}")
        await catalogue.begin_window(new)
        await catalogue.remove_window(new.id)

    return {
        "find": await timed(lambda: catalogue.named(f"window-{count // 2}", None)),
        "page of 100": await timed(lambda: catalogue.windows("key3", most=100)),
        "usage": await timed(lambda: catalogue.usage("key3")),
        "counts": await timed(catalogue.counts),
        "add + remove": await timed(add_and_remove),
    }


async def catalogue_part() -> None:
    with tempfile.TemporaryDirectory(prefix="hv") as home:
        async with opened(Path(home)) as catalogue:
            found, filled = {}, 0
            for count in WINDOWS:
                found[count] = await at_size(catalogue, count, filled)
                filled = count
    print(
        f"\n{'catalogue, ms (median of 20)':<30}"
        + "".join(f"{n:>10,}" for n in WINDOWS)
        + "   ratio"
    )
    for operation in found[WINDOWS[0]]:
        values = [found[count][operation] for count in WINDOWS]
        print(
            f"{operation:<30}"
            + "".join(f"{v:10.2f}" for v in values)
            + f"{values[-1] / values[0]:8.1f}"
        )


def main() -> None:
    engine_part()
    asyncio.run(catalogue_part())


if __name__ == "__main__":
    main()
