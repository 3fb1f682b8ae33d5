"""Tokens that two sides chose: where they differ, whether the measured logit error explains it.

A different choice is a *near-tie*, and no failure, where the left side's own margin between the two tokens is within
twice the logit error measured at that position, and that error is itself within tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch

from paritykit.comparison.metrics import measure
from paritykit.comparison.tolerance import Tolerance
from paritykit.results import Finding

SHOWN = 3


class Choice(msgspec.Struct, frozen=True):
    """A token both sides chose at one step: ids, the left side's margin between them, and the logit error there."""

    step: int
    left: int
    right: int
    margin: float
    error: float
    sound: bool

    @property
    def near_tie(self) -> bool:
        """Whether the measured error explains the difference."""
        return self.sound and self.margin <= 2 * self.error

    def describe(self, *, sides: tuple[str, str]) -> str:
        """The choice in words."""
        kind = "near-tie" if self.near_tie else "flip"
        return (
            f"new token {self.step}: {self.left} in {sides[0]}, {self.right} in {sides[1]}; {kind}: "
            f"margin {self.margin:.3g}, logit error {self.error:.3g}"
        )


def choice_at(step: int, tokens: tuple[int, int], logits: tuple[torch.Tensor, torch.Tensor], *, sound: bool) -> Choice:
    """The choice of two tokens by their ``logits``, ``[vocabulary]`` each; ``sound`` where these may differ so."""
    left, right = (row.double() for row in logits)
    margin, error = left[tokens[0]] - left[tokens[1]], (left - right).abs().max()
    return Choice(step, *tokens, float(margin), float(error), sound)


def logits_within(logits: tuple[torch.Tensor, torch.Tensor], allowed: Tolerance) -> bool:
    """Whether the logits of one position differ by no more than ``allowed``."""
    left, right = (row.double() for row in logits)
    return measure(left[None], right[None]).rel_l2 <= allowed.position


def compare_choices(
    left: Sequence[int], right: Sequence[int], weigh: Callable[[int], Choice], *, sides: tuple[str, str], stop: bool
) -> tuple[list[Choice], str]:
    """The choices that differ and no near-tie explains, and in words what differs.

    ``weigh(step)`` looks at one; ``stop`` after the first, where what follows continues another text.
    """
    steps = [n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b]
    choices = [weigh(n) for n in (steps[:1] if stop else steps)]
    flips = [c for c in choices if not c.near_tie]
    return flips, "; ".join(c.describe(sides=sides) for c in (flips or choices)[:SHOWN])


def choice_finding(
    *,
    check: str,
    case: str,
    point: str,
    order: int,
    flips: int,
    total: int,
    message: str,
    error: bool = False,
    excuse: str = "",
) -> Finding:
    """The finding of ``total`` choices of which ``flips`` are not explained; inconclusive where ``excuse`` says why."""
    excused = bool(flips and excuse)
    return Finding(
        check=check,
        case=case,
        point=point,
        verdict="error" if error else "inconclusive" if excused else "fail" if flips else "pass",
        metric="flips",
        value=float(flips),
        allowed=0.0,
        allowed_source="flips beyond the measured logit error",
        order=order,
        message=f"{message}; {excuse}" if excused else message,
        metrics={"new_tokens": float(total)},
        mapping="greedy choices, token by token",
    )
