"""The main job, end to end: a real vLLM on the CPU, an OpenAI client, a streamed answer.

Run by `make demo`; needs DIR/tiny (`hive model make-tiny`) and the managed engine environment.
Ends with the proof that nothing was left running.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI

from hive.workers import guard

CONFIG = """\
[server]
port = 0                      # the kernel chooses; hive logs it
state_dir = "{work}/state"
runtime_dir = "{work}/run"

[models.tiny]
engine = "vllm"
path = "{model}"
device = "cpu"                # chosen explicitly: hive never falls back to it
args = ["--enforce-eager", "--max-model-len", "4096"]
"""
READY_S = 300


def main(home: Path) -> int:
    guard.become_subreaper()  # so that anything left behind would come to us, and be seen
    shm_before = set(os.listdir(guard.SHM))
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as work:
        config = Path(work, "hive.toml")
        config.write_text(CONFIG.format(work=work, model=home / "tiny"))
        log = Path(work, "hive.log")
        with log.open("wb") as out:
            command = [sys.executable, "-m", "hive", "serve", "--config", str(config)]
            daemon = subprocess.Popen(command, stderr=out)
        try:
            url = wait_until_ready(daemon, log)
            chat(url)
            print(f"\n-- the engine's processes under hive (pid {daemon.pid}):")
            for process in guard.descendants(daemon.pid):
                print(f"   {process.pid:>7} {process.name}")
        finally:
            daemon.send_signal(signal.SIGTERM)
            code = daemon.wait(60)
        return prove(code, shm_before, Path(work))


def wait_until_ready(daemon: subprocess.Popen[bytes], log: Path) -> str:
    """hive's address once the worker is READY; its log tells both."""
    print("-- hive serve: starting a real vLLM on the CPU (half a minute) ", end="", flush=True)
    url = None
    began = time.monotonic()
    while time.monotonic() - began < READY_S:
        if daemon.poll() is not None:
            break
        text = log.read_text()
        if url is None and '"listening"' in text:
            url = text.partition('"detail": "')[2].partition('"')[0]
        if url and '"new": "READY"' in text:
            print(f" ready after {time.monotonic() - began:.0f} s")
            return url
        if '"new": "FAILED"' in text:
            break
        print(".", end="", flush=True)
        time.sleep(1)
    raise SystemExit(f"\nthe engine did not become ready; hive said:\n{log.read_text()}")


def chat(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none-needed-on-loopback")
    print(f"-- {url} serves: {', '.join(m.id for m in client.models.list())}")
    print("-- a streamed answer (random weights: the words mean nothing):\n   ", end="")
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Say something."}],
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = None
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            print(event.choices[0].delta.content.replace("\n", " "), end="", flush=True)
        usage = event.usage or usage
    assert usage is not None
    assert usage.completion_tokens > 0
    print(f"\n-- tokens: {usage.prompt_tokens} in the prompt, {usage.completion_tokens} generated")


def prove(code: int, shm_before: set[str], work: Path) -> int:
    """Nothing may be left: processes, sockets, temporary files, shared memory."""
    processes = guard.descendants(os.getpid())
    sockets = [s for s in Path("/proc/net/unix").read_text().splitlines() if str(work) in s]
    directories = list((work / "run" / "w").iterdir())
    shm = [n for n in set(os.listdir(guard.SHM)) - shm_before if n.startswith(("psm_", "sem."))]
    print(f"-- hive stopped with exit status {code}; left behind:")
    for what, left in (
        ("processes", processes),
        ("sockets", sockets),
        ("temporary directories", directories),
        ("shared memory", shm),
    ):
        print(f"   {what}: {len(left)} {left or ''}")
    clean = code == 0 and not (processes or sockets or directories or shm)
    print("-- nothing was left running" if clean else "-- SOMETHING WAS LEFT")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
