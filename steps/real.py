"""One hive with the real vLLM on the CPU, started once and used by every @engine test."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hive.workers import guard
from hive.workers.environment import managed_python
from steps.driver import ROOT, Hive, new_hive, run_hive
from steps.waiting import until

START_S = 180.0
ARGS = [
    "--enforce-eager",
    "--max-model-len=16384",
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
    # A random model writes white space for ever where a JSON grammar lets it.
    '--structured-outputs-config={"backend":"xgrammar","disable_any_whitespace":true}',
]


def tiny_model() -> Path:
    """The random-weight model that `make model` makes; made here if it is not there."""
    path = ROOT / ".demo" / "tiny"
    if not (path / "config.json").exists():
        made = run_hive("model", "make-tiny", str(path), within_s=120)
        assert made.code == 0, made.err
    return path


@pytest.fixture(scope="session")
def real_hive() -> Iterator[Hive]:
    """hive serving model "m" by the real engine; what it leaves at its end fails the session."""
    with really_serving(ARGS, env={"VLLM_ENABLE_RESPONSES_API_STORE": "1"}) as hive:
        yield hive


# Real engines that serve now, and what /dev/shm had before the first of them.
_serving: list[Hive] = []
_shm_before: set[str] = set()


def semaphores() -> set[str]:
    """Names in /dev/shm that nobody maps, which the real engines serving now must have made."""
    return {name for name in os.listdir(guard.SHM) if name.startswith("sem.mp-")} - _shm_before


@contextlib.contextmanager
def really_serving(
    args: list[str],
    *,
    keys: Sequence[dict[str, Any]] = (),
    key: str | None = None,
    windows: dict[str, Any] | None = None,
    **fields: Any,
) -> Iterator[Hive]:
    """hive with the real engine as model "m", from its start to its clean end."""
    if managed_python() is None:
        pytest.skip("no engine environment: run 'hive engine install cpu' (make test does)")
    if not _serving:
        _shm_before.clear()
        _shm_before.update(os.listdir(guard.SHM))
    with new_hive() as hive:
        hive.keys, hive.key = list(keys), key
        hive.sections["server"] = {"drain_s": 5}
        if windows is not None:
            hive.sections["windows"] = windows
            fields["windows"] = True
        # No test is about how fast this machine is.
        hive.sections["timeouts"] = {"load_s": 170, "request_s": 130, "inference_s": 120}
        hive.sections["restarts"] = {"backoff_s": 0.1, "backoff_max_s": 1, "starts": 20}
        # --enforce-eager leaves some of vLLM's own to the compiler (log probabilities, half a minute).
        env = {"TORCHDYNAMO_DISABLE": "1", **fields.pop("env", {})}
        hive.model("m", engine="vllm", path=str(tiny_model()), args=args, env=env, **fields)
        _serving.append(hive)
        hive.start(is_shared=True, within_s=START_S)
        yield hive
        hive.stop()
        _serving.remove(hive)
        if _serving:
            return  # whose a semaphore is cannot be told: the last one looks
        left = []

        def is_clean() -> bool:
            nonlocal left
            left = [
                name
                for name in set(os.listdir(guard.SHM)) - _shm_before
                if name.startswith(("psm_", "sem."))
            ]
            return not left

        assert until(is_clean, 5), f"the real engine left shared memory: {left}"
