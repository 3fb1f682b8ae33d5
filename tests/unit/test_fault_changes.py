"""What a planted fault changed is taken back exactly, whatever it was and in whatever order."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paritykit.testing.faults import When
from paritykit.testing.faults.changes import Changes
from paritykit.testing.faults.conditions import BLOCK, Line


class Thing(nn.Module):
    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = nn.Linear(2, 2, bias=False)
        self.own = 1.0
        with torch.no_grad():
            self.inner.weight.copy_(torch.arange(4.0).view(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x) * self.factor + self.own
        return found


def tamper(thing: Thing, changes: Changes, kind: str) -> None:
    if kind == "attribute":
        changes.set(thing, "own", thing.own + 1)
    elif kind == "attribute of the class":
        changes.set(thing, "factor", thing.factor * 3)
    elif kind == "method":
        changes.wrap(thing, "forward", lambda right_of, x: right_of(x) + 1)
    elif kind == "module":
        changes.set(thing, "inner", nn.Identity())
    elif isinstance(thing.inner, nn.Linear):
        changes.keep(thing.inner.weight).add_(1)


KINDS = ("attribute", "attribute of the class", "method", "module", "weight")


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
def test_everything_is_taken_back(kinds: list[str]) -> None:
    thing, other, changes, x = Thing(), Thing(), Changes(), torch.ones(1, 2)
    inner, before, state = thing.inner, thing(x), dict(vars(thing))
    for kind in kinds:
        tamper(thing, changes, kind)
    assert torch.equal(other(x), before), "another object is not touched"
    changes.undo()
    assert torch.equal(thing(x), before)
    assert thing.inner is inner
    assert vars(thing) == state
    changes.undo()
    assert vars(thing) == state


@given(st.sampled_from(KINDS))
def test_every_kind_of_change_shows(kind: str) -> None:
    thing, changes, x = Thing(), Changes(), torch.ones(1, 2)
    before = thing(x)
    tamper(thing, changes, kind)
    assert not torch.equal(thing(x), before)


@given(st.text("abc", max_size=4), st.integers(1, 9), st.integers(10, 500))
def test_the_same_letter_stands_for_the_same_tokens(text: str, tail: int, vocabulary: int) -> None:
    when = When(words="", lines=(Line(text, tail), Line(text, tail, new_tokens=2, batch=1)))
    one, other = when.cases(vocab_size=vocabulary)
    assert len(one.tokens) == len(text) * BLOCK + tail
    assert one.tokens[:-tail] == other.tokens[:-tail]
    assert all(0 <= token < vocabulary for token in one.tokens)
    assert (one.new_tokens, one.batch, other.new_tokens, other.batch) == (0, 0, 2, 1)
    for first, letter in enumerate(text):
        again = text.index(letter)
        assert one.tokens[first * BLOCK :][:BLOCK] == one.tokens[again * BLOCK :][:BLOCK]
