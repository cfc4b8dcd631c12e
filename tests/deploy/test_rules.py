"""deploy/prometheus and docs/runbooks.md: alerts that can fire, and lead to what to do.

S3's table of alerts is here (R255-R257), as far as it speaks of what hive does.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from docs import generate
from hive.errors import every_error
from hive.telemetry.metrics import Metrics
from hive.workers import lmcache
from tests.prometheus import DEPLOY, EXAMPLE, RULES, promtool
from tests.promql import Selector, groupings, selectors

CASES = sorted(RULES.parent.glob("*.test.yml"))
RUNBOOKS = Path(generate.DOCS) / "runbooks.md"
PARTS = ("Means", "Look first", "Causes", "Do", "Over")
SEVERITIES = {"critical", "warning", "info"}
# What Prometheus itself adds to every series, and what a histogram's parts have.
ADDED = {"job", "instance", "le", "alertname", "alertstate", "severity"}
OF_PROMETHEUS = {"up", "scrape_duration_seconds", "ALERTS"}
WORKERS = [("llama-0", "llama"), (lmcache.ID, lmcache.ID)]
# vLLM's own (vllm/v1/metrics/loggers.py of 0.32), with their labels; hive adds the worker.
ENGINES = {
    name: {"worker", "model_name", "engine"}
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_queries_total",
        "vllm:num_preemptions_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
    )
} | {"vllm:request_success_total": {"worker", "model_name", "engine", "finished_reason"}}


class Room:
    in_flight = waiting = 0


@cache
def rules() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


@cache
def known() -> dict[str, set[str]]:
    """Every series that hive, its engines or Prometheus itself can have, with its labels."""
    found: dict[str, set[str]] = dict(ENGINES)
    for metric in vars(metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            about = next(iter(metric.describe()))
            labels = set(metric._labelnames)
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
            for suffix in suffixes.get(about.type, [""]):
                found[f"{about.name}{suffix}"] = labels
    for rule in rules():
        if "record" in rule:  # its own labels are those that it groups by
            found[rule["record"]] = groupings(rule["expr"]) | {"model"}
    return found | {name: set() for name in OF_PROMETHEUS}


@cache
def metrics() -> Metrics:
    return Metrics(WORKERS, ["cuda:0"], {"llama": Room()})


def test_promtool_finds_nothing_wrong() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", RULES)
    promtool("check", "config", "--syntax-only", EXAMPLE)


def test_every_alert_fires_when_it_should_and_not_otherwise() -> None:
    """promtool runs the cases of *.test.yml (R255-R257)."""
    assert promtool("test", "rules", *CASES).count("SUCCESS") == len(CASES) == 2


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [case for file in CASES for case in yaml.safe_load(file.read_text())["tests"]]
    for name, alert in alerts().items():
        of_it = [
            (case["name"], check)
            for case in cases
            for check in case.get("alert_rule_test", [])
            if check["alertname"] == name
        ]
        fires = {case for case, check in of_it if check["exp_alerts"]}
        silent = {case for case, check in of_it if not check["exp_alerts"]}
        assert fires, f"{name} never fires"
        assert silent - fires, f"{name} always fires"
        # The one that fires does not do so before its time.
        assert "for" not in alert or silent & fires, f"{name}: nothing shows its {alert['for']}"


def test_an_alert_says_who_is_called_what_is_wrong_and_what_to_read() -> None:
    for name, alert in alerts().items():
        told = alert["annotations"]
        assert alert["labels"]["severity"] in SEVERITIES, name
        assert set(told) == {"summary", "description", "runbook_url"}, name
        assert told["runbook_url"] == f"docs/runbooks.md#{name.lower()}"
        assert all(told[part].endswith(".") for part in ("summary", "description")), name


# ── what the rules name ─────────────────────────────────────────────────────────────────────────


def expressions() -> dict[str, str]:
    return {str(rule.get("alert") or rule["record"]): rule["expr"] for rule in rules()}


def wrong_names(expr: str) -> list[str]:
    """What an expression names that there is not."""
    series = known()
    wrong = []
    used = set(ADDED)
    for selector in selectors(expr):
        if selector.name not in series:
            wrong.append(selector.name)
            continue
        used |= series[selector.name]
        labels = {label for label, _, _ in selector.matchers}
        wrong += [f"{selector.name}{{{one}}}" for one in labels - series[selector.name] - ADDED]
    return wrong + [f"by {one}" for one in groupings(expr) - used]


def wrong_values(expr: str) -> list[str]:
    """Values of labels that an expression asks for and that nothing ever has."""
    return [
        f'{selector.name}{{{label}="{value}"}}'
        for selector in selectors(expr)
        for label in {label for label, _, _ in selector.matchers} - ADDED
        for value in selector.wants(label)
        if not value.startswith("$") and not exists(selector, label, value)
    ]


@cache
def samples() -> list[Sample]:
    """What a hive tells that has just started."""
    return [
        sample
        for family in text_string_to_metric_families(generate_latest(metrics().registry).decode())
        for sample in family.samples
    ]


def exists(selector: Selector, label: str, value: str) -> bool:
    if label == "code":
        return value in {cls.code for cls in every_error()}
    there = {
        sample.labels[label]
        for sample in samples()
        if sample.name == selector.name and label in sample.labels
    }
    if not there:  # only told of in words, or recorded from what is
        text = metrics_in_words().get(selector.name, "") + recorded_in_words(selector.name)
        return re.search(rf"\b{re.escape(value)}\b", text) is not None
    return any(re.fullmatch(value, one) for one in there)


@cache
def metrics_in_words() -> dict[str, str]:
    found = [m for m in vars(metrics()).values() if isinstance(m, MetricWrapperBase)]
    abouts = [next(iter(metric.describe())) for metric in found]
    return {
        f"{one.name}{'_total' if one.type == 'counter' else ''}": one.documentation
        for one in abouts
    }


def recorded_in_words(name: str) -> str:
    """What the metrics that a recorded series is made of say of themselves."""
    made_of = [rule["expr"] for rule in rules() if rule.get("record") == name]
    words = metrics_in_words()
    return " ".join(words.get(one.name, "") for expr in made_of for one in selectors(expr))


def test_every_rule_names_what_there_is() -> None:
    wrong = {name: wrong_names(expr) + wrong_values(expr) for name, expr in expressions().items()}

    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    "expr",
    [
        "hive_request_total",
        'hive_requests_total{stat="200"}',
        "sum by (worker) (hive_requests_total)",
        "sum by (model) (hive_leaks_total)",
    ],
)
def test_a_name_that_is_wrong_is_noticed(expr: str) -> None:
    assert wrong_names(expr)


@pytest.mark.parametrize(
    "expr",
    [
        'hive_worker_state{state="READDY"}',
        'hive_worker_exits_total{cause=~"hung|hanging"}',
        'hive_request_failures_total{code="NO_SUCH_CODE"}',
        'hive_requests_total{status=~"6.."}',
    ],
)
def test_a_value_that_is_wrong_is_noticed(expr: str) -> None:
    assert wrong_names(expr) == []
    assert wrong_values(expr)


def test_what_an_alert_says_uses_labels_that_it_has() -> None:
    """promtool compares the texts; this finds a label that no case has either."""
    for name, alert in alerts().items():
        text = " ".join(alert["annotations"].values())
        series = known()
        labels = set(ADDED).union(*(series[one.name] for one in selectors(alert["expr"])))
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels, name


# ── what the runbooks name ──────────────────────────────────────────────────────────────────────


def entries() -> dict[str, str]:
    _, *parts = re.split(r"^### ", RUNBOOKS.read_text(), flags=re.MULTILINE)
    return {
        part.partition("\n")[0]: re.split(r"^## ", part, flags=re.MULTILINE)[0] for part in parts
    }


def test_every_alert_has_an_entry_and_every_entry_an_alert() -> None:
    assert list(entries()) == list(alerts()), "in the order of the rules"


def test_every_entry_says_what_to_look_at_and_what_to_do() -> None:
    for name, text in entries().items():
        found = re.findall(r"^- \*\*([^*]+)\*\* \S", text, flags=re.MULTILINE)
        assert tuple(found) == PARTS, name


def test_every_command_of_the_runbooks_exists() -> None:
    """With its options."""
    commands = {name: command for name, command, _ in generate.commands()}
    text = RUNBOOKS.read_text()
    quoted = re.findall(r"`(hive [a-z][^`]*)`", text)
    quoted += re.findall(r"^(hive [a-z][^#\n]*)", text, flags=re.MULTILINE)
    assert len(quoted) > 40
    for line in quoted:
        words = line.split()
        name = next(n for end in (3, 2) if (n := " ".join(words[:end])) in commands or end == 2)
        assert name in commands, line
        assert not isinstance(commands[name], click.Group), line
        options = {one for param in commands[name].params for one in param.opts} | {"--help"}
        assert {word for word in words if word.startswith("-")} <= options, line


def test_every_code_of_the_runbooks_exists() -> None:
    codes = {cls.code for cls in every_error()}
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", RUNBOOKS.read_text()))

    assert len(named) > 20
    assert named - {"HIVE_API_KEY", "ROW_REMAPPER"} <= codes


def test_every_setting_and_metric_of_the_runbooks_exists() -> None:
    page = (RUNBOOKS.parent / "configuration.md").read_text()
    text = RUNBOOKS.read_text()
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text)) - PHASES_AND_CAUSES - OF_RULES

    assert len(named) > 10
    assert [one for one in sorted(named) if f"{one}`" not in page] == []
    assert set(re.findall(r"\bhive_\w+", text)) <= known().keys()


PHASES_AND_CAUSES = {
    *("queue_timeout", "first_token", "out_of_memory", "member_lost", "guard_lost"),
    *("cache_lost", "gpu_memory_utilization"),  # vLLM's own argument
}
OF_RULES = {"runbook_url", "scrape_timeout", "pg_isready"}


def test_every_panel_that_the_runbooks_name_exists() -> None:
    titles = set(re.findall(r'"title": "([^"]+)"', (DEPLOY / "grafana/hive.json").read_text()))
    named = set(re.findall(r'"([A-Z][A-Za-z:, ]+)"', RUNBOOKS.read_text()))

    assert named
    assert named <= titles


def test_every_link_of_the_runbooks_leads_somewhere() -> None:
    text = RUNBOOKS.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        page, _, anchor = link.partition("#")
        target = RUNBOOKS.parent / page if page else RUNBOOKS
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in {one.lower().replace(" ", "-") for one in titles}, link
