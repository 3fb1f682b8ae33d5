"""Tokens that two runs sent to other experts, where the measured error of the router's logits explains it.

A router of a mixture of experts sends each token to the experts of its largest logits. Where two of them are nearly
equal, an error that is allowed makes the other choice, and everything behind it differs: that token's rows from there
on, and those of later positions from the next attention on. Such a *flip* is no failure, and no parity either: what it
reaches is inconclusive. All else stays judged.

The margin between experts that were exchanged is never more than twice the error of their logits: the other side's were
in the other order. So what decides is whether that error is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import torch

from paritykit.captures.manifest import CACHE_PORTS, Manifest, leading_points, point_key
from paritykit.comparison.judge import ranges
from paritykit.results import Finding

SHOWN = 3
LAYER = re.compile(r"(.*?\.\d+)(?:[.#@]|$)")


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
    """A token that went another way: both sides' experts, the left side's margin between those exchanged, their error.

    Where the experts are the same, two of them are tied, and the choice between these does not show in the logits.
    """

    router: str
    position: int
    experts: tuple[list[int], list[int]]
    margin: float
    error: float
    order: int
    reach: int

    def describe(self) -> str:
        """The flip in words."""
        ours, theirs = (", ".join(map(str, side)) for side in self.experts)
        what = f"experts {theirs} instead of {ours}" if ours != theirs else "a tie"
        return (
            f"expert flip at position {self.position} in {self.router}: {what}, "
            f"margin {self.margin:.2g} within twice the error {self.error:.2g}"
        )


class Rows(NamedTuple):
    """Both sides of a point, ``[tokens, features]``, at ``positions``."""

    positions: list[int]
    left: torch.Tensor
    right: torch.Tensor


class Sides(Protocol):
    """Two runs of one case, as far as routing goes."""

    def rows(self, key: str) -> Rows | None:
        """Both sides of a point, at the positions that both computed; None where one does not show it."""

    def sound(self, key: str, rows: Rows) -> Sequence[bool]:
        """For each of these rows of a router whether its error is allowed."""

    def same(self, key: str, rows: Rows) -> Sequence[bool]:
        """For each of these rows whether both sides are the same but for rounding."""


class Rerouted(msgspec.Struct):
    """The flips of two runs of one case. ``opaque`` is the first router whose choice is not known, empty for none."""

    flips: list[Flip] = []
    opaque: str = ""
    opaque_order: int = 0

    def reached(self, positions: Iterable[int], *, order: int, after: int = -1) -> set[int]:
        """Those positions whose rows are behind a flip, in a point at this place in execution order.

        Where all that came up to ``after`` was put right, only flips since then count.
        """
        flips = [f for f in self.flips if after < f.order]
        own = {f.position for f in flips if order > f.order}
        first = min((f.position for f in flips if order > f.reach), default=None)
        return {p for p in positions if p in own or (first is not None and p > first)}

    def behind_opaque(self, order: int) -> bool:
        """Whether a point at this place comes after a router whose choice is not known."""
        return bool(self.opaque) and order > self.opaque_order

    def excuse(self, positions: Iterable[int], *, order: int, half: bool) -> str:
        """Why these positions, all of them, may differ in a point at this place; empty where nothing says so.

        Behind a router whose choice is not known they may if the runs compute in ``half`` precision.
        """
        places = set(positions)
        if places and places == self.reached(places, order=order):
            return f"behind an {self.describe(order=order)}"
        if half and self.behind_opaque(order):
            return (
                f"behind {self.opaque}, whose choice of experts is not known: near-ties may flip in half precision; "
                "--dtype float32 checks the structure"
            )
        return ""

    def describe(self, *, order: int, after: int = -1) -> str:
        """The flips that a point at this place is behind, the first few in words."""
        found = [f for f in self.flips if after < f.order < order]
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
    """The last point of the next attention that no later position has a part in: what it caches.

    The last point of all behind the last layer; ``after`` itself where nothing is known of a next attention.
    """
    caches = [n for n, k in enumerate(keys) if n > after and k.rpartition("#")[2] in CACHE_PORTS]
    if not caches:
        return len(keys) if _in_last_layer(keys, at=after) else after
    module = keys[caches[0]].partition("#")[0]
    return max(n for n in caches if keys[n].partition("#")[0] == module)


def _in_last_layer(keys: Sequence[str], *, at: int) -> bool:
    own = LAYER.match(keys[at])
    return own is not None and {m[1] for k in keys[at:] if (m := LAYER.match(k))} == {own[1]}


def trace_flips(routers: Iterable[Router], sides: Sides) -> Rerouted:
    """The flips of two runs of one case, router by router; tokens that an earlier flip reaches are not looked at.

    Logits that are further off than they may be excuse nothing.
    """
    found = Rerouted()
    for router in sorted(routers, key=lambda r: r.order):
        seen = sides.rows(router.key)
        if not router.chosen or seen is None or seen.left.shape[1] <= router.chosen:
            if not found.opaque:
                found.opaque, found.opaque_order = router.key, router.order
            continue
        away = found.reached(seen.positions, order=router.order)
        keep = [n for n, p in enumerate(seen.positions) if p not in away]
        if keep:
            own = Rows([seen.positions[n] for n in keep], seen.left[keep], seen.right[keep])
            found.flips += _showing(_flips(router, own, sides), router, sides)
    return found


def _flips(router: Router, rows: Rows, sides: Sides) -> list[Flip]:
    """Tokens that went or may have gone to other experts, where the error of the logits is allowed."""
    left, right = rows.left.double(), rows.right.double()
    ours, theirs = (chosen_experts(x, router.chosen) for x in (left, right))
    tied = boundary(left, router.chosen).eq(0) | boundary(right, router.chosen).eq(0)
    other = ((ours != theirs).any(1) | tied) & left.isfinite().all(1) & right.isfinite().all(1)
    sound = sides.sound(router.key, rows) if other.any() else []
    return [
        _flip(router, rows.positions[row], (left[row], right[row]), (ours[row], theirs[row]))
        for row in other.nonzero().flatten().tolist()
        if sound[row]
    ]


def _flip(
    router: Router, position: int, logits: tuple[torch.Tensor, torch.Tensor], chosen: tuple[torch.Tensor, torch.Tensor]
) -> Flip:
    (left, right), (ours, theirs) = logits, chosen
    swapped, margin = ours != theirs, 0.0
    if swapped.any():
        margin = float(left[swapped & ours].max() - left[swapped & theirs].min())
    error = (left - right)[swapped if swapped.any() else slice(None)].abs().max()
    experts = ours.nonzero().flatten().tolist(), theirs.nonzero().flatten().tolist()
    return Flip(router.key, position, experts, margin, float(error), router.order, router.reach)


def _showing(flips: list[Flip], router: Router, sides: Sides) -> list[Flip]:
    """The flips after which the router's block gives another row: the others excuse nothing.

    Where the block is not shown, all that are more than a tie of equal logits.
    """
    block = sides.rows(router.block) if router.block and flips else None
    if block is None:
        return [f for f in flips if f.margin or f.error]
    same = {p for p, alike in zip(block.positions, sides.same(router.block, block), strict=True) if alike}
    return [f for f in flips if f.position not in same]


def judge_around(
    rerouted: Rerouted,
    places: list[int],
    *,
    order: int,
    half: bool,
    judged: Callable[[list[int]], Finding],
    after: int = -1,
) -> Finding:
    """What ``judged`` finds at ``places`` of a point, or where no flip reaches, if it fails.

    Inconclusive, with the reason, if all that fails is behind a flip. ``order``, ``half`` and ``after``: see
    ``Rerouted``. A NaN or Inf is excused by nothing.
    """
    found = judged(places)
    if found.verdict != "fail" or found.metric == "nonfinite_mismatch":
        return found
    reached = rerouted.reached(places, order=order, after=after)
    if reached:
        rest = [p for p in places if p not in reached]
        alone = judged(rest) if rest else None
        if alone is None or alone.verdict == "pass":
            flips = rerouted.describe(order=order, after=after)
            text = f"{len(reached)} of {len(places)} positions are behind an {flips}"
            behind = ranges(p for first, last in found.failing for p in range(first, last + 1) if p in reached)
            return msgspec.structs.replace(found, verdict="inconclusive", failing=behind, message=text)
        found = alone
    text = rerouted.excuse([], order=order, half=half) if found.verdict == "fail" else ""
    return msgspec.structs.replace(found, verdict="inconclusive", message=text) if text else found


def chosen_experts(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Which experts each token goes to, bool ``[tokens, experts]``; of equal logits the first counts."""
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, True)


def boundary(logits: torch.Tensor, count: int) -> torch.Tensor:
    """How far the last expert chosen is before the first that is not, ``[tokens]``."""
    ranked = logits.sort(dim=1, descending=True).values
    return ranked[:, count - 1] - ranked[:, count]
