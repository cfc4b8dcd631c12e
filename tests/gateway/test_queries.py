"""Numbers of a query: digits, from here to there, and nothing else."""

import pytest

from hive.gateway.queries import whole_number


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("10", 10), ("07", 7), ("7", 7)])
def test_a_number_within_its_bounds_is_read(text: str, number: int) -> None:
    assert whole_number(text, 1, 10) == number


@pytest.mark.parametrize(
    "text", ["", "0", "11", "-1", "+1", "1.0", "1e1", "x", " 1", "٣", "²", "1" * 5000]
)
def test_anything_else_is_none(text: str) -> None:
    assert whole_number(text, 1, 10) is None
