"""Engines' own metrics: whatever engines say, the page that is made of it is valid."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from hive.telemetry.engines import openmetrics_text, plain_text
from hive.telemetry.exposition import LINE_CHARS, Told, Unreadable, merged, read

COUNTER = """
# HELP vllm:tokens_total Tokens that were generated.
# TYPE vllm:tokens_total counter
vllm:tokens_total{engine="0"} 7.0
# HELP vllm:tokens_created Tokens that were generated.
# TYPE vllm:tokens_created gauge
vllm:tokens_created{engine="0"} 1.7e+09
"""
GAUGE = """
# HELP vllm:running Requests.
# TYPE vllm:running gauge
vllm:running{engine="0"} 3
"""
HISTOGRAM = """
# HELP vllm:wait_seconds Time to wait.
# TYPE vllm:wait_seconds histogram
vllm:wait_seconds_bucket{le="0.5"} 1
vllm:wait_seconds_bucket{le="1"} 2
vllm:wait_seconds_bucket{le="+Inf"} 4
vllm:wait_seconds_count 4
vllm:wait_seconds_sum 9.5
# TYPE vllm:wait_seconds_created gauge
vllm:wait_seconds_created 1.7e+09
"""
SUMMARY = """
# HELP go_pause_seconds Pauses.
# TYPE go_pause_seconds summary
go_pause_seconds{quantile="0.5"} 0.25
go_pause_seconds{quantile="1"} NaN
go_pause_seconds_sum 1.5
go_pause_seconds_count 3
"""
UNTYPED = 'plain 3\nother{a="b"} 4\n'
EVERY_KIND = COUNTER + GAUGE + HISTOGRAM + SUMMARY + UNTYPED
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def texts(families: list[Metric]) -> tuple[str, str]:
    """The page in the text format, and in OpenMetrics."""
    return plain_text(families).decode(), openmetrics_text(families).decode()


def scraped(*engines: tuple[str, str]) -> Series:
    """What a scraper reads of engines (worker, what it says); the same in both formats."""
    plain, strict = texts(merged([read(text, worker) for worker, text in engines]))
    found = series(text_string_to_metric_families(plain))
    assert same(series(openmetrics_families(strict)), found)
    for name in [line.split()[2] for line in plain.splitlines() if line.startswith("# TYPE")]:
        assert plain.count(f"# TYPE {name} ") == 1
        assert plain.count(f"# HELP {name} ") == 1
    return found


def openmetrics_families(text: str) -> list[Metric]:
    return list(openmetrics.text_string_to_metric_families(text))  # type: ignore[no-untyped-call]


def series(families: Any) -> Series:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in families
        for sample in family.samples
    }


def same(one: Series, other: Series) -> bool:
    """NaN is NaN here."""
    return one.keys() == other.keys() and all(
        value == other[key] or (math.isnan(value) and math.isnan(other[key]))
        for key, value in one.items()
    )


def value(found: Series, name: str, **labels: str) -> float | None:
    return found.get((name, tuple(sorted(labels.items()))))


# ── What is kept ────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_family_comes_back_with_its_worker() -> None:
    found = scraped(("m-0", EVERY_KIND))

    assert value(found, "vllm:tokens_total", engine="0", worker="m-0") == 7
    assert value(found, "vllm:tokens_created", engine="0", worker="m-0") == 1.7e9
    assert value(found, "vllm:running", engine="0", worker="m-0") == 3
    assert value(found, "vllm:wait_seconds_bucket", le="1.0", worker="m-0") == 2
    assert value(found, "vllm:wait_seconds_bucket", le="+Inf", worker="m-0") == 4
    assert value(found, "vllm:wait_seconds_count", worker="m-0") == 4
    assert value(found, "vllm:wait_seconds_sum", worker="m-0") == 9.5
    assert value(found, "go_pause_seconds", quantile="0.5", worker="m-0") == 0.25
    assert math.isnan(value(found, "go_pause_seconds", quantile="1.0", worker="m-0") or 0.0)
    assert value(found, "plain", worker="m-0") == 3
    assert value(found, "other", a="b", worker="m-0") == 4
    assert {dict(labels)["worker"] for _, labels in found} == {"m-0"}
    assert len(found) == len([line for line in EVERY_KIND.splitlines() if line and line[0] != "#"])


def test_families_of_several_engines_are_one_with_one_help_and_one_type() -> None:
    told = [read(EVERY_KIND, worker) for worker in ("m-0", "m-1", "n-0")]
    families = merged(told)

    assert len(families) == len(told[0].families)
    assert [one.left_out for one in told] == [0, 0, 0]
    for family in families:
        assert {sample.labels["worker"] for sample in family.samples} == {"m-0", "m-1", "n-0"}
    scraped(("m-0", EVERY_KIND), ("m-1", EVERY_KIND), ("n-0", EVERY_KIND))


def test_an_engines_own_worker_label_is_kept_as_exported() -> None:
    told = 'x{worker="7"} 1\nx{worker="7",exported_worker="8"} 2\nx{exported_worker="9"} 3\n'
    found = scraped(("m-0", told))

    assert value(found, "x", worker="m-0", exported_worker="7") == 1
    assert value(found, "x", worker="m-0", exported_worker="8", exported_exported_worker="7") == 2
    assert value(found, "x", worker="m-0", exported_worker="9") == 3


def test_a_family_without_samples_is_nothing_that_is_left_out() -> None:
    """vLLM tells of some before their first event."""
    told = read("# HELP x X.\n# TYPE x counter\n" + GAUGE, "m-0")

    assert (list(told.families), told.left_out) == (["vllm:running"], 0)


def test_a_counter_without_its_ending_gets_it() -> None:
    found = scraped(("m-0", "# TYPE calls counter\ncalls 4\n"))

    assert found == {("calls_total", (("worker", "m-0"),)): 4}


@pytest.mark.parametrize("help_", ["# HELP x", "# HELP x   ", '# HELP x a "b" \\\\ \\n c', ""])
def test_a_help_is_one_line(help_: str) -> None:
    found = scraped(("m-0", f"{help_}\n# TYPE x gauge\nx 1\n"))

    assert found == {("x", (("worker", "m-0"),)): 1}


def test_buckets_come_in_the_order_of_their_bounds() -> None:
    bounds = ("+Inf", "10", "9")  # in whatever order they were told
    told = [f'h_bucket{{le="{bound}"}} 2\n' for bound in bounds]
    families = merged([read("# TYPE h histogram\nh_count 2\nh_sum 1\n" + "".join(told), "m-0")])
    plain, strict = texts(families)

    assert [plain.index(f'le="{bound}"') for bound in ("9.0", "10.0", "+Inf")] == sorted(
        plain.index(f'le="{bound}"') for bound in ("9.0", "10.0", "+Inf")
    )
    assert openmetrics_families(strict)


def test_a_time_of_a_sample_is_dropped() -> None:
    """It is of now; and one engine's clock is not another's."""
    plain, strict = texts(merged([read("# TYPE x gauge\nx 1 1700000000000\n", "m-0")]))

    assert 'x{worker="m-0"} 1.0\n' in plain
    assert 'x{worker="m-0"} 1.0\n' in strict


# ── What is left out ────────────────────────────────────────────────────────────────────────────


def histogram(*lines: str) -> str:
    return "# TYPE h histogram\n" + "".join(f"h_{line}\n" for line in lines)


LEFT_OUT: dict[str, str] = {
    "in hive's name": "# TYPE hive_in_flight gauge\nhive_in_flight 7\n",
    "a counter in hive's name": "# TYPE hive counter\nhive 7\n",
    "a name that is not classic": '# TYPE "a.b" gauge\n{"a.b"} 1\n',
    "a label that is not classic": '# TYPE x gauge\nx{"a.b"="1"} 1\n',
    "a counter below 0": "# TYPE c counter\nc_total -1\n",
    "a counter that is no number": "# TYPE c counter\nc_total NaN\n",
    "no last bucket": histogram('bucket{le="1"} 1', "count 1", "sum 1"),
    "buckets that fall": histogram('bucket{le="1"} 3', 'bucket{le="+Inf"} 2', "count 2", "sum 1"),
    "a count of its own": histogram('bucket{le="+Inf"} 2', "count 3", "sum 1"),
    "no count": histogram('bucket{le="+Inf"} 2', "sum 1"),
    "no sum": histogram('bucket{le="+Inf"} 2', "count 2"),
    "half an event": histogram('bucket{le="+Inf"} 2.5', "count 2.5", "sum 1"),
    "a bucket without a bound": histogram("bucket 2", 'bucket{le="+Inf"} 2', "count 2", "sum 1"),
    "a bucket of no number": histogram('bucket{le="x"} 2', "count 2", "sum 1"),
    "a negative bucket": histogram('bucket{le="-1"} 1', 'bucket{le="+Inf"} 2', "count 2", "sum 1"),
    "a quantile above 1": '# TYPE s summary\ns{quantile="2"} 1\ns_sum 1\ns_count 1\n',
    "a summary of nothing": "# TYPE s summary\n# TYPE s_created gauge\ns_created 3\n",
    "a kind that text has not": '# TYPE x info\nx{a="b"} 1\n',
    "twice with two types": "# TYPE x gauge\nx 1\n# TYPE y gauge\ny 1\n# TYPE x summary\nx_sum 1\n",
    "too large a number": f"# TYPE x gauge\nx {'9' * 400}\n",
}


@pytest.mark.parametrize("bad", LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_a_scraper_would_refuse_is_left_out_alone(bad: str) -> None:
    told = read(bad + GAUGE, "m-0")
    rest: Series = {("y", (("worker", "m-0"),)): 1.0} if "y 1" in bad else {}
    kept = scraped(("m-0", bad + GAUGE))
    without_bound = {key: found for key, found in kept.items() if key[0].startswith("h_")}

    assert told.left_out == 1
    if "bucket 2" not in bad:
        assert kept == {("vllm:running", (("engine", "0"), ("worker", "m-0"))): 3.0, **rest}
    else:  # the histogram is whole without it
        assert len(without_bound) == 3


def test_what_is_told_twice_counts_once() -> None:
    found = scraped(("m-0", '# TYPE x gauge\nx 1\nx 2\nx{a=""} 3\n'))

    assert found == {("x", (("worker", "m-0"),)): 1.0}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("# TYPE x gauge\nx 1\n", "# TYPE x counter\nx_total 1\n"),
        ("# TYPE x counter\nx_total 1\n", "# TYPE x_total gauge\nx_total 1\n"),
        ("# TYPE x_total gauge\nx_total 1\n", "# TYPE x counter\nx_total 1\n"),
        ("# TYPE x summary\nx_sum 1\nx_count 1\n", "# TYPE x_count gauge\nx_count 1\n"),
        ("# TYPE x_created gauge\nx_created 1\n", "# TYPE x counter\nx_total 1\n"),
    ],
)
def test_of_two_meanings_of_a_name_the_first_workers_stays(first: str, second: str) -> None:
    told = [read(first, "m-0"), read(second, "n-0")]
    families = merged(told)

    assert len(families) == 1
    assert {sample.labels["worker"] for sample in families[0].samples} == {"m-0"}
    assert [one.left_out for one in told] == [0, 1]
    scraped(("m-0", first), ("n-0", second))


@pytest.mark.parametrize(
    "text",
    [
        "<html><body>Not Found</body></html>",
        '{"detail": "ok"}',
        "x{a= 1\n",
        "# TYPE x\n",
        "# TYPE x nonsense\nx 1\n",
        "x one\n",
        'x{__reserved="1"} 1\n',
        f"# HELP x {'y' * LINE_CHARS}\nx 1\n",
    ],
)
def test_what_is_no_exposition_is_left_out_as_a_whole(text: str) -> None:
    with pytest.raises(Unreadable):
        read(GAUGE + text, "m-0")


def test_reading_stops_when_it_takes_too_long() -> None:
    left = iter(range(5))

    def check() -> None:
        if next(left, None) is None:
            raise Unreadable("too long")

    with pytest.raises(Unreadable, match="too long"):
        read(GAUGE * 100, "m-0", check)


# ── Whatever engines say ────────────────────────────────────────────────────────────────────────

NAMES = st.sampled_from(
    ["x", "x_total", "x_created", "x_count", "x_sum", "x_bucket", "hive_x", "vllm:y", '"a.b"', "9"]
)
LABELS = st.sampled_from(
    [
        *("", '{a="1"}', '{worker="w"}', '{le="1"}', '{le="+Inf"}', '{quantile="0.5"}', '{a=""}'),
        *('{a="\\n\\"\\\\"}', '{"b.c"="1"}', '{a="1",a="2"}', "{", '{a="\r\x00\u2028é"}'),
    ]
)
VALUES = st.sampled_from(["0", "1", "2", "3", "-1", "NaN", "+Inf", "1.5", "1e400", "x", "1 17", ""])
KINDS = st.sampled_from(["counter", "gauge", "histogram", "summary", "untyped", "unknown", "info"])
SAMPLES = st.builds("{}{} {}".format, NAMES, LABELS, VALUES)
LINES = st.one_of(
    SAMPLES,
    SAMPLES,
    st.builds("# TYPE {} {}".format, NAMES, KINDS),
    st.builds("# HELP {} {}".format, NAMES, st.text(max_size=10)),
)
PAGES = st.lists(LINES, max_size=12).map("\n".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(PAGES, PAGES, st.text(max_size=50)), max_size=3))
def test_whatever_engines_say_both_formats_can_be_read(pages: list[str]) -> None:
    told: list[Told] = []
    for number, page in enumerate(pages):
        try:
            told.append(read(page, f"m-{number}"))
        except Unreadable:
            continue
    plain, strict = texts(merged(told))
    found = series(text_string_to_metric_families(plain))

    assert same(series(openmetrics_families(strict)), found)
    assert not any(name.startswith("hive_") for name, _ in found)
    assert all(dict(labels)["worker"].startswith("m-") for _, labels in found)
