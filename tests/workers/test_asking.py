"""A program is asked, and nothing of it lives on, whichever way that ends."""

import threading
import time
from pathlib import Path

import pytest

from hive.workers import guard
from hive.workers.asking import ask

# Two that outlive the program: one in its session, holding its output open, one in its own.
LEAVES_CHILDREN = "sleep 600 & setsid sleep 600 & "


def sleepers() -> set[int]:
    """The processes that are still there of those that were asked."""
    marked = ((p, guard.mark_of(p.pid) or "") for p in guard.every_process() if p.state != "Z")
    return {process.pid for process, mark in marked if mark.startswith("ask-")}


def asked(script: str, within_s: float = 30, stop: threading.Event | None = None) -> object:
    return ask(["/bin/sh", "-c", script], within_s, stop or threading.Event())


def test_an_answer_is_its_status_and_what_was_written() -> None:
    assert asked("echo one; echo two >&2; exit 3") == (3, "one\n", "two\n")


def test_its_input_is_empty_and_its_environment_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIVE_API_KEY", "secret")

    assert asked("cat; echo ${HIVE_API_KEY-none}") == (0, "none\n", "")


def test_a_program_that_cannot_be_started_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Permission denied"):
        ask([str(tmp_path)], 1, threading.Event())


def test_what_it_leaves_behind_is_ended_and_not_waited_for() -> None:
    began = time.monotonic()

    assert asked(f"{LEAVES_CHILDREN} echo done") == (0, "done\n", "")
    assert time.monotonic() - began < 10
    assert sleepers() == set()


def test_one_that_does_not_answer_is_ended_with_its_children() -> None:
    with pytest.raises(TimeoutError):
        asked(f"trap '' TERM; {LEAVES_CHILDREN} sleep 600", within_s=0.3)
    assert sleepers() == set()


def test_a_stop_ends_it_at_once() -> None:
    stop, began = threading.Event(), time.monotonic()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(TimeoutError):
        asked(f"{LEAVES_CHILDREN} sleep 600", stop=stop)

    assert time.monotonic() - began < 10
    assert sleepers() == set()


def test_of_much_output_the_end_is_read() -> None:
    answer = ask(["/bin/sh", "-c", "yes | head -c 3000000; echo end"], 30, threading.Event())

    assert len(answer.said) == 2**20
    assert answer.said.endswith("y\nend\n")
