"""Choosing tokens: greedy, tempered, cut to the best, reproducible by seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paritykit.engines.nano.sampling import GREEDY, Sampling, choose, log_probabilities, probabilities
from paritykit.errors import UsageError

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def test_greedy() -> None:
    assert choose(LOGITS, GREEDY, number=0) == 1
    assert choose(LOGITS, Sampling(temperature=5.0, top_k=1), number=3) == 1


def test_temperature() -> None:
    torch.testing.assert_close(
        probabilities(LOGITS, Sampling(temperature=2.0)), (LOGITS.double() / 2).softmax(-1), rtol=1e-12, atol=0
    )


def test_top_k_and_top_p() -> None:
    odds = probabilities(LOGITS, Sampling(temperature=1.0, top_k=2))
    assert odds.nonzero().flatten().tolist() == [1, 2]
    assert float(odds.sum()) == pytest.approx(1.0)
    plain = LOGITS.double().softmax(-1)
    for top_p, kept in ((0.01, [1]), (float(plain[1]) + 1e-9, [1, 2]), (0.999, [0, 1, 2, 3])):
        found = probabilities(LOGITS, Sampling(temperature=1.0, top_p=top_p))
        assert found.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(probabilities(LOGITS, Sampling(temperature=1.0, top_k=99)), plain)


def test_draws_follow_the_odds_and_the_seed() -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    drawn = [choose(LOGITS, sampling, number=n) for n in range(2000)]
    assert drawn == [choose(LOGITS, sampling, number=n) for n in range(2000)]
    assert drawn != [choose(LOGITS, Sampling(temperature=1.0, seed=6), number=n) for n in range(2000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=4) / 2000
    assert (counts - LOGITS.softmax(-1)).abs().max() < 0.04


def test_log_probabilities() -> None:
    found = log_probabilities(LOGITS, 3, best=2)
    assert set(found) == {3, 1, 2}
    assert found[3] == pytest.approx(float(LOGITS.double().log_softmax(-1)[3]))
    assert len(log_probabilities(LOGITS, 0, best=99)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"top_k": -1}, "top_k and logprobs must not be negative"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
    ],
)
def test_what_it_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**arguments)
