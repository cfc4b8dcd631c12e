"""The torch engine on the CPU: what of it can be shown without a GPU."""

import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive.workers import guard
from hive.workers.diagnosis import Cause, classify
from hive.workers.environment import managed_python
from tests.patience import short_directory, wait_until

PROGRAM = Path(__file__).with_name("torch_engine.py")
START_S = 60.0


def torch_python() -> str:
    """An interpreter with torch, of whatever build."""
    here = sys.executable if importlib.util.find_spec("torch") else None
    found = here or managed_python() or os.environ.get("HIVE_GPU_PYTHON")
    if not found:
        pytest.skip("no interpreter with torch: 'hive engine install cpu' installs one")
    return str(found)


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.fixture
def engine(home: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """It serves on home/s, and a child of it holds a little memory."""
    flags = ["--uds", str(home / "s"), "--device", "cpu", "--hold-gib", "0.01", "--child"]
    with (home / "err").open("wb") as err:
        process = subprocess.Popen([torch_python(), "-P", PROGRAM, *flags], stderr=err)
    try:
        wait_until(lambda: process.poll() is not None or answers(home), "it to serve", START_S)
        assert process.poll() is None, (home / "err").read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def answers(home: Path) -> bool:
    try:
        return ask(home, "GET", "/health")[0] == 200
    except OSError:
        return False


def ask(home: Path, method: str, path: str, **body: Any) -> tuple[int, Any]:
    status, content = ask_raw(home, method, path, **body)
    return status, json.loads(content)


def ask_raw(home: Path, method: str, path: str, **body: Any) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("engine", timeout=START_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(str(home / "s"))
        connection.request(method, path, json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_it_serves_and_dies_of_what_torch_raises_and_its_child_lives_on(
    home: Path, engine: "subprocess.Popen[bytes]"
) -> None:
    status, completion = ask(home, "POST", "/v1/completions", model="m", max_tokens=1)
    assert status == 200
    assert (completion["model"], completion["choices"][0]["text"]) == ("m", " 256")

    status, streamed = ask_raw(home, "POST", "/v1/chat/completions", stream=True, max_tokens=3)
    *tokens, end, rest = streamed.decode().split("\n\n")
    said = [json.loads(token.removeprefix("data: "))["choices"][0]["delta"] for token in tokens]
    assert [delta["content"] for delta in said] == [" 256"] * 3
    assert (status, end, rest) == (200, "data: [DONE]", "")

    assert ask(home, "POST", "/v1/hog", gib=0.01) == (200, {})
    status, refusal = ask(home, "POST", "/oom")
    assert (status, "memory of the whole host" in refusal["error"]["message"]) == (400, True)
    status, device = ask(home, "POST", "/v1/device")
    assert (status, device["device"], device["uuids"]) == (200, "cpu", [])
    child = guard.look_at(device["child"])
    assert child
    assert os.getsid(child.pid) == child.pid

    with pytest.raises(http.client.RemoteDisconnected):
        ask(home, "POST", "/v1/fault", kind="simulated_oom")
    assert engine.wait(START_S) == 1
    lines = (home / "err").read_text().splitlines()
    assert [line for line in lines if line.startswith("raised at ")]
    found = classify(lines)
    assert found
    assert found.cause is Cause.OUT_OF_MEMORY

    orphan = guard.look_at(child.pid)
    assert orphan
    assert (orphan.start, orphan.state) == (child.start, "S")
    os.kill(child.pid, signal.SIGKILL)  # the leak gate sees to it that it is gone


def test_one_that_only_holds_says_so_and_serves_nothing() -> None:
    flags = ["--hold-only", "--hold-gib", "0.01", "--device", "cpu"]
    process = subprocess.Popen([torch_python(), "-P", PROGRAM, *flags], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        assert process.stdout.readline() == b"holding\n"
        process.terminate()
        assert process.wait(START_S) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_it_must_be_told_where_to_listen() -> None:
    done = subprocess.run(
        [torch_python(), "-P", PROGRAM, "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=START_S,
        check=False,
    )

    assert done.returncode == 2
    assert "--uds or --hold-only is needed" in done.stderr


def test_without_being_told_it_does_not_compute_on_the_cpu(home: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [torch_python(), "-P", PROGRAM, "--uds", home / "s"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=START_S,
        check=False,
    )

    assert done.returncode == 1
    found = classify(done.stderr.splitlines())
    # A CPU build says that it was not compiled with CUDA, which is no device's fault.
    assert "not compiled with CUDA" in done.stderr or (found and found.cause is Cause.NO_DEVICE)
