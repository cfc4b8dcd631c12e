"""The tools' table: what they take, what they say of themselves, and how metrics are read."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hive.mcp.tools import TOOLS, Arguments, Tool, _samples
from hive.policy.control import OPERATIONS

WANTED = {
    *("window_freeze", "window_thaw", "window_list", "window_status", "window_clone"),
    *("window_delete", "session_list", "cache_stats", "health_check", "get_metrics_data"),
    *("worker_list", "chat"),
}


def test_these_are_the_tools_and_each_has_its_row() -> None:
    """R176, R178: what a tool may do about a failure is in the table, and fits what it does."""
    assert set(TOOLS) == WANTED == set(OPERATIONS)
    for name, tool in TOOLS.items():
        assert OPERATIONS[name].changes is tool.changes, name


@pytest.mark.parametrize("tool", TOOLS.values(), ids=list(TOOLS))
def test_a_tool_says_what_it_does_and_what_each_argument_is(tool: Tool) -> None:
    assert tool.help.endswith((".", ")."))
    schema = tool.takes.model_json_schema()
    assert schema["additionalProperties"] is False
    for name, about in schema.get("properties", {}).items():
        assert about.get("description"), (tool.name, name)


def test_only_what_destroys_says_so() -> None:
    assert [tool.name for tool in TOOLS.values() if tool.destroys] == ["window_delete"]


def test_every_argument_is_refused_but_the_known() -> None:
    with pytest.raises(ValueError, match="extra"):
        Arguments.model_validate({"x": 1})


def test_metrics_become_numbers_without_buckets() -> None:
    text = """# TYPE hive_queue_seconds histogram
hive_queue_seconds_bucket{model="m",le="0.1"} 1.0
hive_queue_seconds_bucket{model="m",le="+Inf"} 2.0
hive_queue_seconds_count{model="m"} 2.0
hive_queue_seconds_sum{model="m"} 0.5
# TYPE hive_waiting gauge
hive_waiting{model="m"} 3.0
# TYPE process_open_fds gauge
process_open_fds 9.0
"""
    found = _samples(text_string_to_metric_families(text), ("hive_",))
    assert found == {
        "hive_queue_seconds_count": [{"labels": {"model": "m"}, "value": 2.0}],
        "hive_queue_seconds_sum": [{"labels": {"model": "m"}, "value": 0.5}],
        "hive_waiting": [{"labels": {"model": "m"}, "value": 3.0}],
    }
