"""deploy/grafana/hive.json: panels that have something to show.

A real Prometheus scrapes a hive under a load in which something of everything happens; then every
panel's query, and every rule, is put to it.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from steps.driver import Hive, Stream, new_hive
from steps.memory import blocks_of, window_folder
from steps.waiting import must
from tests.deploy.test_rules import alerts, rules, wrong_names, wrong_values
from tests.doubles.nvml import Gpus
from tests.prometheus import DEPLOY, Prometheus, complaints, server

DASHBOARD = DEPLOY / "grafana" / "hive.json"
CHAT = "/v1/chat/completions"
WORDS = " ".join(f"w{number}" for number in range(100))
KEYS = {"operator": ["admin", "inference"], "prometheus": ["metrics"]}
# Panels without a line in this load, each with the reason; one that has got a line must go.
ONLY_VLLM = "a histogram or counter of the real vLLM's that the engine double does not publish"
NO_DATA = {
    "Engines: time to first token": ONLY_VLLM,
    "Engines: time between tokens": ONLY_VLLM,
    "Engines: prefix cache hits": ONLY_VLLM,
    "Engines: preemptions": ONLY_VLLM,
}
# vLLM's own names, which promtool would leave to recorded series.
THEIR_NAMES = re.compile(r"vllm:\w+ metric names should not contain ':'")
# What Grafana puts in for its variables, with everything chosen.
VALUES = {"__rate_interval": "5s", "__range": "1m", "instance": ".*", "model": ".*", "worker": ".*"}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """The title and one expression of a panel, for each."""
    return [(panel["title"], t["expr"]) for panel in panels() for t in panel["targets"]]


def filled(expr: str, values: Mapping[str, str] = VALUES) -> str:
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expr)


# ── what can be known of the file ───────────────────────────────────────────────────────────────


def test_grafana_can_import_it() -> None:
    """No id of another Grafana's, one data source that is asked for, no two panels in one place."""
    board = dashboard()
    variables = {one["name"]: one for one in board["templating"]["list"]}
    ids = [panel["id"] for panel in board["panels"]]
    places: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & places, panel["title"]
        places |= cells

    assert board["id"] is None
    assert board["schemaVersion"] >= 37
    assert board["title"]
    assert board["uid"]
    assert variables["datasource"]["type"] == "datasource"
    assert {"instance", "model", "worker"} <= variables.keys()
    assert len(set(ids)) == len(ids)
    for part in [*panels(), *(t for p in panels() for t in p["targets"])]:
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_titles_are_unique_and_every_panel_has_a_query_and_a_unit() -> None:
    titles = [panel["title"] for panel in panels()]

    assert len(set(titles)) == len(titles)
    for panel in panels():
        assert panel["targets"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(one["legendFormat"] for one in panel["targets"]), panel["title"]


def test_every_panel_names_what_there_is() -> None:
    wrong = {
        f"{title}: {expr}": wrong_names(expr) + wrong_values(expr) for title, expr in queries()
    }

    assert {where: found for where, found in wrong.items() if found} == {}


def test_only_variables_that_exist_are_used() -> None:
    board = dashboard()
    there = {one["name"] for one in board["templating"]["list"]} | VALUES.keys()
    text = " ".join(
        [expr for _, expr in queries()] + [a["expr"] for a in board["annotations"]["list"]]
    )

    assert set(re.findall(r"\$\{?(\w+)", text)) <= there


# ── a load in which something of everything happens ─────────────────────────────────────────────


def key(name: str) -> str:
    return f"hive_{name}_0123456789abcdef0123456789abcdef"


@contextmanager
def watched_hive() -> Iterator[tuple[Hive, Prometheus]]:
    """A hive with two models, one of them on a GPU and with windows, and who scrapes it."""
    with server() as prometheus, new_hive() as hive:
        gpus = Gpus(hive.home / "gpu")
        gpus.add()
        hive.env |= gpus.env
        for name, scopes in KEYS.items():
            digest = hashlib.sha256(key(name).encode()).hexdigest()
            hive.keys.append(
                {"name": name, "sha256": digest, "scopes": scopes, "max_concurrent": 0}
            )
        hive.key = key("operator")
        hive.sections["server"]["gpu_error_policy"] = "quarantine"
        hive.sections["windows"] = {"kv_chunk_tokens": 16, "kv_tier_gib": 1, "kv_ram_gib": 0.1}
        hive.model("llama", device="cuda:0", windows=True)
        hive.model("mistral", max_concurrent=2, queue_depth=1)
        hive.start()
        prometheus.start(hive.port, key("prometheus"))
        must(lambda: prometheus.query("hive_in_flight"), 10, "the first scrape")
        load(hive, gpus)
        assert prometheus.has_evaluated()  # of all that was counted
        yield hive, prometheus


def load(hive: Hive, gpus: Gpus) -> None:
    """Some seconds of good answers, and of each thing that can go wrong."""
    double = hive.double("mistral")
    for number in range(20):
        assert hive.chat("llama", f"a{number}").status == 200
        assert hive.chat("mistral", f"b{number}").status == 200
    one_of_each_failure(hive)
    gpus.xid(0, 31)  # an application's own
    remember(hive)
    double.set(hang_up=1)
    assert hive.chat("mistral", "again").status == 200
    streams = crowd(hive)
    double.die("segv")
    for stream in streams:
        stream.wait_for_end()
    must(lambda: hive.worker("mistral-0")["starts"] == 2, 15, "a new start")
    hive.wait_state("READY", "mistral-0")
    assert hive.chat("mistral", "after").status == 200


def one_of_each_failure(hive: Hive) -> None:
    assert hive.ask("POST", CHAT, {"model": "nobody"}).status == 404
    assert hive.ask("POST", CHAT, b"{").status == 400
    assert hive.ask("POST", CHAT, b"{}", {"Authorization": "Bearer wrong"}).status == 401
    hive.double("mistral").set(first_token_s=2)
    late = {"X-Hive-Timeout": "0.2"}
    body = {"model": "mistral", "messages": [{"role": "user", "content": "late"}]}
    assert hive.ask("POST", CHAT, body, late).status == 504
    hive.double("mistral").set(first_token_s=0)


def crowd(hive: Hive) -> list[Stream]:
    """Two that are answered slowly, one that waits, the others refused; then they are as slow."""
    double = hive.double("mistral")
    double.wait_running(0)
    double.set(token_s=0.05)
    for turn in range(2):
        streams = [hive.chat_stream("mistral", f"crowd {turn} {number}") for number in range(6)]
        for stream in streams:
            stream.wait_for_end()
        assert {stream.status for stream in streams} == {200, 503}
    return [hive.chat_stream("mistral", f"last {number}", max_tokens=200) for number in range(2)]


def remember(hive: Hive) -> None:
    """A window is frozen, and thawed; then it is damaged, and is not."""
    session = hive.ask("POST", "/hive/v1/sessions", {"model": "llama"}).json["id"]
    said = [{"role": "user", "content": WORDS}]
    in_session = {"X-Hive-Session": session}
    body = {"model": "llama", "messages": said, "max_tokens": 40}
    assert hive.ask("POST", CHAT, body, in_session).status == 200
    frozen = {"session_id": session, "name": "monday"}
    done = hive.ask("POST", "/hive/v1/windows", frozen, timeout_s=60)
    assert done.status == 201, done.body
    thawed = hive.ask("POST", "/hive/v1/windows/monday/thaw", {}).json
    went_on = {**body, "messages": [*thawed["messages"], {"role": "user", "content": "and?"}]}
    assert hive.ask("POST", CHAT, went_on, {"X-Hive-Session": thawed["session_id"]}).status == 200
    blocks_of(window_folder(hive, named="monday"))[0].write_bytes(b"damaged")
    whole = hive.ask("POST", "/hive/v1/windows/monday/thaw", {"require_full": True})
    assert whole.code == "STORAGE_CORRUPTED", whole.body


def test_a_real_prometheus_answers_every_panel_and_every_rule() -> None:
    """Of a hive with two models under a load; its page is valid for promtool, too (R254)."""
    began = time.time()
    with watched_hive() as (hive, prometheus):
        ended = time.time() + 1  # what was scraped last is drawn, too
        empty = {
            title
            for title, expr in queries()
            if not has_line(prometheus.history(filled(expr), began, ended))
        }
        assert empty == set(NO_DATA), "give it a load, or name it with the reason"

        for rule in rules():
            prometheus.query(rule["expr"])
        assert len(prometheus.rules()) == len(rules())
        recorded = {rule["record"] for rule in rules() if "record" in rule}
        assert {name for name in recorded if not prometheus.query(name)} == set()

        firing = {
            one["metric"]["alertname"] for one in prometheus.query('ALERTS{alertstate="firing"}')
        }
        expected = {"HiveWorkerCrashed", "HiveTimeout", "HiveXid", "HiveWindowCorrupted"}
        assert expected <= firing
        critical = {n for n, a in alerts().items() if a["labels"]["severity"] == "critical"}
        assert not firing & critical, "nobody is woken for what gets better by itself"

        said = complaints(hive.ask("GET", "/metrics").body.decode())
        assert [one for one in said if not THEIR_NAMES.fullmatch(one)] == []


def has_line(series: list[dict[str, Any]]) -> bool:
    return any(not math.isnan(float(value)) for one in series for _, value in one["values"])
