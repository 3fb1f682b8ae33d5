"""Several ranks: parts of weights that are another rank's, sums over ranks, biases that each rank adds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from paritykit.diagnose.bench.columns import columns_of
from paritykit.diagnose.bench.linear import Linear, is_head
from paritykit.diagnose.bench.lookup import Lookup, lookup_of
from paritykit.diagnose.causes.weights import own, row_parallel
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial

Weights = tuple[float, ...]


def parts(linear: Linear, case: str) -> torch.Tensor:
    """What each rank adds to the sum, ``[ranks, positions, out]``, without the bias."""
    x = linear.scene.input_of(linear.module, case)
    size = linear.scene.ranks
    cut = zip(x.chunk(size, dim=1), linear.weight.chunk(size, dim=1), strict=True)
    return torch.stack([a @ b.T for a, b in cut])


def tp_reduce(scene: Scene) -> Iterator[Trial]:
    """Each rank's part alone, all but one, an average, a sum of sums, nothing."""
    if scene.ranks < 2:
        return
    linear = own(scene)
    if linear is not None and row_parallel(scene):
        for label, weights, bias in _sums(scene.ranks):
            yield Trial(label, partial(_summed, linear, weights, bias))
    lookup = lookup_of(scene)
    if lookup is not None:
        for edge in lookup.edges():
            label = f"with only the tokens below {edge} looked up, the first rank's,"
            yield Trial(label, partial(_below, lookup, edge))


def _below(lookup: Lookup, edge: int, case: str) -> torch.Tensor:
    tokens = lookup.scene.tokens(case)
    return lookup.rows(torch.where(tokens < edge, tokens, -1))


def _sums(ranks: int) -> Iterator[tuple[str, Weights, float]]:
    """Ways to sum ranks' parts: what they are, each part's weight, the bias's."""
    for rank in range(ranks):
        alone = tuple(float(n == rank) for n in range(ranks))
        yield f"with the part of rank {rank} alone, not summed,", alone, 1.0
        yield f"with the part of rank {rank} alone, without the bias,", alone, 0.0
        if ranks > 2:
            yield f"without the part of rank {rank}", tuple(float(n != rank) for n in range(ranks)), 1.0
    every = (1.0,) * ranks
    for bias, told in ((1.0, ""), (1.0 / ranks, " with the bias")):
        yield f"averaged over {ranks} ranks{told}", tuple(w / ranks for w in every), bias
    for bias, told in ((1.0, ""), (float(ranks), " with the bias")):
        yield f"summed over {ranks} ranks twice{told}", tuple(w * ranks for w in every), bias
    for bias, told in ((1.0, " but the bias"), (0.0, "")):
        yield f"with a sum over ranks that is nothing{told}", tuple(0.0 for _ in every), bias


def _summed(linear: Linear, weights: Weights, bias: float, case: str) -> torch.Tensor:
    made = parts(linear, case)
    change = torch.tensor(weights, dtype=made.dtype) - 1
    found = linear.scene.reference(linear.scene.point, case) + (made * change[:, None, None]).sum(0)
    return found if linear.bias is None else found + (bias - 1) * linear.bias


def tp_bias(scene: Scene) -> Iterator[Trial]:
    """The bias once more for every further rank."""
    linear = own(scene)
    if linear is None or linear.bias is None or not row_parallel(scene):
        return
    extra = (scene.ranks - 1) * linear.bias
    yield Trial(
        f"with the bias added by each of {scene.ranks} ranks", lambda case: scene.reference(scene.point, case) + extra
    )


def tp_shard(scene: Scene) -> Iterator[Trial]:
    """Another rank's part of the weight, as columns of the input or as whole parts of the output."""
    if scene.ranks < 2 or is_head(scene, scene.module):
        return
    linear = own(scene)
    if linear is not None and row_parallel(scene):
        size = scene.ranks
        for label, order in _orders(size):
            chunks = linear.weight.chunk(size, dim=1)
            weight = torch.cat([chunks[n] for n in order], dim=1)
            yield Trial(label, partial(linear.with_weight, weight=weight))
    found = columns_of(scene)
    if found is not None and found.found and found.moves_blocks(scene.ranks):
        yield Trial(f"with whole parts of ranks moved: {found.words()}", partial(found.predict, scene))


def _orders(ranks: int) -> Iterator[tuple[str, list[int]]]:
    """Whose part of the weight each rank has."""
    for one in range(ranks):
        yield f"with the part of rank {one} on every rank", [one] * ranks
    for step in range(1, ranks):
        yield f"with the weight of {step} rank(s) further on", [(n + step) % ranks for n in range(ranks)]
    if ranks > 2:
        yield "with the ranks' parts in reverse order", list(range(ranks))[::-1]
