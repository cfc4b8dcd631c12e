"""`hive explain`: every code can be looked up, in any way that it is met."""

import json

import pytest

from hive import cli
from hive.errors import every_error

Capture = pytest.CaptureFixture[str]
ALL = list(every_error())


def test_every_error_can_be_explained(capsys: Capture) -> None:
    """Code, meaning and advice (R029, R032)."""
    for cls in ALL:
        assert cli.run(["explain", cls.code]) == 0
        told = capsys.readouterr().out
        assert cls.code in told
        assert cls.summary in told
        assert cls.action in told


@pytest.mark.parametrize("code", ["CWM-2001", "cwm-2001", "session_not_found"])
def test_a_code_is_found_by_number_and_in_any_case(capsys: Capture, code: str) -> None:
    assert cli.run(["explain", code]) == 0
    assert "SESSION_NOT_FOUND" in capsys.readouterr().out


def test_programs_get_json(capsys: Capture) -> None:
    assert cli.run(["explain", "GPU_VRAM_EXHAUSTED", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)

    assert facts["code"] == "GPU_VRAM_EXHAUSTED"
    assert facts["http_status"] == 500
    assert facts["retryable"] is False
    assert facts["severity"] == "critical"


def test_without_a_code_all_of_them_are_listed(capsys: Capture) -> None:
    assert cli.run(["explain"]) == 0
    table = capsys.readouterr().out
    assert cli.run(["explain", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["errors"]

    assert [error["code"] for error in listed] == [cls.code for cls in ALL]
    assert [code for code in (cls.code for cls in ALL) if code not in table] == []


def test_a_code_that_does_not_exist_is_an_error_that_names_the_nearest(capsys: Capture) -> None:
    assert cli.run(["explain", "WORKER_CRASHD"]) == 1
    told = capsys.readouterr().err

    assert "'WORKER_CRASHD' is no error code of hive." in told
    assert "Did you mean WORKER_CRASHED?" in told


def test_one_that_is_like_no_other_names_none(capsys: Capture) -> None:
    assert cli.run(["explain", "QQQQ"]) == 1
    assert "Did you mean" not in capsys.readouterr().err
