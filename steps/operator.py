"""Steps about the operator: keys, commands, and what they print."""

import hashlib
import os
import shlex
import signal
import subprocess
from typing import Any

from pytest_bdd import given, parsers, then, when

from steps import leaks
from steps.driver import HIVE, ROOT, chat_body
from steps.story import CHAT, MODEL, Story
from steps.waiting import must


def key_of(name: str) -> str:
    """The key that a scenario's key of that name is made from."""
    return f"hive_{name}_0123456789abcdef0123456789abcdef"


# ── keys ────────────────────────────────────────────────────────────────────────────────────────


@given(parsers.re(r'a key "(?P<name>\w+)" for (?P<scopes>[\w, ]+)'))
def _(story: Story, name: str, scopes: str) -> None:
    digest = hashlib.sha256(key_of(name).encode()).hexdigest()
    scope_list = scopes.replace(" and ", ",").replace(" ", "").split(",")
    story.hive.keys.append({"name": name, "sha256": digest, "scopes": scope_list})
    story.hive.key = key_of(name)  # the operator of the last key looks on


@when(parsers.re(r'(?P<who>somebody|"\w+") (?P<method>gets|posts to) "(?P<path>[^"]+)"'))
def _(story: Story, who: str, method: str, path: str) -> None:
    headers = {} if who == "somebody" else {"Authorization": f"Bearer {key_of(who.strip(chr(34)))}"}
    looking_on, story.hive.key = story.hive.key, None
    body = chat_body(MODEL) if path == CHAT else None
    story.ask("GET" if method == "gets" else "POST", path, body, **headers)
    story.hive.key = looking_on


@when(parsers.parse('"{name}" asks for a chat with X-Api-Key'))
def _(story: Story, name: str) -> None:
    looking_on, story.hive.key = story.hive.key, None
    story.ask("POST", CHAT, chat_body(MODEL), X_Api_Key=key_of(name))
    story.hive.key = looking_on


@when(parsers.parse('somebody asks for a chat with the authorization "{value}"'))
def _(story: Story, value: str) -> None:
    looking_on, story.hive.key = story.hive.key, None
    story.ask("POST", CHAT, chat_body(MODEL), Authorization=value)
    story.hive.key = looking_on


@then(parsers.parse('neither the log nor the answer shows the key "{name}"'))
def _(story: Story, name: str) -> None:
    assert key_of(name) not in story.hive.log_text
    assert key_of(name) not in story.answer.body.decode()


@when(parsers.parse('the operator makes a key "{name}" for {scope}'))
def _(story: Story, name: str, scope: str) -> None:
    story.hive.write_config()
    config = str(story.hive.config)
    story.ran = story.hive.cli("key", "new", name, "--scope", scope, "--config", config)


@then("the key is shown once, and only its hash is kept")
def _(story: Story) -> None:
    assert story.ran
    shown = story.ran.out.strip()
    kept = story.hive.config.read_text()
    assert shown not in kept
    assert hashlib.sha256(shown.encode()).hexdigest() in kept


# ── commands ────────────────────────────────────────────────────────────────────────────────────


@when(parsers.parse('the operator runs "{command}"'))
def _(story: Story, command: str) -> None:
    if story.hive.port == 0:
        story.hive.port = 1  # nothing listens there
    words = shlex.split(command)
    if words[0] in ("check", "sweep"):  # of what is configured, not of a daemon
        if story.hive.process is None:
            story.hive.write_config()
        words += ["--config", str(story.hive.config)]
    story.ran = story.hive.cli(*words, within_s=20)


@then(parsers.parse("the command ends with {code:d}"))
def _(story: Story, code: int) -> None:
    assert story.ran
    assert story.ran.code == code, (story.ran.code, story.ran.out, story.ran.err)


@then(parsers.parse('it prints "{text}"'))
def _(story: Story, text: str) -> None:
    assert story.ran
    assert text in story.ran.out, story.ran.out


@then(parsers.parse('it complains "{text}"'))
def _(story: Story, text: str) -> None:
    assert story.ran
    assert text in story.ran.err, story.ran.err


@then(parsers.parse('for programs it prints {key} "{value}"'))
def _(story: Story, key: str, value: str) -> None:
    assert story.ran
    assert str(_found(story.ran.json, key)) == value, story.ran.out


def _found(printed: Any, key: str) -> Any:
    """The value at a.b.0.c in what was printed."""
    for part in key.split("."):
        printed = printed[int(part)] if isinstance(printed, list) else printed[part]
    return printed


# ── following a log ─────────────────────────────────────────────────────────────────────────────


@given("the operator follows the worker's log")
def _(story: Story) -> None:
    follower = subprocess.Popen(
        [*HIVE, "worker", "logs", "-f", "llama-0", "--url", story.hive.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )
    leaks.started_pids.add(follower.pid)
    assert follower.stdout
    os.set_blocking(follower.stdout.fileno(), False)
    story.follower, story.kept["followed"] = follower, b""
    must(lambda: b"engine started" in _more(story), 5, "the beginning of the log")


@when("the operator presses Ctrl+C")
def _(story: Story) -> None:
    assert story.follower
    story.follower.send_signal(signal.SIGINT)


@then("the new line is shown at once")
def _(story: Story) -> None:
    already = len(_more(story))
    must(lambda: b"Avg prompt throughput" in _more(story)[already:], 3, "a new line of the log")


@then("the operator sees the engine's next start")
def _(story: Story) -> None:
    must(lambda: _more(story).count(b"engine started") == 2, 5, "the next start in the log")


@then(parsers.parse("following ends with {code:d}"))
def _(story: Story, code: int) -> None:
    assert story.follower
    out, err = story.follower.communicate(timeout=5)
    assert story.follower.returncode == code, (out, err)
    assert b"Traceback" not in err


def _more(story: Story) -> bytes:
    assert story.follower
    assert story.follower.stdout
    piece = story.follower.stdout.read()
    story.kept["followed"] += piece or b""
    followed: bytes = story.kept["followed"]
    return followed
