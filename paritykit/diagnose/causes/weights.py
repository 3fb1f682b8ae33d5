"""Weights and biases of linear layers: missing, doubled, in another order, of another module, damaged."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from paritykit.captures.manifest import point_key
from paritykit.diagnose.bench.columns import columns_of, in_attention, siblings
from paritykit.diagnose.bench.linear import Linear, embedding_weight, is_head, linear_of, linear_shares
from paritykit.diagnose.scene import LAYER, Scene
from paritykit.diagnose.trial import NOISE, Pattern, Trial

NEAR = 4
"""Layers before and after from which a weight may have been taken."""
FEW = 0.1
"""Share of the features up to which a damage is local."""
ROWS = 8
"""Positions that it takes to say what a feature goes with."""
MOST = 2048
"""Positions up to which each is held against all others."""
TOLD, AS_EXPECTED = 0.1, 0.5
"""What a matrix must let positions say of each other at least, and how much of that they must say."""
UNLIKE = 0.5
"""Correlation below which a feature is not the reference's."""


def own(scene: Scene) -> Linear | None:
    """The linear layer whose output the scene's point is."""
    return linear_of(scene, scene.module) if not scene.port else None


def row_parallel(scene: Scene) -> bool:
    """Whether the candidate's ranks each hold a part of this module's input."""
    key = point_key(scene.module, port="input")
    rule = scene.rules.get(key)
    return scene.ranks > 1 and rule is not None and len({b.rank for b in rule.blocks}) > 1


def bias_missing(scene: Scene) -> Iterator[Trial | Pattern]:
    """The output without its bias."""
    linear = own(scene)
    if linear is not None and linear.bias is not None:
        bias = linear.bias
        yield Trial("without the bias", lambda case: scene.reference(scene.point, case) - bias)
        if all_nan(scene):
            yield Pattern(
                f"{scene.module} gives NaN or Inf: its bias holds what memory held, if its weight does not", 0.4
            )


def bias_doubled(scene: Scene) -> Iterator[Trial]:
    """The output with its bias twice."""
    linear = own(scene)
    if linear is not None and linear.bias is not None:
        bias = linear.bias
        # On two ranks this is what every rank adding it gives, which is then the likelier mistake.
        prior = 0.1 if row_parallel(scene) else 1.0
        yield Trial("with the bias added twice", lambda case: scene.reference(scene.point, case) + bias, prior=prior)


def rows_permuted(scene: Scene) -> Iterator[Trial]:
    """Rotary permutations, projections taken for each other, and any other order that is found by looking."""
    linear = own(scene)
    if linear is None or is_head(scene, scene.module):
        return
    head = scene.config.get("head_dim")
    width = scene.width(scene.point)
    for size in dict.fromkeys([width, *([head] if isinstance(head, int) and width % head == 0 else [])]):
        whose = "all rows" if size == width else f"the {size} rows of each head"
        for bias in (None, linear.bias) if linear.bias is not None else (None,):
            more = " of the weight, and not of the bias" if bias is not None else ""
            label = f"with even before odd ones of {whose}{more}"
            yield Trial(label, partial(_reordered, scene, size, bias, apart=True))
            label = f"with halves interleaved of {whose}{more}"
            yield Trial(label, partial(_reordered, scene, size, bias, apart=False))
    if in_attention(scene):
        for other in siblings(scene):
            if scene.width(other) == width:
                yield Trial(f"with {other.rpartition('.')[2]} in its place", partial(scene.reference, other))
    found = columns_of(scene)
    own_rows = found is not None and (in_attention(scene) or not found.strange)
    if found is not None and own_rows and found.found and not found.moves_blocks(scene.ranks):
        yield Trial(f"with {found.words()}", partial(found.predict, scene), free=1)


def _reordered(scene: Scene, size: int, bias: torch.Tensor | None, case: str, *, apart: bool) -> torch.Tensor:
    rows = scene.reference(scene.point, case)
    stays = torch.zeros(rows.shape[1], dtype=rows.dtype) if bias is None else bias
    parts = (rows - stays).reshape(rows.shape[0], -1, size)
    if apart:
        moved = torch.cat((parts[..., ::2], parts[..., 1::2]), dim=-1)
    else:
        moved = torch.stack(parts.chunk(2, dim=-1), dim=-1)
    return moved.reshape(rows.shape) + stays


def gate_up_swapped(scene: Scene) -> Iterator[Trial]:
    """Two projections of an MLP taken for each other, or cut out of the fused one otherwise."""
    others = [s for s in siblings(scene) if scene.width(s) == scene.width(scene.point)]
    if own(scene) is None or in_attention(scene) or not others:
        return
    other = others[0]
    yield Trial(f"with {other.rpartition('.')[2]} in its place", partial(scene.reference, other))
    for first in (True, False):
        yield Trial("with gate and up taken column by column", partial(_interleaved, scene, other, first=first))
    found = columns_of(scene)
    if found is not None and found.found and found.strange and not found.moves_blocks(scene.ranks):
        yield Trial(f"with {found.words()}", partial(found.predict, scene), free=1)


