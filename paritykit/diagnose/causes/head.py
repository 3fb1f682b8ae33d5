"""The ends of the vocabulary: looking tokens up, and giving each its logit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from paritykit.diagnose.bench.columns import columns_of
from paritykit.diagnose.bench.linear import is_head
from paritykit.diagnose.bench.lookup import Lookup, lookup_of
from paritykit.diagnose.causes.cap import capped, caps
from paritykit.diagnose.causes.weights import of_another_matrix, own, unlike_share
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Pattern, Trial


def of_head(scene: Scene) -> bool:
    """Whether the scene's point is the output head's."""
    return not scene.port and is_head(scene, scene.module)


def turned_by(scene: Scene) -> int:
    """By how many places all logits are further on than the reference's; 0 where they are not."""
    found = columns_of(scene)
    if found is None or not found.found or found.strange:
        return 0
    size = len(found.places)
    steps = (torch.arange(size) - found.places) % size
    return int(steps[0]) if bool((steps == steps[0]).all()) else 0


def lm_head(scene: Scene) -> Iterator[Trial | Pattern]:
    """Logits in another order, no logits, or such as are not like the reference's for any token."""
    if not of_head(scene):
        return
    step = turned_by(scene)
    size = scene.width(scene.point)
    for way, told in ((1, "on"), (-1, "back")):
        label = f"with every logit 1 token further {told}"
        yield Trial(label, lambda case, way=way: scene.reference(scene.point, case).roll(way, dims=1))  # type: ignore[misc]
    if step and (scene.ranks < 2 or min(step, size - step) <= 2):
        label = f"with every logit {min(step, size - step)} token(s) further {'on' if step < size - step else 'back'}"
        yield Trial(label, lambda case: scene.reference(scene.point, case).roll(step, dims=1))
    found = columns_of(scene)
    if found is not None and found.found and not step and not found.moves_blocks(scene.ranks):
        yield Trial(f"with {found.words()}", partial(found.predict, scene), free=1)
    if own(scene) is None:
        return
    share = unlike_share(scene)
    if share is not None and share > 0.9:
        text = f"the logits of {share:.0%} of the vocabulary are not like the reference's anywhere"
        yield Pattern(f"{text}: the head's weight is not the checkpoint's, nor the embedding's", 0.7)
        return
    told = of_another_matrix(scene)
    if told:
        yield Pattern(f"{told}: the head's weight is not the checkpoint's", 0.7)


def vocab_shard(scene: Scene) -> Iterator[Trial]:
    """Tokens looked up one off, all or from where a rank's part begins; logits joined in another order of parts."""
    lookup = lookup_of(scene)
    if lookup is not None:
        for step in (-1, 1):
            label = f"with every token looked up as the {'one before' if step < 0 else 'next one'}"
            yield Trial(label, lambda case, step=step: lookup.rows((scene.tokens(case) + step).clamp(min=0)))  # type: ignore[misc]
        for edge in lookup.edges():
            for step in (-1, 1):
                label = f"with tokens from {edge} on, where a rank's part begins, looked up {step:+d}"
                yield Trial(label, partial(_shifted, lookup, edge, step))
    if of_head(scene) and scene.ranks > 1:
        part = scene.width(scene.point) // scene.ranks
        for rank in range(1, scene.ranks):
            label = f"with the ranks' parts of the vocabulary joined {rank} place(s) further on"
            yield Trial(label, lambda case, n=rank * part: scene.reference(scene.point, case).roll(n, dims=1))  # type: ignore[misc]
        step, size = turned_by(scene), scene.width(scene.point)
        if min(step, size - step) > 2:
            label = f"with parts of the vocabulary joined in another order, {step} tokens further on,"
            yield Trial(label, lambda case: scene.reference(scene.point, case).roll(step, dims=1))
        found = columns_of(scene)
        if found is not None and found.found and not step:
            yield Trial(f"with {found.words()}, in whole parts,", partial(found.predict, scene), free=1)


def _shifted(lookup: Lookup, edge: int, step: int, case: str) -> torch.Tensor:
    """Tokens of later parts one off; the one that falls between two parts is in neither."""
    tokens = lookup.scene.tokens(case)
    moved = tokens + step
    lost = (tokens >= edge) & (moved < edge)
    return lookup.rows(torch.where(lost, -1, torch.where(tokens >= edge, moved, tokens)))


def softcap(scene: Scene) -> Iterator[Trial]:
    """Logits without the cap, with usual caps, with the one that fits best."""
    if scene.port != "logits":
        return
    raw = next((k for k, p in scene.points.items() if not p.port and is_head(scene, p.module)), "")
    if raw:
        config = scene.config.get("final_logit_softcapping")
        own_cap = float(config) if isinstance(config, int | float) else None
        yield from caps(scene, "logits", own_cap, lambda cap, case: capped(scene.reference(raw, case), cap))
