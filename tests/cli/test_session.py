"""`hive session`: begin, list, show and delete conversations of a running daemon."""

import json
from collections.abc import Iterator

import pytest

from hive import cli
from steps.driver import Hive, new_hive
from tests.windows.daemon import WINDOWS

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Hive]:
    """Serving "m" with windows, for every test of this file."""
    with new_hive() as hive:
        hive.sections["windows"] = dict(WINDOWS)
        hive.model("m", windows=True)
        hive.start(is_shared=True)
        yield hive


@pytest.fixture(autouse=True)
def _asked(daemon: Hive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIVE_API_KEY", raising=False)
    monkeypatch.setenv("HIVE_URL", daemon.url)


def new(capsys: Capture) -> str:
    assert cli.run(["session", "new", "m"]) == 0
    return capsys.readouterr().out.strip()


def answered(daemon: Hive, session: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    assert (
        daemon.ask("POST", "/v1/chat/completions", body, {"X-Hive-Session": session}).status == 200
    )


def row(table: str, first: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(first)]
    return line.split()


def test_a_new_session_is_its_id(daemon: Hive, capsys: Capture) -> None:
    session = new(capsys)

    assert daemon.ask("GET", f"/hive/v1/sessions/{session}").json["state"] == "ACTIVE"


def test_programs_get_the_new_session_as_json(daemon: Hive, capsys: Capture) -> None:
    assert cli.run(["session", "new", "m", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)

    assert (made["state"], made["model"], made["has_conversation"]) == ("ACTIVE", "m", False)


def test_a_model_that_is_not_served_has_no_sessions(capsys: Capture) -> None:
    assert cli.run(["session", "new", "other"]) == 1
    assert "MODEL_NOT_FOUND: The requested model is not served here" in capsys.readouterr().err


def test_people_get_a_table(daemon: Hive, capsys: Capture) -> None:
    session = new(capsys)
    assert cli.run(["session", "list"]) == 0
    table = capsys.readouterr().out

    assert table.split("\n")[0].split() == ["session", "state", "model", "owner", "created", "used"]
    assert row(table, session)[1:3] == ["ACTIVE", "m"]


def test_the_list_is_of_one_state_where_one_is_named(daemon: Hive, capsys: Capture) -> None:
    session = new(capsys)
    assert cli.run(["session", "list", "--state", "frozen"]) == 0
    assert session not in capsys.readouterr().out
    assert cli.run(["session", "list", "--state", "ACTIVE", "--limit", "1", "--json"]) == 0

    assert [one["id"] for one in json.loads(capsys.readouterr().out)["sessions"]] == [session]


def test_a_session_is_shown_with_what_was_said(daemon: Hive, capsys: Capture) -> None:
    """For people only how much that is."""
    session = new(capsys)
    answered(daemon, session)
    assert cli.run(["session", "show", session]) == 0
    table = capsys.readouterr().out
    assert cli.run(["session", "show", session, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)

    assert row(table, "state") == ["state", "ACTIVE"]
    assert row(table, "messages") == ["messages", "2"]
    assert "hello" not in table
    assert shown["messages"][0] == {"role": "user", "content": "hello"}


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_deleted_session_is_not_there(capsys: Capture, more: list[str]) -> None:
    session = new(capsys)
    assert cli.run(["session", "delete", session, *more]) == 0
    told = capsys.readouterr().out
    assert cli.run(["session", "show", session]) == 1
    err = capsys.readouterr().err

    if more:
        assert json.loads(told) == {"id": session, "deleted": True}
    else:
        assert told == f"{session}: deleted\n"
    assert err.splitlines() == [
        f"hive: SESSION_NOT_FOUND: Session not found: {session}",
        "hive: what to do: List the sessions with 'hive session list', or make one.",
    ]


def test_what_no_session_is_called_reaches_nothing_else(capsys: Capture) -> None:
    for name in ("", ".", "../windows", "a b", "a/b", "a?b", "a%2Fb", "\udcff", "nö"):
        assert cli.run(["session", "delete", name, "--json"]) == 1
        code = json.loads(capsys.readouterr().out)["error"]["code"]
        assert code == ("NOT_FOUND" if "../" in name else "INVALID_SESSION_ID"), name


@pytest.mark.parametrize("command", ["show", "delete"])
def test_no_command_goes_up_a_path(capsys: Capture, command: str) -> None:
    assert cli.run(["session", command, ".."]) == 1
    assert "INVALID_SESSION_ID" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["list", "--state", "BUSY"], ["list", "--limit", "0"], ["new"]])
def test_wrong_usage_is_2(capsys: Capture, args: list[str]) -> None:
    assert cli.run(["session", *args]) == 2
    assert "Usage: hive session" in capsys.readouterr().err
