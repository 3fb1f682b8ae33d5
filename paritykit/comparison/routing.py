"""Tokens that two runs sent to other experts, where the measured error of the router's logits explains it.

A router of a mixture of experts sends each token to the experts of its largest logits. Where two of them are nearly
equal, an error within tolerance makes the other choice, and everything behind it differs: that token's rows from there
on, and those of later positions from the next attention on. Such a *flip* is no failure, and no parity either: what it
reaches is inconclusive. All else stays judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec
import torch

from paritykit.captures.manifest import CACHE_PORTS, Manifest, leading_points, point_key
from paritykit.comparison.judge import judge
from paritykit.comparison.metrics import measure
from paritykit.comparison.tolerance import Tolerance

SHOWN = 3


class Router(NamedTuple):
    """A router in the reference's execution order: its logits, and how many experts it chooses, 0 where not known.

    ``block`` is the point of the module around it, empty for none. What comes after ``order`` is behind it for the
    token itself, what comes after ``reach`` for later positions too.
    """

    key: str
    chosen: int
    order: int
    reach: int
    block: str = ""


class Flip(msgspec.Struct, frozen=True):
    """A token that went another way: the left side's margin between the swapped experts, the error of their logits."""

    router: str
    position: int
    margin: float
    error: float
    order: int
    reach: int

    def describe(self) -> str:
        """The flip in words."""
        return (
            f"expert flip at position {self.position} in {self.router}, "
            f"margin {self.margin:.2g} within twice the error {self.error:.2g}"
        )


class Rows(NamedTuple):
    """Both sides of a point, ``[tokens, features]``, at ``positions``."""

    positions: list[int]
    left: torch.Tensor
    right: torch.Tensor


class Rerouted(msgspec.Struct):
    """The flips of two runs of one case. ``opaque`` is the first router whose choice is not known, empty for none."""

    flips: list[Flip] = []
    opaque: str = ""
    opaque_order: int = 0

    def reached(self, positions: Iterable[int], *, order: int) -> set[int]:
        """Those positions whose rows are behind a flip, in a point at this place in execution order."""
        own = {f.position for f in self.flips if order > f.order}
        first = min((f.position for f in self.flips if order > f.reach), default=None)
        return {p for p in positions if p in own or (first is not None and p > first)}

    def behind_opaque(self, order: int) -> bool:
        """Whether a point at this place comes after a router whose choice is not known."""
        return bool(self.opaque) and order > self.opaque_order

    def describe(self, *, order: int) -> str:
        """The flips that a point at this place is behind, the first few in words."""
        found = [f for f in self.flips if order > f.order]
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return "; ".join(f.describe() for f in found[:SHOWN]) + more


def find_routers(reference: Manifest) -> list[Router]:
    """The routers of a reference, in order of execution; its fact ``routers`` says how many experts each chooses."""
    points = leading_points(reference.points)
    order = {k: n for n, k in enumerate(points)}
    told: dict[str, int] = reference.facts.get("routers", {})
    found = []
    for key, point in points.items():
        if "Router" in point.kind and not point.port:
            block = point_key(point.module.rpartition(".")[0], call=point.call)
            reach = _next_attention(list(points), after=order[key])
            found.append(
                Router(
                    key, told.get(point.module, 0), order[key], reach, block if order.get(block, 0) > order[key] else ""
                )
            )
    return found


def _next_attention(keys: Sequence[str], *, after: int) -> int:
    """The last point of the next attention that no later position has a part in: what it caches; ``after`` for none."""
    caches = [n for n, k in enumerate(keys) if n > after and k.rpartition("#")[2] in CACHE_PORTS]
    if not caches:
        return after
    module = keys[caches[0]].partition("#")[0]
    return max(n for n in caches if keys[n].partition("#")[0] == module)


def trace_flips(
    routers: Iterable[Router], rows: Callable[[str], Rows | None], allowed: Callable[[str], Tolerance]
) -> Rerouted:
    """The flips of two runs of one case, router by router; tokens that an earlier flip reaches are not looked at.

    ``rows(key)`` gives both sides of a point, None where one lacks it; ``allowed(key)`` its tolerance. A router whose
    logits are not within tolerance excuses nothing.
    """
    found = Rerouted()
    for router in sorted(routers, key=lambda r: r.order):
        seen = rows(router.key)
        if not router.chosen or seen is None or seen.left.shape[1] <= router.chosen:
            if not found.opaque:
                found.opaque, found.opaque_order = router.key, router.order
            continue
        away = found.reached(seen.positions, order=router.order)
        keep = [n for n, p in enumerate(seen.positions) if p not in away]
        if keep:
            own = Rows([seen.positions[n] for n in keep], seen.left[keep], seen.right[keep])
            flips = _flips(router, own, allowed(router.key))
            found.flips += _showing(flips, router, rows, allowed)
    return found


def _flips(router: Router, rows: Rows, allowed: Tolerance) -> list[Flip]:
    """Tokens that went or may have gone to other experts, where the logits are within tolerance."""
    if judge(measure(rows.left, rows.right), allowed)[0] != "pass":
        return []
    left, right = rows.left.double(), rows.right.double()
    ours, theirs = (chosen_experts(x, router.chosen) for x in (left, right))
    tied = boundary(left, router.chosen).eq(0) | boundary(right, router.chosen).eq(0)
    found = []
    for row in ((ours != theirs).any(1) | tied).nonzero().flatten().tolist():
        swapped = ours[row] != theirs[row]
        margin, error = 0.0, float((left[row] - right[row]).abs().max())
        if swapped.any():
            margin = float(left[row][swapped & ours[row]].max() - left[row][swapped & theirs[row]].min())
            error = float((left[row] - right[row])[swapped].abs().max())
        if margin <= 2 * error:
            found.append(Flip(router.key, rows.positions[row], margin, error, router.order, router.reach))
    return found


def _showing(
    flips: list[Flip], router: Router, rows: Callable[[str], Rows | None], allowed: Callable[[str], Tolerance]
) -> list[Flip]:
    """The flips after which the router's block gives another row: the others excuse nothing.

    Where the block is not shown, all that are more than a tie.
    """
    block = rows(router.block) if router.block and flips else None
    if block is None:
        return [f for f in flips if f.margin or f.error]
    limit, errors = allowed(router.block).whole, measure(block.left, block.right).row_rel_l2
    other = {p for p, e in zip(block.positions, errors, strict=True) if not e <= limit}
    return [f for f in flips if f.position in other]


def chosen_experts(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Which experts each token goes to, bool ``[tokens, experts]``; of equal logits the first counts."""
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, True)


def boundary(logits: torch.Tensor, count: int) -> torch.Tensor:
    """How far the last expert chosen is before the first that is not, ``[tokens]``."""
    ranked = logits.sort(dim=1, descending=True).values
    return ranked[:, count - 1] - ranked[:, count]
