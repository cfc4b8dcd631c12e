"""The chain of the audit log, as a law: nothing can be changed that nobody notices (AUDIT-001..010)."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.policy.chain import START, ZEROS, Broken, Link, opened, sealed

texts = st.text(max_size=20)
FACTS = st.dictionaries(texts, texts | st.integers(-(10**9), 10**9) | st.none(), max_size=4)


def chained(facts: list[dict[str, Any]]) -> list[bytes]:
    at, lines = START, []
    for one in facts:
        line, at = sealed(one, at)
        lines.append(line)
    return lines


def walked(lines: list[bytes]) -> Link:
    at = START
    for line in lines:
        _, at = opened(line, at)
    return at


def test_the_first_record_follows_zeros_and_has_the_index_0() -> None:
    record, link = opened(chained([{"action": "x"}])[0], START)

    assert (record["index"], record["previous_hash"]) == (0, "0" * 64) == (0, ZEROS)
    assert link == Link(0, record["hash"])


def test_the_hash_is_what_anybody_can_work_out() -> None:
    """As docs/audit.md says it: SHA-256 over the JSON without `hash`, keys sorted, no spaces."""
    line = chained([{"actor": "ä", "detail": {"b": 1, "a": None}}])[0]
    record = json.loads(line)
    told = record.pop("hash")

    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == told


@given(st.lists(FACTS, max_size=6))
def test_what_was_sealed_opens_again(facts: list[dict[str, Any]]) -> None:
    lines = chained(facts)

    assert walked(lines).index == len(facts) - 1
    for one, line in zip(facts, lines, strict=True):
        assert opened(line)[0].items() >= one.items()


@given(st.lists(FACTS, min_size=1, max_size=4), st.data())
def test_a_changed_byte_breaks_it(facts: list[dict[str, Any]], data: st.DataObject) -> None:
    lines = chained(facts)
    number = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[number]) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != lines[number][at]))
    lines[number] = lines[number][:at] + bytes([other]) + lines[number][at + 1 :]

    with pytest.raises(Broken):
        walked(b"".join(lines).splitlines(keepends=True))


@pytest.mark.parametrize(
    ("change", "index", "words"),
    [
        (lambda lines: lines[:1] + lines[2:], 1, "record 1 is missing: the index here is 2"),
        (lambda lines: lines[:1] + lines[4:], 1, "records 1 to 3 are missing"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 0, "record 0 is missing"),
        (lambda lines: lines[:2] + lines[1:], 2, "out of order: its index is 1, not 2"),
        (lambda lines: [*lines[:2], lines[2].replace(b"two", b"tow"), *lines[3:]], 2, "its hash"),
        (
            lambda lines: [*lines[:2], lines[2].replace(b":", b": ", 1), *lines[3:]],
            2,
            "not written",
        ),
        (lambda lines: [*lines[:2], b"[1]\n", *lines[3:]], 2, "no record"),
        (lambda lines: [*lines[:2], b"{}\n", *lines[3:]], 2, "no index"),
        (lambda lines: [*lines[:2], b"[" * 100_000 + b"\n", *lines[3:]], 2, "no JSON"),
    ],
)
def test_what_is_wrong_is_said_where_it_is(change: Any, index: int, words: str) -> None:
    lines = change(chained([{"n": name} for name in ("zero", "one", "two", "three", "four")]))

    with pytest.raises(Broken, match=words):
        walked(lines)
    assert walked(lines[:index]).index + 1 == index


@pytest.mark.parametrize("power", range(4, 18))
def test_what_nests_too_deeply_is_wrong_too(power: int) -> None:
    """Also where it can be read, and not be written again."""
    line = b'{"a": ' + b"[" * 2**power + b"]" * 2**power + b"}\n"

    with pytest.raises(Broken):
        opened(line)


def test_a_record_of_somebody_elses_chain_does_not_fit() -> None:
    mine, other = chained([{"a": 1}, {"a": 2}]), chained([{"b": 1}, {"b": 2}])

    with pytest.raises(Broken, match="previous_hash"):
        walked([mine[0], other[1]])