def _interleaved(scene: Scene, other: str, case: str, *, first: bool) -> torch.Tensor:
    pair = [scene.reference(scene.point, case), scene.reference(other, case)]
    return torch.cat(pair if first else pair[::-1], dim=1)[:, 0 if first else 1 :: 2]


def weight_shared(scene: Scene) -> Iterator[Trial]:
    """The weight of the same module in another layer; for the head, that of the embedding."""
    linear = own(scene)
    if linear is None:
        return
    if is_head(scene, scene.module):
        weight = embedding_weight(scene)
        if weight is not None and weight.shape == linear.weight.shape and not torch.equal(weight, linear.weight):
            yield Trial("with the embedding's weight", partial(linear.with_weight, weight=weight))
    for number, name in _elsewhere(scene):
        weight = scene.parameter(f"{name}.weight")
        if weight is None:
            continue
        weight = weight.T if scene.kind(scene.module) == "Conv1D" else weight
        if weight.shape == linear.weight.shape:
            yield Trial(f"with the weight of layer {number}", partial(linear.with_weight, weight=weight))
            bias = scene.parameter(f"{name}.bias")
            if bias is not None and linear.bias is not None:
                label = f"with weight and bias of layer {number}"
                yield Trial(label, partial(_with_both, linear, weight, bias - linear.bias))


def _with_both(linear: Linear, weight: torch.Tensor, step: torch.Tensor, case: str) -> torch.Tensor:
    return linear.with_weight(case, weight) + step


def _elsewhere(scene: Scene) -> list[tuple[int, str]]:
    """The same module in the layers around and in the first, nearest first."""
    found = LAYER.match(scene.module)
    if found is None:
        return []
    layer, number = found[1], int(found[2])
    numbers = sorted({*range(number - NEAR, number + NEAR + 1), 0} - {number}, key=lambda n: abs(n - number))
    stem = layer.rpartition(".")[0]
    return [(n, f"{stem}.{n}{scene.module[len(layer) :]}") for n in numbers if n >= 0]


def weight_corrupt(scene: Scene) -> Iterator[Trial | Pattern]:
    """One number of the weight, found by what the difference goes with; the weight transposed; few features."""
    linear = own(scene)
    if linear is None:
        return
    if linear.weight.shape[0] == linear.weight.shape[1]:
        yield Trial("with the weight transposed", partial(linear.with_weight, weight=linear.weight.T))
    yield from _nonfinite(scene)
    wrong = _wrong_features(scene)
    if not 0 < len(wrong) <= max(2, FEW * scene.width(scene.point)):
        told = "" if is_head(scene, scene.module) else of_another_matrix(scene)
        if told:
            yield Pattern(f"{told}: its weight holds other numbers than the checkpoint", 0.6)
        return
    yield from _single(scene, linear, wrong)
    which = ", ".join(map(str, wrong[:4].tolist())) + (" and others" if len(wrong) > 4 else "")
    what = "output features" if len(wrong) > 1 else "output feature"
    text = f"only {what} {which} of {scene.width(scene.point)} of {scene.module} differ, in every position"
    yield Pattern(f"{text}: those rows of the weight are not the checkpoint's", 0.8)


def of_another_matrix(scene: Scene) -> str:
    """That a linear layer's difference is a matrix times what it was fed with, in words; empty where it is not.

    What rounds, or puts rows in each other's place, gives a difference that other positions say nothing of.
    """
    if own(scene) is None:
        return ""
    x = torch.cat([scene.input_of(scene.module, c) for c in scene.cases]).double()
    ours = torch.cat([scene.reference(scene.point, c) for c in scene.cases]).double()
    theirs = torch.cat([scene.candidate(scene.point, c) for c in scene.cases]).double()
    rows = theirs.isfinite().all(1)
    if not ROWS <= int(rows.sum()) <= MOST:
        return ""
    noise = (scene.floor or NOISE * scene.allowed.whole) * float(ours[rows].norm())
    share, expected = linear_shares(x[rows], (theirs - ours)[rows], noise=noise)
    if expected < TOLD or share < AS_EXPECTED * expected:
        return ""
    text = f"the difference at {scene.module} is another matrix times what it was fed with: the other positions say"
    return f"{text} {share:.0%} of each one's, where such a matrix would let them say {expected:.0%}"


def _wrong_features(scene: Scene) -> torch.Tensor:
    """Features that differ, ascending; empty where they differ in part of the positions only."""
    ours = torch.cat([scene.reference(scene.point, c) for c in scene.cases])
    theirs = torch.cat([scene.candidate(scene.point, c) for c in scene.cases])
    rows = theirs.isfinite().all(1)
    error = (theirs - ours)[rows]
    limit = scene.allowed.whole * float(ours[rows].pow(2).mean().sqrt())
    found: torch.Tensor = (error.pow(2).mean(0).sqrt() > limit).nonzero().flatten()
    steady = (error[:, found].abs() > limit / 10).double().mean() > 0.5 if len(found) else False
    return found if steady else found[:0]


