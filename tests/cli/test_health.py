"""`hive health` and `hive test-connection`: the whole, and its parts each alone."""

import json
from collections.abc import Iterator

import pytest

from hive import cli
from steps.driver import Hive, new_hive
from tests.windows.daemon import WINDOWS

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Hive]:
    """Serving "m" with windows and "other" without, for every test of this file."""
    with new_hive() as hive:
        hive.sections["windows"] = dict(WINDOWS)
        hive.model("m", windows=True)
        hive.model("other")
        hive.start(is_shared=True)
        yield hive


@pytest.fixture(autouse=True)
def _asked(daemon: Hive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIVE_API_KEY", raising=False)
    monkeypatch.setenv("HIVE_URL", daemon.url)


@pytest.fixture
def without_an_engine(daemon: Hive) -> Iterator[None]:
    """The engine of "other" is stopped, and hive serves "m" alone."""
    assert cli.run(["worker", "stop", "other-0", "--wait", "10"]) == 0
    yield
    assert cli.run(["worker", "start", "other-0", "--wait", "10"]) == 0


@pytest.fixture
def without_lmcache(daemon: Hive) -> Iterator[None]:
    daemon.turn_cache(health_status=500)
    yield
    daemon.turn_cache(health_status=200)


def rows(table: str) -> list[str]:
    return [" ".join(line.split()) for line in table.splitlines()]


def test_all_is_well_in_one_word(capsys: Capture) -> None:
    """(R121)"""
    assert cli.run(["health"]) == 0
    assert capsys.readouterr().out == "ok\n"


def test_each_part_is_named_where_that_is_wanted(capsys: Capture) -> None:
    """(R121)"""
    assert cli.run(["health", "--verbose"]) == 0
    first, columns, *found = rows(capsys.readouterr().out)

    assert (first, columns) == ("ok", "component found")
    assert [line.partition(" ok answered in ")[0] for line in found] == [
        *("engine m-0", "engine other-0", "lmcache", "catalogue"),
    ]


def test_programs_get_each_part_in_any_case(capsys: Capture) -> None:
    """(R121)"""
    assert cli.run(["health", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    assert told["status"] == "ok"
    assert told["components"]["lmcache"]["ok"] is True


def test_an_engine_alone_is_asked(capsys: Capture) -> None:
    """(R122)"""
    assert cli.run(["test-connection", "--engine"]) == 0
    columns, *found = rows(capsys.readouterr().out)
    assert cli.run(["test-connection", "--engine", "--model", "m", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    assert columns == "engine seconds"
    assert [line.rpartition(" ")[0] for line in found] == ["m-0 ok", "other-0 ok"]
    assert list(told["seconds"]) == ["m-0"]


def test_lmcache_alone_is_asked(capsys: Capture) -> None:
    """(R123)"""
    assert cli.run(["test-connection", "--lmcache"]) == 0
    columns, found = rows(capsys.readouterr().out)
    assert cli.run(["test-connection", "--lmcache", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    assert columns == "lmcache seconds"
    assert found.startswith("lmcache ok 0.")
    assert told["status"] == "ok"


@pytest.mark.usefixtures("without_an_engine")
def test_an_engine_that_does_not_run_is_found(capsys: Capture) -> None:
    """By both commands, and by the right one alone (R121, R122, R123)."""
    capsys.readouterr()
    assert cli.run(["health", "--verbose"]) == 1
    told = rows(capsys.readouterr().out)
    assert cli.run(["test-connection", "--engine"]) == 1
    err = capsys.readouterr().err

    wrong = "Cannot connect to inference server: worker other-0 is STOPPED."
    assert told[0] == "degraded"
    assert f"engine other-0 failed ENGINE_UNREACHABLE: {wrong}" in told
    assert err.splitlines()[0] == f"hive: ENGINE_UNREACHABLE: {wrong}"
    assert "hive worker restart" in err
    assert cli.run(["test-connection", "--engine", "--model", "m"]) == 0
    assert cli.run(["test-connection", "--lmcache"]) == 0


@pytest.mark.usefixtures("without_lmcache")
def test_an_lmcache_that_is_not_well_is_found(capsys: Capture) -> None:
    """(R121, R122, R123)"""
    assert cli.run(["health", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert cli.run(["test-connection", "--lmcache", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]

    assert told["status"] == "degraded"
    assert told["components"]["lmcache"]["code"] == "KV_SERVER_UNREACHABLE"
    assert error["code"] == "KV_SERVER_UNREACHABLE"
    assert error["details"]["number"] == "CWM-5002"
    assert cli.run(["test-connection", "--engine"]) == 0


def test_a_model_that_nobody_serves_is_named(capsys: Capture) -> None:
    assert cli.run(["test-connection", "--engine", "--model", "a b&c"]) == 1
    assert "MODEL_NOT_FOUND" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [[], ["--engine", "--lmcache"], ["--lmcache", "--model", "m"], ["--model", "m"]]
)
def test_one_part_is_to_be_named(capsys: Capture, args: list[str]) -> None:
    """(R122, R123)"""
    assert cli.run(["test-connection", *args]) == 2
    assert "Usage: hive test-connection" in capsys.readouterr().err
