"""`hive serve` as a process: what it does not import, and how it takes signals."""

import signal
import subprocess
import sys

import pytest

from steps.driver import Hive
from steps.waiting import must

HEAVY = ("torch", "vllm", "lmcache", "transformers", "huggingface_hub", "mcp", "tomlkit")


def test_serving_imports_no_engine_no_hub_and_no_mcp() -> None:
    code = (
        "import sys, hive.__main__, hive.cli, hive.cli.serve, hive.daemon, uvloop\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def waiting(hive: Hive) -> Hive:
    """A hive whose model is on a GPU that is not there, which it waits for."""
    hive.model("m", device="cuda:77")
    hive.sections["server"]["driver_wait_s"] = 600
    hive.launch()
    must(hive.runtime.exists, 30, "its directories, which it makes before")
    return hive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_it_waits_for_a_driver_a_signal_ends_it_at_once(
    waiting: Hive, number: signal.Signals
) -> None:
    """Nothing was started: there is nothing to end, and nothing went wrong."""
    waiting.signal(number)
    assert waiting.wait_exit(15) == 0

    assert [line["state"] for line in waiting.logged("daemon")] == ["stopped"]
    assert "CUDA_DEVICE" not in waiting.log_text


def test_sighup_while_it_waits_for_a_driver_ends_nothing(waiting: Hive) -> None:
    waiting.signal(signal.SIGHUP)
    must(lambda: "SIGHUP" in waiting.log_text, 10, "a word about it")
    assert waiting.process
    assert waiting.process.poll() is None
    waiting.signal(signal.SIGTERM)
    assert waiting.wait_exit(15) == 0


def test_sighup_is_told_and_ends_nothing(hive: Hive) -> None:
    """A terminal that is closed, or an operator who hopes for a reload."""
    hive.model("m")
    hive.start()
    pid = hive.worker()["pid"]
    for count in (1, 2):
        hive.signal(signal.SIGHUP)
        must(lambda: len(told_of_hup(hive)) == count, 10, "a word about it")  # noqa: B023
    assert hive.chat().status == 200

    assert hive.worker()["pid"] == pid
    assert told_of_hup(hive) == ["warning", "warning"]


def told_of_hup(hive: Hive) -> list[str]:
    return [line["level"] for line in hive.log if "does not reload" in str(line)]
