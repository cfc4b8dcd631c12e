"""How each part of hive is, asked at this moment: engines, LMCache, the catalogue."""

import os
import signal
from collections.abc import Iterator

import pytest

from steps.driver import Hive
from steps.waiting import must
from tests.gateway.serving import bearer, serving
from tests.patience import awaited
from tests.windows.daemon import Owner, daemon, said, told_by


@pytest.fixture(scope="module")
def hive() -> Iterator[Hive]:
    with daemon("--kv-timeout-s", "5", breaker={"failures": 100, "cooldown_s": 0.2}) as it:
        yield it


def test_everything_that_is_well_is_told_with_its_time(hive: Hive) -> None:
    """R121-R123"""
    told = hive.ask("GET", "/hive/v1/health").json
    assert told["status"] == "ok"
    assert list(told["components"]) == ["engine m-0", "engine n-0", "lmcache", "catalogue"]
    assert all(one["ok"] and one["seconds"] >= 0 for one in told["components"].values())
    engines = hive.ask("GET", "/hive/v1/health/engine").json
    assert (engines["status"], set(engines["seconds"])) == ("ok", {"m-0", "n-0"})
    of_one = hive.ask("GET", "/hive/v1/health/engine?model=n").json
    assert set(of_one["seconds"]) == {"n-0"}
    assert hive.ask("GET", "/hive/v1/health/lmcache").json["status"] == "ok"


def test_any_key_may_ask_and_no_stranger(hive: Hive) -> None:
    for path in ("/hive/v1/health", "/hive/v1/health/engine", "/hive/v1/health/lmcache"):
        assert Owner(hive, "ada").ask("GET", path).status == 200
        assert Owner(hive, "nobody").ask("GET", path).status == 401


def test_an_engine_that_is_not_well_is_named(hive: Hive) -> None:
    """R093, R122: CWM-5001, without a URL or a path in the text."""
    hive.double("n").set(health_status=503)
    try:
        answer = hive.ask("GET", "/hive/v1/health/engine")
        assert told_by(answer) == (502, "ENGINE_UNREACHABLE", "CWM-5001")
        text = "Cannot connect to inference server: worker n-0 does not answer."
        assert answer.error["message"] == text
        assert answer.error["details"]["retryable"] is True
        assert hive.ask("GET", "/hive/v1/health/engine?model=m").status == 200
        told = hive.ask("GET", "/hive/v1/health").json
        assert told["status"] == "degraded"
        assert told["components"]["engine n-0"] == {
            "ok": False,
            "code": "ENGINE_UNREACHABLE",
            "found": text,
        }
        assert told["components"]["engine m-0"]["ok"]
        assert str(hive.home) not in str(told)
    finally:
        hive.double("n").set(health_status=200)


def test_an_engine_that_is_stopped_is_no_answer(hive: Hive) -> None:
    """R122"""
    assert hive.ask("POST", "/hive/v1/workers/n-0/stop").status < 300
    hive.wait_state("STOPPED", "n-0")
    answer = hive.ask("GET", "/hive/v1/health/engine?model=n")
    assert told_by(answer) == (502, "ENGINE_UNREACHABLE", "CWM-5001")
    assert answer.error["message"].endswith("worker n-0 is STOPPED.")
    assert hive.ask("POST", "/hive/v1/workers/n-0/start").status < 300
    hive.wait_ready()


def test_a_model_that_is_not_there_is_not_found(hive: Hive) -> None:
    answer = hive.ask("GET", "/hive/v1/health/engine?model=nobody")
    assert (answer.status, answer.code) == (404, "MODEL_NOT_FOUND")


def test_a_cache_server_that_is_not_well_is_told_and_engines_answer_on(hive: Hive) -> None:
    """R094, R123: CWM-5002; inference goes on without it (C6)."""
    hive.turn_cache(health_status=503)
    try:
        answer = hive.ask("GET", "/hive/v1/health/lmcache")
        assert told_by(answer) == (502, "KV_SERVER_UNREACHABLE", "CWM-5002")
        assert answer.error["details"]["retryable"] is True
        assert "://" not in answer.body.decode()
        told = hive.ask("GET", "/hive/v1/health").json
        assert told["status"] == "degraded"
        assert told["components"]["lmcache"]["code"] == "KV_SERVER_UNREACHABLE"
        assert hive.chat().status == 200
    finally:
        hive.turn_cache(health_status=200)


def test_a_lost_cache_is_degraded_until_its_engine_is_started_anew(hive: Hive) -> None:
    """R094, C6, C28: nothing is frozen meanwhile, requests are answered; then all is well again."""
    ada = Owner(hive)
    session = ada.session()
    os.kill(hive.worker("lmcache")["pid"], signal.SIGKILL)
    must(lambda: hive.ask("GET", "/hive/v1/health").json["status"] != "ok", 10, "its end")

    def is_well() -> bool:
        told = hive.ask("GET", "/hive/v1/health").json
        return bool(told["status"] == "ok" and hive.worker("m-0").get("cache") == "ok")

    must(is_well, 30, lambda: str(hive.ask("GET", "/hive/v1/health").json))
    must(lambda: ada.chat(session, said(30)).status == 200, 10, "an answer")
    assert ada.freeze(session, "after").status == 201
    assert ada.do("thaw", "after", {"require_full": True}).status == 200


@awaited
async def test_without_windows_there_is_no_cache_server_to_ask() -> None:
    async with serving() as it:
        answer, told = await it.ask("GET", "/hive/v1/health/lmcache")
        assert answer.status == 400
        assert told["error"]["details"]["number"] == "CWM-1003"
        answer, _ = await it.ask("GET", "/hive/v1/windows", **bearer("x"))
        assert answer.status == 404
        answer, told = await it.chat(X_Hive_Session="s")
        assert (answer.status, told["error"]["details"]["number"]) == (404, "CWM-2001")
