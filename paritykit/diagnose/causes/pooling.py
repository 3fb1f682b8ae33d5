"""Sequences made one row: which tokens, which function; and modules whose tuple is passed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from paritykit.diagnose.bench.calibrate import reproduces
from paritykit.diagnose.bench.linear import linear_of
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial

Function = Callable[[torch.Tensor], torch.Tensor]
POOLS: dict[str, Function] = {
    "the last token": lambda rows: rows[-1:],
    "the first token": lambda rows: rows[:1],
    "the mean of all tokens": lambda rows: rows.mean(0, keepdim=True),
    "the largest of all tokens": lambda rows: rows.amax(0, keepdim=True),
    "the sum of all tokens": lambda rows: rows.sum(0, keepdim=True),
}
FUNCTIONS: dict[str, Function] = {
    "nothing": lambda row: row,
    "normalisation": partial(functional.normalize, dim=-1),
    "softmax": partial(torch.softmax, dim=-1),
    "log-softmax": partial(torch.log_softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
SCORING = ("score", "classifier", "pooler", "classification_head")
BEFORE = 4
"""Points before the pooled one that it may be made of."""


def pooled(scene: Scene) -> bool:
    """Whether the scene's point has one row for each case, and not one for each token."""
    counts = [int(scene.reference(scene.point, c).isfinite().all(1).sum()) for c in scene.cases]
    return all(n == 1 for n in counts) and any(scene.length(c) > 1 for c in scene.cases)


def pooling_type(scene: Scene) -> Iterator[Trial]:
    """Other tokens of the rows that the point is pooled from."""
    found = _made_of(scene) if pooled(scene) else None
    if found is None:
        return
    source, own, function = found
    for name, pool in POOLS.items():
        if name != own:
            made = partial(_pooled, scene, source, pool, FUNCTIONS[function])
            yield Trial(f"pooled from {name} instead of {own}", made)


def pooled_activation(scene: Scene) -> Iterator[Trial]:
    """Another function of what was pooled or scored."""
    found = _made_of(scene) if pooled(scene) else None
    if found is not None:
        source, own, function = found
        for name, other in FUNCTIONS.items():
            if name != function:
                made = partial(_pooled, scene, source, POOLS[own], other)
                yield Trial(f"with {name} instead of {function} after pooling", made)
    elif pooled(scene) or scene.module.rpartition(".")[2] in SCORING:
        for name, other in FUNCTIONS.items():
            yield Trial(f"with {name} on top", lambda case, f=other: f(scene.reference(scene.point, case)))  # type: ignore[misc]


def _made_of(scene: Scene) -> tuple[str, str, str] | None:
    """The point that the scene's is pooled from, which tokens of it, and the function after it."""
    return scene.once("pooled from", lambda: _find(scene))


def _find(scene: Scene) -> tuple[str, str, str] | None:
    keys = list(scene.points)
    before = [k for k in keys[: keys.index(scene.point)] if scene.width(k) == scene.width(scene.point)]
    for source in before[::-1][:BEFORE]:
        for pool_name, pool in POOLS.items():
            for name, function in FUNCTIONS.items():
                if reproduces(scene, scene.point, partial(_pooled, scene, source, pool, function)):
                    return source, pool_name, name
    return None


def _pooled(scene: Scene, source: str, pool: Function, function: Function, case: str) -> torch.Tensor:
    """The pooled row at the point's own position, NaN elsewhere."""
    right = scene.reference(scene.point, case)
    row = function(pool(scene.reference(source, case)))
    return torch.where(right.isfinite().all(1, keepdim=True), row.expand_as(right), torch.nan)


def tuple_output(scene: Scene) -> Iterator[Trial]:
    """The first row for every token, as ``[0]`` of a tensor gives; the bias, as the other element of a pair."""
    if scene.port:
        return
    yield Trial(
        "with the first position's row in every position, as [0] of a tensor gives,",
        lambda case: scene.reference(scene.point, case)[:1].expand_as(scene.reference(scene.point, case)),
    )
    linear = linear_of(scene, scene.module)
    if linear is not None and linear.bias is not None:
        bias = linear.bias
        # A weight of zeros gives the same, and is seen more often.
        label = "with its bias in the place of its output, as the other element of a pair,"
        yield Trial(label, lambda case: bias.expand_as(scene.reference(scene.point, case)), prior=0.3)