def _nonfinite(scene: Scene) -> Iterator[Pattern]:
    """A few features that are NaN or Inf in every position, beside others that are numbers."""
    theirs = torch.cat([scene.candidate(scene.point, c)[scene.present(scene.point, c)] for c in scene.cases])
    spoilt = (~theirs.isfinite()).all(0).nonzero().flatten()
    if 0 < len(spoilt) <= max(2, FEW * theirs.shape[1]):
        which = ", ".join(map(str, spoilt[:4].tolist()))
        text = f"only output feature {which} of {theirs.shape[1]} of {scene.module} is NaN or Inf, in every position"
        yield Pattern(f"{text}: that row of the weight holds a number that is none", 0.8)


def _single(scene: Scene, linear: Linear, wrong: torch.Tensor) -> Iterator[Trial]:
    """Each wrong feature as one number of the weight: the input feature that its difference is a multiple of."""
    x = torch.cat([scene.input_of(scene.module, c) for c in scene.cases]).double()
    ours = torch.cat([scene.reference(scene.point, c) for c in scene.cases]).double()
    theirs = torch.cat([scene.candidate(scene.point, c) for c in scene.cases]).double()
    rows = theirs.isfinite().all(1)
    if int(rows.sum()) < ROWS:
        return
    x, error = x[rows], (theirs - ours)[rows][:, wrong]
    share = (x.T @ error).pow(2) / x.pow(2).sum(0)[:, None].clamp_min(1e-30)
    places = share.argmax(0)
    steps = torch.stack([(x[:, k] @ error[:, n]) / x[:, k].pow(2).sum() for n, k in enumerate(places.tolist())])
    changed = linear.weight.clone()
    changed[wrong, places] += steps.to(changed)
    j, k = int(wrong[0]), int(places[0])
    label = f"with weight[{j}, {k}] = {float(changed[j, k]):.6g} instead of {float(linear.weight[j, k]):.6g}"
    yield Trial(label, partial(linear.with_weight, weight=changed), free=1)


def not_loaded(scene: Scene) -> Iterator[Trial | Pattern]:
    """Zeros, a vector that no checkpoint has, NaN, or an output that is not like the reference's anywhere."""
    if scene.port:
        return
    linear = own(scene)
    if linear is not None:
        zero = torch.zeros_like(linear.weight)
        prior = 0.1 if scene.ranks > 1 else 1.0
        yield Trial("with a weight of zeros", partial(linear.with_weight, weight=zero), prior=prior)
        if linear.bias is not None:
            yield Trial("with weight and bias of zeros", lambda case: 0 * scene.reference(scene.point, case))
        else:
            yield from _vector(scene)
        yield from _unlike(scene)


def _vector(scene: Scene) -> Iterator[Trial]:
    """One vector added to every position: a bias, though the checkpoint has none."""
    error = torch.cat([scene.candidate(scene.point, c) - scene.reference(scene.point, c) for c in scene.cases])
    error = error[error.isfinite().all(1)]
    if len(error) < ROWS:
        return
    added = error.mean(0)
    label = "with a bias that the checkpoint has not"
    yield Trial(label, lambda case: scene.reference(scene.point, case) + added, free=1)


def _unlike(scene: Scene) -> Iterator[Pattern]:
    if is_head(scene, scene.module):
        return
    share = unlike_share(scene)
    if share is None and all_nan(scene):
        yield Pattern(f"{scene.module} gives NaN or Inf: its weight holds what memory held", 0.7)
    elif share is not None and share > 0.9:
        text = f"{share:.0%} of the features of {scene.module} are not like the reference's anywhere"
        yield Pattern(
            f"{text}: its weight is not the checkpoint's, nor that of a layer nearby, nor in another order", 0.7
        )


def all_nan(scene: Scene) -> bool:
    """Whether nothing that the candidate shows of the scene's point is a number."""
    return not any(scene.candidate(scene.point, c)[scene.present(scene.point, c)].isfinite().any() for c in scene.cases)


def unlike_share(scene: Scene) -> float | None:
    """Share of the features that hardly correlate with the reference's; None where the candidate has no numbers."""
    return scene.once("unlike", lambda: _unlike_share(scene))


def _unlike_share(scene: Scene) -> float | None:
    ours = torch.cat([scene.reference(scene.point, c) for c in scene.cases]).double()
    theirs = torch.cat([scene.candidate(scene.point, c) for c in scene.cases]).double()
    rows = theirs.isfinite().all(1)
    if not rows.any():
        return None
    if int(rows.sum()) < ROWS:
        return 0.0
    ours, theirs = ours[rows] - ours[rows].mean(0), theirs[rows] - theirs[rows].mean(0)
    alike = (ours * theirs).sum(0).abs() / (ours.norm(dim=0) * theirs.norm(dim=0)).clamp_min(1e-30)
    return float((alike < UNLIKE).double().mean())
