"""Mixtures of experts: who is chosen, by what share, and what an expert makes of a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch

from paritykit.diagnose.bench.mixture import Mixture, Weights, mixture_of
from paritykit.diagnose.causes.mlp import ACTIVATIONS
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Pattern, Trial

PAIRS = 16
"""Experts up to which every pair is exchanged."""
OVER = 4
"""Features that there are at least for each expert whose share is solved for."""
COUNTS = 1e-3
"""A share that is smaller is none."""
NOISY = 8.0
"""Noise floors by which shares that are solved for may be off."""
PARTS = ("gate", "up", "down")


def experts_of(scene: Scene) -> Mixture | None:
    """The mixture whose output shows at the scene's point."""
    return mixture_of(scene, ACTIVATIONS)


def routing(scene: Scene) -> Iterator[Trial]:
    """Fewer or more experts, the least likely, two exchanged, then the shares that the candidate shows itself."""
    mixture = experts_of(scene)
    if mixture is None:
        return
    own, count = mixture.choice, mixture.weights[0].shape[0]
    for chosen in (own.chosen - 1, own.chosen + 1):
        if 0 < chosen <= count:
            other = replace(own, chosen=chosen)
            label = f"with {chosen} expert(s) for each token instead of {own.chosen}"
            yield Trial(label, lambda case, o=other: mixture.mixed(case, o.shares(mixture.logits(case))))  # type: ignore[misc]
    label = "with the least likely experts chosen"
    yield Trial(label, lambda case: mixture.mixed(case, own.shares(-mixture.logits(case))))
    if own.bias:
        for label, changed in (
            ("without the bias by which experts are chosen", replace(own, bias=())),
            ("with the bias by which experts are chosen in their shares too", replace(own, weighed=True)),
        ):
            yield Trial(label, lambda case, o=changed: mixture.mixed(case, o.shares(mixture.logits(case))))  # type: ignore[misc]
    if own.kept < own.groups:
        label = f"with experts of all {own.groups} groups instead of the best {own.kept}"
        ungrouped = replace(own, groups=1, kept=1)
        yield Trial(label, lambda case: mixture.mixed(case, ungrouped.shares(mixture.logits(case))))
    pairs = list(combinations(range(count), 2)) if count <= PAIRS else []
    for one, other_one in pairs:
        label = f"with experts {one} and {other_one} in each other's place"
        yield Trial(label, partial(_exchanged, mixture, one, other_one))
    yield from _exchanged_parts(mixture)
    # With nearly as many experts as features any output would be a mixture of theirs.
    told = OVER * count <= scene.width(scene.point)
    if told and not _same_choice(mixture):
        share = _wrongly_routed(mixture)
        label = f"with the shares that the candidate's output shows, other experts for {share:.0%} of the tokens,"
        yield Trial(label, lambda case: mixture.mixed(case, solved(mixture, case)), free=2)


def _exchanged(mixture: Mixture, one: int, other: int, case: str) -> torch.Tensor:
    order = list(range(mixture.weights[0].shape[0]))
    order[one], order[other] = order[other], order[one]
    return mixture.mixed(case, mixture.choice.shares(mixture.logits(case))[:, order])


def _exchanged_parts(mixture: Mixture) -> Iterator[Trial]:
    """Gates, ups or downs of two experts exchanged: those whose tokens are most wrong."""
    suspects = most_wrong(mixture)
    order = list(range(mixture.weights[0].shape[0]))
    order[suspects[0]], order[suspects[1]] = suspects[1], suspects[0]
    for number, part in enumerate(PARTS):
        weights = list(mixture.weights)
        weights[number] = weights[number][order]
        changed: Weights = (weights[0], weights[1], weights[2])
        label = f"with the {part} weights of experts {suspects[0]} and {suspects[1]} exchanged"
        yield Trial(label, lambda case, w=changed: mixture.mixed(case, outputs=mixture.outputs(case, w)))  # type: ignore[misc]


def solved(mixture: Mixture, case: str) -> torch.Tensor:
    """Each expert's share in the candidate's rows by least squares, ``[positions, experts]``; NaN for absent rows."""
    scene = mixture.scene
    rest = scene.reference(scene.point, case) - mixture.scene.reference(mixture.experts, case)
    rows = scene.candidate(scene.point, case) - rest
    basis = mixture.outputs(case).transpose(1, 2).double()
    found = torch.linalg.lstsq(basis, rows.nan_to_num().double()[..., None]).solution[..., 0]
    return torch.where(rows.isfinite().all(1, keepdim=True), found, torch.nan).to(rows.dtype)


