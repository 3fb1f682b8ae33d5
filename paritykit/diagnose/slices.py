"""Which part of a module's output is wrong: ranks, heads, elements of every head, features, or experts.

A slice is named only where it tells something: some of its kind are beyond what is allowed, others are not, what is
wrong is nearly all in those, and far more wrong there than in the others. Which positions are wrong a finding says
itself (``failing``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

import torch

from paritykit.captures.manifest import CACHE_PORTS, Manifest, Point, leading_points, point_key
from paritykit.captures.reader import Capture
from paritykit.comparison.align import own_rows, pairs
from paritykit.comparison.floor import chance
from paritykit.comparison.guard import DEGREES
from paritykit.comparison.judge import ranges
from paritykit.comparison.routing import chosen_experts, find_routers
from paritykit.diagnose.limits import allowed_of, floor_of
from paritykit.mapping.rules import Rule
from paritykit.results import Finding, Slice

HELD = 0.9
"""Share of the squared error that must lie in the wrong part."""
CONTRAST = 5.0
"""Times that the wrong part must be further off than the rest, each for its size."""
PIECES = 8
"""A part of more stretches than that is no part that somebody cut."""
MOST = 0.5
"""Single features are named where they are no more than this share of all."""
WEIGHTY = 0.25
"""Share of a token's output from which on an expert is seen in it."""
MOST_EXPERTS = 4
"""Experts that are told apart at most."""


class Axis(NamedTuple):
    """A way to cut features into groups: ``of`` so many; ``group[i]`` is that of feature ``i``."""

    name: str
    of: int
    group: torch.Tensor


