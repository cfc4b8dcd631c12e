"""Text of others steers no terminal, and loses nothing that can be read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.policy.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;PWN\x07 red", r"\x1b[2J\x1b]0;PWN\x07 red"),
        ("over\rwritten\x08", r"over\rwritten\x08"),
        ("\x9b31m \x7f", r"\x9b31m \x7f"),
        ("a\u202eb\u2066", r"a\u202eb\u2066"),
        ("not UTF-8: \udcff", r"not UTF-8: \udcff"),
        ("two\nlines, a\ttab, é, 中, 🐝", "two\nlines, a\ttab, é, 中, 🐝"),
    ],
)
def test_what_would_steer_the_terminal_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text())
def test_what_is_visible_can_be_printed_anywhere_and_stays_as_it_is(text: str) -> None:
    shown = visible(text)

    assert all(char.isprintable() or char in "\n\t" or ord(char) > 0x9F for char in shown)
    assert visible(shown) == shown
    shown.encode()
