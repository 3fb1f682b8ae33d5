"""Simpler judges, as engines' own tests have them, on the same captures: what they would have said.

All hold the candidate against Hugging Face in the candidate's own dtype, fed the same tokens, as those tests do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from paritykit.captures.reader import Capture
from paritykit.checks.base import LOGITS
from paritykit.comparison.align import pairs
from paritykit.mapping.build import Mapping
from paritykit.mapping.rules import Rule

LEAST_COSINE = 0.99
TOP = 5
JUDGES = {
    "allclose": "`torch.testing.assert_close` with its own tolerances of the dtype, at every point",
    "allclose-logits": "the same, at the logits only",
    "cosine": f"cosine of every layer's output at least {LEAST_COSINE}",
    "top-5": f"each side's choice among the other's {TOP} best, at every position",
}
"""By name, what each asks."""


def judge_simply(twin: Capture, candidate: Capture, mapping: Mapping) -> dict[str, bool]:
    """For each of ``JUDGES`` whether it would have failed the candidate."""
    rules = {r.reference: r for r in mapping.rules}
    found = dict.fromkeys(JUDGES, False)
    for key, rule in rules.items():
        for ours, theirs in both(rule, twin, candidate):
            far = not close(ours, theirs)
            found["allclose"] |= far
            if key == LOGITS:
                found["allclose-logits"] |= far
                found["top-5"] |= not choices_agree(ours, theirs)
            elif is_layer(key):
                found["cosine"] |= not cosine(ours, theirs) >= LEAST_COSINE
    return found


def both(rule: Rule, twin: Capture, candidate: Capture) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A point's rows of both sides in each case, ``[tokens, features]``."""
    for case in candidate.cases if rule.reference in twin.points else ():
        parts = list(pairs(rule, twin, candidate, case))
        if parts:
            yield torch.cat([left for _, left, _ in parts]), torch.cat([right for _, _, right in parts])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether ``torch.testing.assert_close`` accepts them, with the tolerances that it has for their dtype."""
    try:
        torch.testing.assert_close(theirs, ours, check_dtype=False)
    except AssertionError:
        return False
    return True


def cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Cosine of the angle between both, taken as one vector each; NaN where one holds none."""
    return float(torch.nn.functional.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), dim=0))


def choices_agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether at every position each side's largest logit is among the other's ``TOP``; both ``[tokens, vocab]``."""
    return _within(ours, theirs) and _within(theirs, ours)


def _within(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    best = theirs.topk(min(TOP, theirs.shape[-1]), dim=-1).indices
    return bool((best == ours.argmax(dim=-1, keepdim=True)).any(dim=-1).all())


def is_layer(key: str) -> bool:
    """Whether a point is the output of a decoder layer.

    >>> [is_layer(k) for k in ("model.layers.3", "model.layers.3.mlp", "model.layers.3#input", "h.0.experts.1")]
    [True, False, False, False]
    """
    *around, last = key.split(".")
    return last.isdecimal() and not any(part.isdecimal() for part in around)
