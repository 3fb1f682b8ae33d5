"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paritykit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose: greedy at temperature 0; else at random among the ``top_k`` and within ``top_p``.

    ``top_k`` 0 and ``top_p`` 1 leave all. One ``seed`` gives one text, however the request is scheduled. ``logprobs``
    asks for that many of the best tokens' log probabilities, beside the chosen one's. Raises UsageError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logprobs: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"temperature must not be negative, not {self.temperature}")
        if self.top_k < 0 or self.logprobs < 0:
            raise UsageError(f"top_k and logprobs must not be negative, not {self.top_k} and {self.logprobs}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}")


GREEDY = Sampling()


def choose(logits: torch.Tensor, sampling: Sampling, *, number: int) -> int:
    """The new token with this ``number`` (from 0) of a request, from ``[vocabulary]``."""
    if not sampling.temperature:
        return int(logits.argmax())
    odds = probabilities(logits, sampling)
    generator = torch.Generator().manual_seed(hash((sampling.seed, number)) & (2**63 - 1))
    return int(torch.multinomial(odds.cpu(), 1, generator=generator))


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What a token is drawn from, ``[vocabulary]``: tempered, then cut to the best ``top_k``, then to ``top_p``.

    ``top_p`` keeps the fewest tokens whose probabilities reach it together (arXiv 1904.09751).
    """
    scores = logits.double() / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = scores.where(scores >= scores.topk(sampling.top_k).values[-1], float("-inf"))
    odds = scores.softmax(-1)
    if sampling.top_p < 1:
        best, order = odds.sort(descending=True, stable=True)
        before = best.cumsum(-1) - best
        odds = odds.index_fill(0, order[before >= sampling.top_p], 0.0)
    return odds / odds.sum()


def log_probabilities(logits: torch.Tensor, token: int, *, best: int) -> dict[int, float]:
    """Log probability, untempered, of ``token`` and of the ``best`` tokens, by token id."""
    logprobs = logits.double().log_softmax(-1)
    wanted = [token, *logprobs.topk(min(best, len(logprobs))).indices.tolist()]
    return {int(t): float(logprobs[t]) for t in wanted}
