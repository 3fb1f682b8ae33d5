"""The block manager: nothing leaks, nothing is shared by accident, what is cached is what was computed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.engines.nano.blocks import BlockManager


def check(blocks: BlockManager, keys: list[str]) -> None:
    held = Counter(b for key in keys for b in blocks.table(key))
    assert [held[n] for n in range(len(blocks.references))] == blocks.references
    assert sorted(blocks.free) == [n for n, count in enumerate(blocks.references) if not count]
    assert all(len(set(blocks.table(k))) == len(blocks.table(k)) for k in keys)


def start(blocks: BlockManager, key: str, tokens: list[int], *, salt: int = 0) -> int:
    """Admit, reserve and seal a whole prompt; returns the tokens found."""
    found = min(blocks.admit(key, tokens, salt=salt), len(tokens) - 1)
    assert blocks.reserve(key, found, len(tokens)) is not None
    blocks.seal(key, tokens, len(tokens))
    return found


def test_blocks_are_taken_and_given_back() -> None:
    blocks = BlockManager(4, 3)
    assert blocks.admit("a", range(7)) == 0
    assert blocks.reserve("a", 0, 7) == []
    assert blocks.table("a") == [0, 1, 2]
    assert blocks.reserve("a", 7, 9) == []
    assert len(blocks.table("a")) == 3
    blocks.admit("b", range(4))
    assert blocks.reserve("b", 0, 4) is None
    assert blocks.table("b") == []
    check(blocks, ["a", "b"])
    blocks.release("a")
    blocks.release("a")
    assert blocks.reserve("b", 0, 4) == []
    blocks.release("b")
    check(blocks, [])
    assert len(blocks.free) == 4


def test_a_prefix_is_found_by_whole_blocks_only() -> None:
    blocks = BlockManager(20, 3, prefix_caching=True)
    assert start(blocks, "a", [1, 2, 3, 4, 5, 6, 7]) == 0
    assert start(blocks, "b", [1, 2, 3, 4, 5, 0, 0]) == 3
    assert blocks.table("b")[0] == blocks.table("a")[0]
    assert start(blocks, "c", [0, 2, 3, 4, 5, 6, 7]) == 0
    check(blocks, ["a", "b", "c"])
    assert start(blocks, "d", [1, 2, 3, 4, 5, 6, 7], salt=7) == 0


def test_the_same_tokens_after_other_tokens_are_another_block() -> None:
    blocks = BlockManager(10, 2, prefix_caching=True)
    start(blocks, "a", [1, 1, 2, 2])
    assert start(blocks, "b", [2, 2, 5]) == 0


def test_a_freed_block_is_revived_until_it_is_used_anew() -> None:
    blocks = BlockManager(3, 2, prefix_caching=True)
    start(blocks, "a", [1, 2, 3, 4, 5])
    blocks.release("a")
    assert sorted(blocks.free) == [0, 1, 2]
    assert start(blocks, "b", [1, 2, 3, 4, 9]) == 4
    blocks.release("b")
    start(blocks, "c", [7, 7, 7, 7, 7])
    blocks.release("c")
    assert start(blocks, "d", [1, 2, 3, 4, 5]) == 0
    check(blocks, ["d"])


def test_a_prompt_found_whole_is_copied_before_its_last_token_is_written() -> None:
    blocks = BlockManager(5, 2, prefix_caching=True)
    start(blocks, "a", [1, 2, 3, 4])
    assert blocks.admit("b", [1, 2, 3, 4]) == 4
    shared = blocks.table("b")[1]
    assert blocks.reserve("b", 3, 4) == [(shared, blocks.table("b")[1])]
    assert blocks.table("b")[0] == blocks.table("a")[0]
    assert blocks.table("b")[1] != shared
    check(blocks, ["a", "b"])


def test_a_prompt_found_whole_and_held_by_nobody_needs_no_copy() -> None:
    blocks = BlockManager(2, 2, prefix_caching=True)
    start(blocks, "a", [1, 2, 3, 4])
    blocks.release("a")
    assert blocks.admit("b", [1, 2, 3, 4]) == 4
    assert blocks.reserve("b", 3, 4) == []
    assert len(blocks.cached) == 1
    check(blocks, ["b"])


def test_whoever_writes_first_gets_the_copy() -> None:
    blocks = BlockManager(4, 2)
    blocks.admit("a", [1, 2, 3])
    blocks.reserve("a", 0, 3)
    blocks.share("a", "b")
    check(blocks, ["a", "b"])
    assert blocks.reserve("a", 3, 4) == [(1, 2)]
    assert blocks.reserve("b", 3, 4) == []
    assert (blocks.table("a"), blocks.table("b")) == ([0, 2], [0, 1])
    check(blocks, ["a", "b"])


def test_too_few_blocks_change_nothing() -> None:
    blocks = BlockManager(3, 2)
    blocks.admit("a", range(4))
    blocks.reserve("a", 0, 4)
    blocks.share("a", "b")
    before = blocks.table("b")
    assert blocks.reserve("b", 3, 6) is None
    assert blocks.table("b") == before
    check(blocks, ["a", "b"])


@given(data=st.data(), size=st.integers(1, 4), caching=st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_sequence_of_calls_leaks(data: st.DataObject, size: int, caching: bool) -> None:
    blocks = BlockManager(8, size, prefix_caching=caching)
    texts: dict[str, list[int]] = {}
    for n in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["start", "grow", "share", "release"] if texts else ["start"]))
        key = data.draw(st.sampled_from(sorted(texts))) if texts else ""
        if what == "start":
            text = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=10))
            found = min(blocks.admit(str(n), text), len(text) - 1)
            if blocks.reserve(str(n), found, len(text)) is None:
                blocks.release(str(n))
            else:
                texts[str(n)] = text
                blocks.seal(str(n), text, len(text))
        elif what == "grow":
            if blocks.reserve(key, len(texts[key]), len(texts[key]) + 1) is not None:
                texts[key] = [*texts[key], 1]
                blocks.seal(key, texts[key], len(texts[key]))
        elif what == "share":
            blocks.share(key, str(n))
            texts[str(n)] = list(texts[key])
        else:
            blocks.release(key)
            del texts[key]
        check(blocks, list(texts))
    for key in texts:
        blocks.release(key)
    check(blocks, [])
    assert len(blocks.free) == 8


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (1, 1), (3, 1), (4, 2)])
def test_blocks_for(length: int, expected: int) -> None:
    assert BlockManager(1, 3).blocks_for(length) == expected