def _choices(mixture: Mixture, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    shares = solved(mixture, case)
    rows = shares.isfinite().all(1)
    return shares[rows], mixture.choice.shares(mixture.logits(case))[rows]


def _wrongly_routed(mixture: Mixture) -> float:
    """Share of the tokens that another set of experts is mixed for."""
    least = smallest(mixture)
    wrong = [((a.abs() > least) != (b.abs() > least)).any(1) for a, b in _all_choices(mixture)]
    return float(torch.cat(wrong).double().mean())


def smallest(mixture: Mixture) -> float:
    """The smallest share that is told from none."""
    return max(COUNTS, NOISY * mixture.scene.floor)


def _all_choices(mixture: Mixture) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [_choices(mixture, c) for c in mixture.scene.cases]


def _same_choice(mixture: Mixture) -> bool:
    """Whether the candidate's shares are the reference's but for one factor in each row."""
    for found, right in _all_choices(mixture):
        factor = (found * right).sum(1, keepdim=True) / right.pow(2).sum(1, keepdim=True).clamp_min(1e-30)
        if not torch.allclose(found, factor * right, atol=smallest(mixture)):
            return False
    return True


def shares(scene: Scene) -> Iterator[Trial]:
    """Shares that do not sum to 1, or do; another function of the logits; one factor on all of them."""
    mixture = experts_of(scene)
    if mixture is None:
        return
    own = mixture.choice
    text = "without being made to sum to 1" if own.renormalise else "made to sum to 1"
    for label, other in (
        (f"with the experts' shares {text}", replace(own, renormalise=not own.renormalise)),
        ("with shares by " + ("softmax" if own.sigmoid else "sigmoid"), replace(own, sigmoid=not own.sigmoid)),
        (f"without the factor {own.factor:g} on the experts", replace(own, factor=1.0)),
        (f"with the factor {own.factor:g} on the experts twice", replace(own, factor=own.factor**2)),
    ):
        if other != own:
            yield Trial(label, lambda case, o=other: mixture.mixed(case, o.shares(mixture.logits(case))))  # type: ignore[misc]
    factors = torch.cat([a.sum(1) / b.sum(1) for a, b in _all_choices(mixture)])
    factor = float(factors.median())
    if factor != 1:
        label = f"with the experts' output multiplied by {factor:.6g}"
        yield Trial(label, lambda case: mixture.mixed(case, factor * own.shares(mixture.logits(case))), free=1)


def activation(scene: Scene) -> Iterator[Trial]:
    """Another activation inside the experts."""
    mixture = experts_of(scene)
    if mixture is None:
        return
    for name, function in ACTIVATIONS.items():
        if function is not mixture.function:
            label = f"with {name} as the experts' activation"
            yield Trial(label, lambda case, f=function: mixture.mixed(case, outputs=mixture.outputs(case, function=f)))  # type: ignore[misc]


def rounded_router(scene: Scene) -> Iterator[Trial]:
    """The router's logits in half precision."""
    mixture = experts_of(scene)
    if mixture is None:
        return
    for half in (torch.bfloat16, torch.float16):
        name = str(half).removeprefix("torch.")
        label = f"with the router's logits rounded to {name}"
        yield Trial(label, partial(_with_rounded, mixture, half))


def _with_rounded(mixture: Mixture, half: torch.dtype, case: str) -> torch.Tensor:
    logits = mixture.logits(case)
    return mixture.mixed(case, mixture.choice.shares(logits.to(half).to(logits.dtype)))


def partial_sums(scene: Scene) -> Iterator[Trial]:
    """One rank's part of each expert, or one rank's experts, not summed over ranks."""
    mixture, ranks = experts_of(scene), scene.ranks
    if mixture is None or ranks < 2:
        return
    gate, up, down = mixture.weights
    for rank in range(ranks):
        if gate.shape[1] % ranks == 0:
            own: Weights = (gate.chunk(ranks, 1)[rank], up.chunk(ranks, 1)[rank], down.chunk(ranks, 2)[rank])
            label = f"with the part of rank {rank} of every expert alone, not summed,"
            yield Trial(label, lambda case, w=own: mixture.mixed(case, outputs=mixture.outputs(case, w)))  # type: ignore[misc]
        if gate.shape[0] % ranks == 0:
            label = f"with the experts of rank {rank} alone, not summed,"
            yield Trial(label, partial(_own_experts, mixture, rank))
    for factor, text in (
        (ranks, "summed over ranks twice"),
        (1 / ranks, "averaged over ranks"),
        (0, "a sum that is nothing"),
    ):
        label = f"with the experts' output {text}"
        yield Trial(label, lambda case, f=factor: mixture.mixed(case, outputs=mixture.outputs(case) * f))  # type: ignore[misc]


def _own_experts(mixture: Mixture, rank: int, case: str) -> torch.Tensor:
    shares_of = mixture.choice.shares(mixture.logits(case))
    size = shares_of.shape[1] // mixture.scene.ranks
    mine = torch.arange(shares_of.shape[1]) // size == rank
    return mixture.mixed(case, shares_of * mine)


def wrong_experts(mixture: Mixture) -> list[int]:
    """Experts that no right position used, while positions without them are right; none where all are suspect."""
    scene = mixture.scene
    count = mixture.weights[0].shape[0]
    cleared, used = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    for case in scene.cases:
        ours, theirs = scene.reference(scene.point, case), scene.candidate(scene.point, case)
        right = (theirs - ours).norm(dim=1) <= scene.allowed.position * ours.norm(dim=1)
        chosen = mixture.choice.shares(mixture.logits(case)) > 0
        cleared |= chosen[right].any(0)
        used |= chosen.any(0)
    return [] if not cleared.any() else (used & ~cleared).nonzero().flatten().tolist()


def most_wrong(mixture: Mixture) -> list[int]:
    """The two experts whose tokens are most wrong, from each row's error and what share of it was whose."""
    scene = mixture.scene
    shares_of = torch.cat([mixture.choice.shares(mixture.logits(c)) for c in scene.cases]).double()
    error = torch.cat([scene.candidate(scene.point, c) - scene.reference(scene.point, c) for c in scene.cases])
    rows = error.isfinite().all(1)
    energy = error[rows].double().pow(2).sum(1)
    found = torch.linalg.lstsq(shares_of[rows].pow(2), energy[:, None]).solution.flatten()
    return sorted(found.topk(min(2, len(found))).indices.tolist())


def one_expert(scene: Scene) -> Iterator[Pattern]:
    """Exactly the tokens of one expert are wrong."""
    mixture = experts_of(scene)
    suspects = wrong_experts(mixture) if mixture is not None else []
    if len(suspects) == 1:
        text = f"exactly the tokens that go to expert {suspects[0]} of {mixture.weights[0].shape[0]} are wrong"  # type: ignore[union-attr]
        yield Pattern(f"{text}: one of its weights is not the checkpoint's", 0.8)