class Errors:
    """Squared error and size of every feature, summed over rows, and the error and size of every row."""

    def __init__(self, features: int) -> None:
        self.error = torch.zeros(features, dtype=torch.float64)
        self.size = torch.zeros(features, dtype=torch.float64)
        self.places: list[int] = []
        self.rows: list[tuple[float, float]] = []

    def update(self, position: int, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Consecutive rows from ``position`` on, ``[tokens, features]`` each; those with a NaN or Inf are left out."""
        keep = reference.isfinite().all(1) & candidate.isfinite().all(1)
        left, right = reference[keep].double(), candidate[keep].double()
        error, size = (right - left).pow(2), left.pow(2)
        self.error += error.sum(0).cpu()
        self.size += size.sum(0).cpu()
        self.places += [position + n for n in keep.nonzero().flatten().tolist()]
        self.rows += zip(error.sum(1).sqrt().tolist(), size.sum(1).sqrt().tolist(), strict=True)


def find_slices(finding: Finding, rule: Rule, *, reference: Capture, candidate: Capture) -> list[Slice]:
    """The wrong part of a point that fails, in these two captures; empty where all of it is wrong, or nothing of it."""
    point = leading_points(reference.manifest.points)[rule.reference]
    errors = Errors(math.prod(point.row))
    for position, left, right in pairs(rule, reference, candidate, finding.case):
        errors.update(position, left, right)
    allowed = allowed_of([finding], floor_of(finding))
    found = [*feature_slices(errors, axes_of(reference.manifest, point, rule), allowed=allowed.whole)]
    return found or [*_experts(errors, point, reference, finding.case, allowed=allowed.position)]


def feature_slices(errors: Errors, axes: Iterable[Axis], *, allowed: float) -> Iterator[Slice]:
    """The wrong part along every axis that tells it; single features only where no larger group says the same.

    ``allowed`` is the relative error of all features together that is within tolerance.
    """
    told: list[torch.Tensor] = []
    for axis in axes:
        wrong = wrong_groups(errors, axis, allowed=allowed)
        named = ranges(wrong.nonzero().flatten().tolist())
        if not named or len(named) > PIECES:
            continue
        features = wrong[axis.group]
        single = axis.name == "features"
        if single and (features.double().mean() > MOST or any(torch.equal(features, one) for one in _meets(told))):
            continue
        told.append(features)
        yield Slice(axis=axis.name, which=named, of=axis.of)


def _meets(told: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What is in all of some of these sets."""
    for count in range(1, len(told) + 1):
        for some in combinations(told, count):
            yield torch.stack(some).all(0)


def wrong_groups(errors: Errors, axis: Axis, *, allowed: float) -> torch.Tensor:
    """Which groups of an axis are the wrong part, bool ``[groups]``; none where they are no part.

    A group that is smaller than the others is held against their size: it has their noise.
    """
    error, size, count = (
        torch.zeros(axis.of, dtype=torch.float64).scatter_add_(0, axis.group, x)
        for x in (errors.error, errors.size, torch.ones_like(errors.size))
    )
    scale = torch.maximum(size, size.sum() * count / count.sum()).clamp_min(1e-300)
    luck = torch.tensor([chance(len(errors.rows) * min(float(n), DEGREES)) for n in count])
    wrong = (error / scale).sqrt() > allowed * luck
    right = ~wrong & (count > 0)
    if not wrong.any() or not right.any() or error[wrong].sum() < HELD * error.sum():
        return torch.zeros_like(wrong)
    far, near = ((error[part].sum() / scale[part].sum()).sqrt() for part in (wrong, right))
    return wrong if far >= CONTRAST * near else torch.zeros_like(wrong)


def axes_of(manifest: Manifest, point: Point, rule: Rule) -> Iterator[Axis]:
    """The ways to cut a point's features: by the candidate's rank, by head, by element of each head, one by one."""
    features = math.prod(point.row)
    place = torch.arange(features)
    ranks = sorted({b.rank for b in rule.blocks})
    if len(ranks) > 1 and sum(b.length for b in rule.blocks) == features:
        owner = [ranks.index(b.rank) for b in rule.blocks for _ in range(b.length)]
        yield Axis("ranks", len(ranks), torch.tensor(owner))
    size = head_size(leading_points(manifest.points), point)
    if 0 < size < features:
        yield Axis("heads", features // size, place // size)
        yield Axis("elements of each head", size, place % size)
    yield Axis("features", features, place)


def head_size(points: Mapping[str, Point], point: Point) -> int:
    """How many features one head of a point has, 0 where it has no heads.

    These are a cache, what an attention module's projections give, and what its output projection is fed with.
    """
    around = point.module if point.port in CACHE_PORTS else point.module.rpartition(".")[0]
    caches = [points.get(point_key(around, port=port)) for port in CACHE_PORTS]
    if None in caches:
        return 0
    if len(point.row) == 2:
        return point.row[1]
    sizes = {c.row[-1]: math.prod(c.row) for c in caches if c is not None}
    inside = [p for p in points.values() if p.module.rpartition(".")[0] == around]
    context = next((p for p in reversed(inside) if p.port == "input" and not p.source), None)
    if len(sizes) != 1 or context is None:
        return 0
    (size, cached), whole = next(iter(sizes.items())), math.prod(context.row)
    projected = not point.port and point.module != context.module and math.prod(point.row) in (cached, whole)
    return size if projected or point.key == context.key else 0


def _experts(errors: Errors, point: Point, reference: Capture, case: str, *, allowed: float) -> Iterator[Slice]:
    """The experts whose tokens are wrong, where those of others are right."""
    for router in find_routers(reference.manifest):
        block = router.block.partition("@")[0]
        if not block or not router.chosen or not (point.module == block or point.module.startswith(f"{block}.")):
            continue
        logits = own_rows(reference, router.key, case, 0, max(errors.places, default=-1) + 1)
        if logits is None or point.key == router.key:
            continue
        shares = routed_shares(logits[errors.places].double(), router.chosen)
        sizes = sorted(size for _, size in errors.rows)
        usual = sizes[len(sizes) // 2] if sizes else 0.0
        wrong = torch.tensor([error > allowed * max(size, usual) for error, size in errors.rows])
        named = wrong_experts(shares, wrong)
        if named:
            yield Slice(axis="experts", which=ranges(named), of=logits.shape[1])


def routed_shares(logits: torch.Tensor, chosen: int) -> torch.Tensor:
    """How much of each token's output comes of each expert, ``[tokens, experts]``, as a softmax over those chosen."""
    kept = chosen_experts(logits, chosen)
    return logits.masked_fill(~kept, -math.inf).softmax(1)


def wrong_experts(shares: torch.Tensor, wrong: torch.Tensor) -> list[int]:
    """The fewest experts that all wrong tokens went to, and of which no right token has much; empty if not only these.

    ``shares`` are ``[tokens, experts]``, ``wrong`` says which tokens are.
    """
    if not wrong.any() or wrong.all():
        return []
    cleared = (shares[~wrong] >= WEIGHTY).any(0)
    suspects = (~cleared & (shares[wrong] > 0).any(0)).nonzero().flatten().tolist()
    seen = shares[wrong] > 0
    for count in range(1, min(MOST_EXPERTS, shares.shape[1] - 1, len(suspects)) + 1):
        found = [some for some in combinations(suspects, count) if bool(seen[:, list(some)].any(1).all())]
        if found:
            return list(found[0]) if len(found) == 1 else []
    return []
