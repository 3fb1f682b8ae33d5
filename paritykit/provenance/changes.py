"""What a loader did to values on the way: an offset, a factor, a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from paritykit.provenance.sources import Source, probe_values
from paritykit.provenance.weightmap import Gap, Landing, Span, WeightMap, size

Function = Callable[[torch.Tensor], torch.Tensor]

UNDO: dict[str, Function] = {
    "": lambda v: v,
    "+1": lambda v: v - 1,
    "-1": lambda v: v + 1,
    "negated": lambda v: -v,
    "*2": lambda v: v / 2,
    "*0.5": lambda v: v * 2,
}
"""Changes that keep digits exact, with what takes them back; found in any layout, element by element."""

FUNCTIONS: dict[str, Function] = {
    "-exp(x)": lambda x: -x.exp(),
    "exp(x)": lambda x: x.exp(),
    "log(x)": lambda x: x.log(),
    "1/x": lambda x: 1 / x,
    "sqrt(x)": lambda x: x.sqrt(),
    "x^2": lambda x: x.square(),
    "sigmoid(x)": lambda x: x.sigmoid(),
    "tanh(x)": lambda x: x.tanh(),
    "softplus(x)": torch.nn.functional.softplus,
}
"""Functions looked for where a whole box of a parameter has the shape of a tensor, or of one rank's slice of it."""


def forward(change: str) -> Function:
    """What a change does to weights. KeyError for one that is not known.

    >>> forward("+1")(torch.tensor([1.0]))
    tensor([2.])
    """
    known: dict[str, Function] = {"": lambda x: x, "negated": lambda x: -x, **FUNCTIONS}
    if change in known:
        return known[change]
    if change[0] not in "*+-":
        raise KeyError(change)
    factor, _, offset = change[1:].partition(" + ") if change[0] == "*" else ("1", "", change)
    return lambda x: x * float(factor) + float(offset or 0)


def explain_change(found: WeightMap, sources: Sequence[Source], probe: dict[str, torch.Tensor]) -> WeightMap:
    """``found`` with gaps of kind ``unknown`` turned into landings, where a function of a tensor explains the probe."""
    landed: dict[str, int] = {}
    for known in found.landings:
        landed[known.tensor] = landed.get(known.tensor, 0) + size(known.source)
    candidates = [s for s in sources if landed.get(s.name, 0) < size(tuple(Span(0, n) for n in s.shape))]
    gaps: list[Gap] = []
    for gap in found.gaps:
        landing = _explained(gap, candidates, probe) if gap.kind == "unknown" else None
        if landing is None:
            gaps.append(gap)
        else:
            found.landings.append(landing)
    found.gaps = gaps
    return found


def _explained(gap: Gap, candidates: Sequence[Source], probe: dict[str, torch.Tensor]) -> Landing | None:
    target = probe[gap.parameter][tuple(slice(s.start, s.last + 1, s.step) for s in gap.target)]
    for candidate in candidates:
        for source, axes in _slices(candidate.shape, tuple(target.shape)):
            box = probe_values(candidate)[tuple(slice(s.start, s.start + s.count) for s in source)].reshape(
                target.shape
            )
            change = name_change(box.to(torch.float64), target.to(torch.float64), target.dtype)
            if change:
                return Landing(
                    tensor=candidate.name,
                    parameter=gap.parameter,
                    rank=gap.rank,
                    source=source,
                    target=gap.target,
                    axes=axes,
                    change=change,
                    copy=candidate.copy,
                )
    return None


def _slices(shape: tuple[int, ...], wanted: tuple[int, ...]) -> Iterator[tuple[tuple[Span, ...], tuple[int, ...]]]:
    """The boxes of a tensor that have the wanted shape: all of it, or even slices along one axis."""
    if len(shape) != len(wanted):
        return
    differing = [k for k, (a, b) in enumerate(zip(shape, wanted, strict=True)) if a != b]
    if len(differing) > 1 or any(shape[k] % wanted[k] for k in differing):
        return
    axes = tuple(-1 if n == 1 else k for k, n in enumerate(wanted))
    for start in range(0, shape[differing[0]], wanted[differing[0]]) if differing else [0]:
        yield tuple(Span(start if k in differing else 0, n) for k, n in enumerate(wanted)), axes


def name_change(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> str:
    """The change that makes ``after`` of ``before`` to within ``dtype``'s rounding, empty for none that is known."""
    if before.numel() < 2 or not after.isfinite().all():
        return ""
    rtol = 4 * torch.finfo(dtype).eps if dtype.is_floating_point else 1e-6
    for name, function in FUNCTIONS.items():
        if torch.allclose(function(before), after, rtol=rtol, atol=rtol):
            return name
    return _affine_change(before.reshape(-1), after.reshape(-1), rtol)


def _affine_change(x: torch.Tensor, y: torch.Tensor, rtol: float) -> str:
    """The factor and offset of a straight line through at least four points, empty where they lie on none."""
    spread, largest = (x - x.mean()).square().sum(), float(y.abs().max())
    if len(x) < 4 or not spread:
        return ""
    factor = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    offset = float(y.mean() - factor * x.mean())
    straight = torch.allclose(factor * x + offset, y, rtol=rtol, atol=rtol * largest)
    if not straight or abs(factor) < rtol * largest:
        return ""
    digits = -math.floor(math.log10(rtol / 4))
    if abs(offset) < rtol * largest * 4:
        return f"*{factor:.{digits}g}"
    return f"{offset:+.{digits}g}" if abs(factor - 1) < rtol / 4 else f"*{factor:.{digits}g} + {offset:.{digits}g}"
