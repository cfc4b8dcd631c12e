"""Steps about the daemon: how it is configured, started, stopped and killed."""

import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_bdd import given, parsers, then, when

from hive.workers import guard
from steps.driver import Hive
from steps.story import MODEL, WORKER, Story, is_alive
from steps.waiting import must

SIGNALS = {"asked to stop": signal.SIGTERM, "interrupted": signal.SIGINT}
SETTINGS = {"yes": True, "no": False}


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def _value(text: str) -> object:
    with contextlib.suppress(ValueError):
        return float(text) if "." in text and text.count(".") == 1 else int(text)
    return SETTINGS.get(text, text)


# ── configuration ───────────────────────────────────────────────────────────────────────────────


@given(parsers.parse("the setting {section}.{key} is {value}"))
def _(story: Story, section: str, key: str, value: str) -> None:
    story.hive.sections.setdefault(section, {})[key] = _value(value)


@given(parsers.parse("the model's {key} is {value}"))
def _(story: Story, key: str, value: str) -> None:
    model = story.hive.models[MODEL]
    story.hive.model(MODEL, *model.knobs, **{**model.extra, key: _value(value)})


@given(parsers.parse("the model names no {key}"))
def _(story: Story, key: str) -> None:
    story.hive.model(MODEL, **{key: []})


@given(parsers.parse("the environment variable {name} is {value}"))
def _(story: Story, name: str, value: str) -> None:
    story.hive.env[name] = value


@given("no model is configured")
def _(story: Story) -> None:
    story.hive.models.clear()


@given("another program listens on hive's port")
def _(story: Story, taken_port: int) -> None:
    story.hive.port = taken_port


# ── starting ────────────────────────────────────────────────────────────────────────────────────


@given("hive is serving")
@when("hive is started again")
def _(story: Story) -> None:
    if not story.hive.models:
        story.hive.model(MODEL)
    story.hive.start()


@given("hive has just started")
@when("hive starts")
def _(story: Story) -> None:
    story.hive.start(is_ready=False)


@when("hive is started and ends by itself")
def _(story: Story) -> None:
    story.ran = story.hive.serve_to_the_end()


@when("a second hive is started in the same directories")
def _(story: Story) -> None:
    second = Hive(Path(tempfile.mkdtemp(dir=story.hive.home)))
    second.sections["server"] = {
        "state_dir": str(story.hive.state),
        "runtime_dir": str(story.hive.runtime),
    }
    second.model(MODEL)
    story.ran = second.serve_to_the_end()


@then(parsers.parse("it ends within {seconds:g} seconds with exit code {code:d}"))
def _(story: Story, seconds: float, code: int) -> None:
    assert story.ran
    assert story.ran.code == code, story.ran.err
    assert story.ran.seconds < seconds


@then(parsers.parse("it ends with exit code {code:d}"))
def _(story: Story, code: int) -> None:
    assert story.ran
    assert story.ran.code == code, story.ran.err


@then(parsers.parse("its last line is the error {code}, for programs to read"))
def _(story: Story, code: str) -> None:
    assert story.ran
    assert story.ran.last_line["error"]["code"] == code


@then("its last line says that there is no driver or no such device")
def _(story: Story) -> None:
    assert story.ran
    assert story.ran.last_line["error"]["code"] in ("CUDA_DRIVER_MISSING", "CUDA_DEVICE_NOT_FOUND")


@then(parsers.parse('it names "{text}"'))
def _(story: Story, text: str) -> None:
    assert story.ran
    assert text in story.ran.err, story.ran.err


@then("it says what to do")
def _(story: Story) -> None:
    assert story.ran
    assert story.ran.last_line["error"]["details"]["suggested_action"] in story.ran.err


# ── stopping ────────────────────────────────────────────────────────────────────────────────────


@when(parsers.re(r"hive is (?P<how>asked to stop|interrupted)"))
@when(parsers.re(r"hive is (?P<how>asked to stop|interrupted) a second time"))
def _(story: Story, how: str) -> None:
    if not story.processes:
        story.look_at_tree()
    story.hive.signal(SIGNALS[how])


@when("hive is asked to stop again and again")
def _(story: Story) -> None:
    """Two signals at once may arrive as one: nothing outside tells that the first was heard."""
    story.look_at_tree()

    def ended() -> bool:
        story.hive.signal(signal.SIGTERM)
        return story.hive.process is not None and story.hive.process.poll() is not None

    must(ended, 3, "hive's end")


@given("hive waits for the running requests")
def _(story: Story) -> None:
    story.look_at_tree()
    story.hive.signal(signal.SIGTERM)
    must(lambda: story.hive.readiness().status == 503, 5, "hive draining")


@given("hive has stopped")
def _(story: Story) -> None:
    story.look_at_tree()
    story.hive.signal(signal.SIGTERM)
    story.hive.wait_exit()


@when("hive is killed")
def _(story: Story) -> None:
    story.look_at_tree()
    story.hive.signal(signal.SIGKILL)
    story.hive.wait_exit()


@given("hive and the engine's guard were killed together")
def _(story: Story) -> None:
    story.look_at_tree()
    guard_pid = story.hive.worker(WORKER)["guard_pid"]
    # Stopped first, so that neither sees the other's end.
    os.kill(guard_pid, signal.SIGSTOP)
    story.hive.signal(signal.SIGKILL)
    os.kill(guard_pid, signal.SIGKILL)
    story.hive.wait_exit()


@given("a part of the engine lives on")
def _(story: Story) -> None:
    assert any(is_alive(process) for process in story.processes)
    assert story.hive.leftovers()


@given("hive does not answer any more")
def _(story: Story) -> None:
    story.hive.signal(signal.SIGSTOP)


@then(parsers.parse("hive ends with exit code {code:d}"))
def _(story: Story, code: int) -> None:
    assert story.hive.wait_exit() == code


@then(parsers.parse("hive ends within {seconds:g} seconds with exit code {code:d}"))
def _(story: Story, seconds: float, code: int) -> None:
    assert story.hive.wait_exit(seconds) == code


@then("hive still runs")
def _(story: Story) -> None:
    assert story.hive.process
    assert story.hive.process.poll() is None
    assert story.hive.ask("GET", "/livez").status == 200


@then("hive's own directories are for its user alone")
def _(story: Story) -> None:
    for directory in (story.hive.state, story.hive.runtime):
        assert directory.stat().st_mode & 0o777 == 0o700


@then("nothing that an earlier engine left is still there")
def _(story: Story) -> None:
    story.must_be_gone(2)
    left = [name for name in story.shared_memory if Path(guard.SHM, name).exists()]
    assert not left, left
