"""What commands print: whole in a pipe, and errors for people and programs."""

import json

import pytest

from hive.cli import output
from hive.errors import ConfigInvalid, ServiceUnavailable

Capture = pytest.CaptureFixture[str]


def test_a_table_in_a_pipe_is_not_cut(capsys: Capture) -> None:
    long = "x" * 300
    output.print_table(("one", "two"), [(long, "end"), ("short", "end")])
    head, first, second = capsys.readouterr().out.splitlines()

    assert head.split() == ["one", "two"]
    assert first.split() == [long, "end"]
    assert second.split() == ["short", "end"]


def test_what_is_not_there_is_an_empty_cell(capsys: Capture) -> None:
    output.print_table(("one", "two"), [(None, 0)])

    assert capsys.readouterr().out.splitlines()[1].split() == ["0"]


def test_a_cell_is_text_and_no_markup(capsys: Capture) -> None:
    output.print_table(("one",), [("[red]not a colour[/red]",)])

    assert "[red]not a colour[/red]" in capsys.readouterr().out


def test_a_cell_with_colons_is_no_picture(capsys: Capture) -> None:
    output.print_table(("one",), [("engine:warning: low on memory",)])

    assert "engine:warning: low on memory" in capsys.readouterr().out


def test_an_error_is_told_with_all_its_problems_and_what_to_do(capsys: Capture) -> None:
    """(R028, R029)"""
    error = ConfigInvalid("one is wrong (and 1 more)", problems=["one is wrong", "two is wrong"])
    output.show_error(error, as_json=False)
    out, err = capsys.readouterr()

    assert out == ""
    assert err.splitlines() == [
        "hive: one is wrong",
        "hive: two is wrong",
        "hive: CONFIG_INVALID: one is wrong (and 1 more)",
        f"hive: what to do: {ConfigInvalid.action}",
    ]


def test_an_error_that_is_its_only_problem_is_told_once(capsys: Capture) -> None:
    output.show_error(ConfigInvalid("this is wrong", problems=["this is wrong"]), as_json=False)

    assert capsys.readouterr().err.count("this is wrong") == 1


def test_programs_get_the_errors_body_beside_the_lines_for_people(capsys: Capture) -> None:
    """The same body that HTTP would have sent (R027, R043)."""
    output.show_error(ServiceUnavailable(reason="loading", retry_after_s=2.5), as_json=True)
    out, err = capsys.readouterr()
    told = json.loads(out)["error"]

    assert told["code"] == "SERVICE_UNAVAILABLE"
    assert told["details"]["retry_after_seconds"] == 3
    assert told["details"]["http_status"] == 503
    assert "SERVICE_UNAVAILABLE" in err


def test_json_is_printed_whole_whatever_it_holds(capsys: Capture) -> None:
    output.print_json({"path": output, "text": "é\n"})

    assert json.loads(capsys.readouterr().out)["text"] == "é\n"


CLEAR = "\x1b[2J\x1b]0;PWN\x07"
SHOWN = r"\x1b[2J\x1b]0;PWN\x07"


def test_what_engines_said_steers_no_terminal(capsys: Capture) -> None:
    """In a table, in a line and in an error."""
    output.print_table(("reason",), [(CLEAR,)])
    output.say(f"m-0: FAILED ({CLEAR})")
    output.say(CLEAR, err=True)
    error = ConfigInvalid(CLEAR, action=f"Correct {CLEAR}", problems=[CLEAR, f"b: {CLEAR}"])
    output.show_error(error, as_json=True)
    out, err = capsys.readouterr()

    assert "\x1b" not in out + err
    assert out.count(SHOWN) == 2
    assert err.count(SHOWN) == 4
    assert json.loads(out[out.index("{") :])["error"]["message"] == CLEAR
