"""States and prefixes; blocks are named as the real LMCache names them."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.policy.windows import (
    MOST_NAME,
    NEXT,
    Identity,
    SessionState,
    Shape,
    block_names,
    chain,
    shared_prefix,
    usable,
)

IDENTITY = Identity("/m", "", "f" * 32, "auto", "auto", 1, 256, 16, "vllm 0.32.0", "a" * 16)
LMCACHE = Path(__file__).with_name("lmcache_names.json")  # lmcache_names.py has made it


@pytest.mark.parametrize("case", json.loads(LMCACHE.read_text()), ids=lambda case: case["model"])
def test_blocks_are_named_as_lmcache_names_them(case: dict[str, Any]) -> None:
    shape = Shape(case["model"], case["workers"], case["chunk_tokens"])
    for prompt in case["prompts"]:
        hashes = chain(prompt["tokens"], shape.chunk_tokens)

        assert [block_names(shape, one, case["salt"]) for one in hashes] == prompt["blocks"]
    assert any(prompt["blocks"] for prompt in case["prompts"])


@given(st.lists(st.integers(0, 2**32 - 1), max_size=200), st.integers(1, 20), st.integers(0, 199))
def test_a_token_changes_its_own_chunk_and_all_behind_it(
    tokens: list[int], chunk: int, at: int
) -> None:
    """So a block proves everything before it."""
    before = chain(tokens, chunk)
    assert len(before) == len(tokens) // chunk
    if at < len(tokens):
        tokens[at] ^= 1
        after = chain(tokens, chunk)
        kept = at // chunk
        assert after[:kept] == before[:kept]
        assert all(new != old for new, old in zip(after[kept:], before[kept:], strict=True))


@pytest.mark.parametrize("token", [-1, 2**32])
def test_what_is_no_token_has_no_hash(token: int) -> None:
    with pytest.raises(ValueError, match="a number from 0"):
        chain([token], 1)


@pytest.mark.parametrize(
    ("model", "salt", "finding"),
    [
        ("/m@1", "s", "'@' is in"),
        ("/m", "a@b", "'@' is in"),
        ("/" + "m" * 200, "s", f"more than {MOST_NAME} bytes"),
    ],
)
def test_what_lmcache_could_not_keep_has_no_name(model: str, salt: str, finding: str) -> None:
    with pytest.raises(ValueError, match=finding):
        block_names(Shape(model, 1, 32), bytes(32), salt)


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 512))
def test_a_prefix_ends_at_the_first_gap(found: list[bool], chunk: int) -> None:
    """(C27)"""
    told = usable(found, chunk)

    assert told.blocks_found + told.blocks_missing == len(found)
    assert told.usable_tokens + told.recompute_tokens == len(found) * chunk
    assert all(found[: told.usable_tokens // chunk])
    assert told.is_partial is (told.usable_tokens < len(found) * chunk)
    if told.is_partial:
        assert not found[told.usable_tokens // chunk]


def test_the_states_are_those_that_were_decided() -> None:
    """(C24)"""
    state = SessionState
    may = {old: {new for new in state if new in NEXT[old]} for old in state}

    assert may == {
        state.ACTIVE: {state.FROZEN, state.EXPIRED, state.DELETED},
        state.FROZEN: {state.THAWED, state.DELETED},
        state.THAWED: {state.ACTIVE, state.FROZEN, state.DELETED},
        state.EXPIRED: {state.DELETED},
        state.DELETED: set(),
    }


tokens = st.lists(st.integers(0, 2), max_size=6)


@given(st.lists(tokens, max_size=4), tokens)
def test_the_shared_prefix_is_the_longest_that_all_begin_with(
    rendered: list[list[int]], begin: list[int]
) -> None:
    rendered = [begin + one for one in rendered]
    shared = shared_prefix(rendered)

    assert all(one[: len(shared)] == shared for one in rendered)
    if not rendered:
        assert shared == []
        return
    assert shared[: len(begin)] == begin
    following = {tuple(one[len(shared) : len(shared) + 1]) for one in rendered}
    assert len(following) > 1 or following == {()}


def test_one_rendering_is_its_own_prefix() -> None:
    assert shared_prefix([[1, 2, 3]]) == [1, 2, 3]
    assert shared_prefix([(1, 2), [1, 2, 3]]) == [1, 2]


DIFFERENT: dict[str, Any] = {
    "weights": "e" * 32,
    "dtype": "half",
    "kv_dtype": "fp8",
    "tensor_parallel_size": 2,
    "chunk_tokens": 64,
    "block_size": 32,
    "engine_version": "vllm 0.33.0",
    "arguments": "b" * 16,
}


@given(st.sets(st.sampled_from(sorted(DIFFERENT))), st.text(), st.text())
def test_what_forbids_the_use_of_blocks_is_named(names: set[str], path: str, revision: str) -> None:
    """All of it, in the order of the fields; where the files are is nobody's concern."""
    other = replace(IDENTITY, path=path, revision=revision, **{n: DIFFERENT[n] for n in names})
    differs = IDENTITY.differs_in(other)

    assert set(differs) == names
    assert differs == [field.name for field in fields(Identity) if field.name in names]
    assert other.differs_in(IDENTITY) == differs


def test_every_field_of_an_identity_is_compared_or_is_a_place() -> None:
    assert {field.name for field in fields(Identity)} == {*DIFFERENT, "path", "revision"}
