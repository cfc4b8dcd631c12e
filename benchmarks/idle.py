"""Idle memory of hive's own process with one model, beside a bare aiohttp (aim: at most 75 MB)."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.doubles import engine_command

SETTLE_S = 5.0  # idle this long before it is measured
ANSWERS = 200  # requests before the second measurement
BARE = (
    "import asyncio, uvloop\nfrom aiohttp import web\n"
    "async def main():\n"
    "    runner = web.AppRunner(web.Application())\n"
    "    await runner.setup()\n"
    "    await web.TCPSite(runner, '127.0.0.1', 0).start()\n"
    "    print('up', flush=True)\n"
    "    await asyncio.sleep(3600)\n"
    "uvloop.run(main())"
)


def rss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) / 1024


@contextlib.contextmanager
def hive_with_one_model() -> Iterator[tuple[int, str]]:
    """A daemon whose one model is the engine double: its pid and address."""
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as home:
        command = engine_command("--uds", "{socket}", "--model", "{model}")
        config = Path(home, "hive.toml")
        config.write_text(
            f'[server]\nport = 0\nstate_dir = "{home}/s"\nruntime_dir = "{home}/r"\n'
            f'[models.m]\nengine = "command"\ndevice = "cpu"\ncommand = {json.dumps(command)}\n'
        )
        log = Path(home, "log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "hive", "serve", "--config", str(config)], stderr=out
            )
        try:
            deadline = time.monotonic() + 30
            while '"new": "READY"' not in (text := log.read_text()):
                assert time.monotonic() < deadline, text
                assert process.poll() is None, text
                time.sleep(0.05)
            yield process.pid, text.partition('"detail": "')[2].partition('"')[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def main() -> None:
    bare = subprocess.Popen([sys.executable, "-c", BARE], stdout=subprocess.PIPE)
    try:
        assert bare.stdout is not None
        bare.stdout.readline()
        with hive_with_one_model() as (pid, url):
            time.sleep(SETTLE_S)
            idle, floor = rss_mb(pid), rss_mb(bare.pid)
            for _ in range(ANSWERS):
                body = json.dumps({"model": "m", "prompt": "a", "max_tokens": 8}).encode()
                with urllib.request.urlopen(f"{url}/v1/completions", body) as answer:
                    answer.read()
            used = rss_mb(pid)
    finally:
        bare.kill()
        bare.communicate()
    print(f"{'bare aiohttp on uvloop':<34}{floor:7.1f} MB RSS")
    print(f"{'hive serve, one model, idle':<34}{idle:7.1f} MB RSS   ratio {idle / floor:.2f}")
    print(f"{f'  … after {ANSWERS} requests':<34}{used:7.1f} MB RSS   ratio {used / floor:.2f}")


if __name__ == "__main__":
    main()
