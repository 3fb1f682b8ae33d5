"""What can be seen of a difference that nothing explains: where it is, how large, and what it looks like."""

from __future__ import annotations

import torch

from paritykit.diagnose.bench.attention import attention_module
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.slices import Errors, axes_of, feature_slices
from paritykit.diagnose.trial import Bar


def describe(scene: Scene, bar: Bar) -> str:
    """The extent by token, head, feature and rank, the scale and the correlation, in one sentence."""
    wrong = bar.wrong
    parts = [_tokens(scene, bar)]
    if bar.spoilt.any():
        parts.append(f"{int(bar.spoilt.sum())} positions with NaN or Inf")
    rows = wrong & bar.judged
    if rows.any():
        ref, cand = bar.reference[rows].double(), bar.candidate[rows].double()
        parts.append(_features(scene, ref, cand, bar.scale[rows]))
        norms = float(cand.norm() / ref.norm().clamp_min(1e-30))
        cosine = float((ref * cand).sum() / (ref.norm() * cand.norm()).clamp_min(1e-30))
        parts.append(f"norm {norms:.3g} times the reference's, cosine {cosine:.3f}")
    return ", ".join(parts)


def _tokens(scene: Scene, bar: Bar) -> str:
    wrong, judged = int(bar.wrong.sum()), int((bar.judged | bar.spoilt).sum())
    if bar.in_decode_only:
        return f"decoded positions only ({wrong} of {judged})"
    lengths = torch.tensor([scene.length(c) for c in scene.cases])
    positions = torch.cat([torch.arange(int(n)) for n in lengths])
    start = int(positions[bar.wrong].min()) if bar.wrong.any() else 0
    first = f" from position {start} on" if start else ""
    return f"{wrong} of {judged} positions differ{first}{_meeting(scene, bar, positions)}"


def _meeting(scene: Scene, bar: Bar, positions: torch.Tensor) -> str:
    """What it means in attention that first tokens are right: they see themselves alone, whatever their scores are."""
    alone, later = bar.judged & (positions == 0), bar.judged & (positions > 0)
    told = alone.any() and not (bar.wrong & alone).any() and 2 * int((bar.wrong & later).sum()) > int(later.sum())
    if not told or not attention_module(scene):
        return ""
    text = "first tokens, which see themselves alone, are right: so are values and weights, and what is wrong is how "
    return f" ({text}tokens meet, by rotary embedding, scale, mask or cache)"


def _features(scene: Scene, ref: torch.Tensor, cand: torch.Tensor, scale: torch.Tensor) -> str:
    """Which part of the features is wrong, or how many are."""
    errors = Errors(ref.shape[1])
    errors.update(0, ref, cand)
    axes = axes_of(scene.reference_capture.manifest, scene.points[scene.point], scene.rules[scene.point])
    told = [s.describe() for s in feature_slices(errors, axes, allowed=scene.allowed.whole)]
    if told:
        return ", ".join(told)
    per_feature = (cand - ref).pow(2).mean(0).sqrt()
    limit = scene.allowed.whole * float(scale.double().mean()) / ref.shape[1] ** 0.5
    return f"{int((per_feature > limit).sum())} of {ref.shape[1]} features"
