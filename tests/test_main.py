"""`hive serve` as a process: what it does not import, and how it takes signals."""

import signal
import subprocess
import sys
from functools import partial

import pytest

from steps.driver import Hive
from steps.waiting import must

HEAVY = ("torch", "vllm", "lmcache", "transformers", "huggingface_hub", "mcp", "tomlkit")
OF_WINDOWS = ("sqlalchemy", "alembic", "zstandard")  # loaded where a model has them


def test_serving_imports_no_engine_no_hub_no_mcp_and_no_database() -> None:
    code = (
        "import sys, hive.__main__, hive.cli, hive.cli.serve, hive.daemon, uvloop\n"
        f"print([name for name in {HEAVY + OF_WINDOWS!r} if name in sys.modules])"
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
    """Also of a terminal that is closed: what is read again is the same."""
    hive.model("m")
    hive.start()
    pid = hive.worker()["pid"]
    for count in (1, 2):
        hive.signal(signal.SIGHUP)
        reloaded = partial(hive.logged, "settings reloaded", by="SIGHUP", changed="")
        must(lambda: len(reloaded()) == count, 10, "a word about it")  # noqa: B023
    assert hive.chat().status == 200

    assert hive.worker()["pid"] == pid


def test_a_sighup_during_the_start_is_done_when_hive_serves(hive: Hive) -> None:
    """What changed after the file was read is not missed."""
    hive.sections["server"]["port"] = 0
    hive.model("m")
    hive.launch()
    must(hive.runtime.exists, 20, "its directories, which it makes after it has read the file")
    hive.sections["server"]["drain_s"] = 4
    hive.write_config()
    hive.signal(signal.SIGHUP)
    hive.start_was_launched(20)

    must(lambda: hive.logged("settings reloaded", changed="server.drain_s"), 10, "the reload")
