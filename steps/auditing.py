"""Steps about the audit log and about reloading: what changes, who did it, and that it is known."""

import contextlib
import errno
import signal
import sqlite3
from typing import Any

from pytest_bdd import given, parsers, then, when

from hive.storage.audit import page, verify
from steps.daemon import _value
from steps.memory import WORDS
from steps.operator import key_of
from steps.story import MODEL, Story
from steps.waiting import must
from tests.doubles.fs import Faults, Rule

# ── the configuration, while hive runs ──────────────────────────────────────────────────────────


def rewrite(story: Story) -> None:
    """The port stays what it was when hive started: any."""
    story.hive.sections.setdefault("server", {}).setdefault("port", 0)
    story.hive.write_config()


@when(parsers.parse("the setting {section}.{key} becomes {value}"))
def _(story: Story, section: str, key: str, value: str) -> None:
    story.hive.sections.setdefault(section, {})[key] = _value(value)
    rewrite(story)


@when(parsers.parse("the model's {key} becomes {value}"))
def _(story: Story, key: str, value: str) -> None:
    story.hive.models[MODEL].extra[key] = _value(value)
    rewrite(story)


@when(parsers.parse('the key "{name}" is taken out of the configuration'))
def _(story: Story, name: str) -> None:
    story.hive.keys = [key for key in story.hive.keys if key["name"] != name]
    rewrite(story)


@when("the configuration is broken")
def _(story: Story) -> None:
    story.hive.config.write_text("[server")


@when("the configuration vanishes")
def _(story: Story) -> None:
    story.hive.config.unlink()


@when("hive gets a SIGHUP")
def _(story: Story) -> None:
    story.hive.signal(signal.SIGHUP)


@then("nothing below info is logged")
def _(story: Story) -> None:
    assert {line["level"] for line in story.hive.log} <= {"info", "warning", "error"}


# ── who did what ────────────────────────────────────────────────────────────────────────────────


def records(story: Story) -> list[dict[str, Any]]:
    """All of them, the newest first."""
    return page(story.hive.state / "audit", 10_000)


@then(
    parsers.re(
        r'the audit log says that (?P<who>hive|a signal|"\w+") did "(?P<action>[\w.]+)", '
        r"with (?P<outcome>.+)"
    )
)
def _(story: Story, who: str, action: str, outcome: str) -> None:
    name = who.removeprefix("a ").strip('"')
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        found[:] = [
            one
            for one in records(story)
            if (one["action"], one["outcome"]) == (action, outcome)
            and one["actor"].partition(":")[0] == name
        ]
        return bool(found)

    must(is_there, 10, lambda: f"{who} did {action}, {outcome}; there is {records(story)}")
    story.kept["record"] = found[0]


@then(parsers.parse('it is about "{target}", and names the request'))
def _(story: Story, target: str) -> None:
    record = story.kept["record"]
    assert record["target"] == target
    assert record["request_id"] == story.answer.headers["x-request-id"]


@then(parsers.parse('its detail {key} is "{value}"'))
def _(story: Story, key: str, value: str) -> None:
    assert story.kept["record"]["detail"][key] == value


@then("its detail pid is that of the process that was killed")
def _(story: Story) -> None:
    assert story.kept["record"]["detail"]["pid"] in {one.pid for one in story.processes}


@then("the audit log holds neither keys, nor salts, nor what was said")
def _(story: Story) -> None:
    text = "".join(path.read_text() for path in (story.hive.state / "audit").iterdir())
    with contextlib.closing(sqlite3.connect(story.hive.state / "catalogue.db")) as catalogue:
        salts = [salt for (salt,) in catalogue.execute("SELECT salt FROM windows")]
    assert salts
    for secret in (*salts, WORDS, *WORDS.split()[40:], *(key_of(n) for n in ("ann", "ops"))):
        assert secret not in text, secret


# ── its chain ───────────────────────────────────────────────────────────────────────────────────


@then("the audit log is whole")
def _(story: Story) -> None:
    verdict = verify(story.hive.state / "audit")
    assert verdict.problem is None, verdict.problem
    assert verdict.records


@when(parsers.parse('somebody makes a "{action}" of that record'))
def _(story: Story, action: str) -> None:
    file = story.hive.state / "audit" / "audit.jsonl"
    old = story.kept["record"]["action"].encode()
    # In place, as an editor that is careful to leave the file as it was.
    with file.open("r+b") as out:
        text = out.read()
        out.seek(0)
        out.write(text.replace(b'"%s"' % old, b'"%s"' % action.encode()))


@then("the audit log is found to be changed at that record")
def _(story: Story) -> None:
    ran = story.hive.cli("audit", "verify", "--state-dir", str(story.hive.state), "--json")
    index = story.kept["record"]["index"]
    assert ran.code == 1
    assert (ran.json["problem"]["index"], ran.json["problem"]["line"]) == (index, index + 1)


@then(
    parsers.parse('the log has a line "audit log" with the state "{state}" after the next record')
)
def _(story: Story, state: str) -> None:
    story.ask("POST", "/hive/v1/workers/llama-0/start")
    must(lambda: story.hive.logged("audit log", state=state), 10, f"{state} in the log")


# ── a full disk ─────────────────────────────────────────────────────────────────────────────────


@given("a disk that can be full")
def _(story: Story) -> None:
    faults = Faults(story.hive.home / "faults")
    story.hive.starter = faults.starter
    story.kept["faults"] = faults


@when("there is no room for the audit log")
def _(story: Story) -> None:
    story.kept["faults"].add(Rule("*/audit/audit.jsonl", "write", errno.ENOSPC))


@when("there is room again")
def _(story: Story) -> None:
    story.kept["faults"].off()
