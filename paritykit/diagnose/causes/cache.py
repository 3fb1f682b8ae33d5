"""The KV cache: slots, block tables, and what others left in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from paritykit.captures.manifest import point_key
from paritykit.diagnose.bench.attention import Attention
from paritykit.diagnose.bench.blocks import reads_of
from paritykit.diagnose.bench.kvcache import (
    Held,
    block_size,
    content,
    earlier,
    held_by,
    prefix_caching,
    shared_prefix,
    was_interrupted,
)
from paritykit.diagnose.causes.attention import mixing
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Pattern, Trial

FEW = 0.75
"""Share of positions up to which lost ones are a matter of slots, and not of what is written."""
SHORTENED = 0.9
"""Share of a case's difference that is left at most where it is said to have been shortened."""
AGAINST = 0.05
"""Prior of a name for what points to another one."""


def slot(scene: Scene) -> Iterator[Trial | Pattern]:
    """Positions that hold the same case's other positions, or nothing; blocks of the same case read for each other."""
    if not scene.whole:
        return
    held = held_by(scene)
    yield from _contents(scene, held, "slot")
    if held and 0 < _share(held, lambda h: h.lost) < FEW:
        yield Pattern(_lost_words(scene, held), 0.4 if _after_hit(scene, held) else 0.8)
    yield from _blocks(scene, foreign=False)


def block_table(scene: Scene) -> Iterator[Trial | Pattern]:
    """Blocks of other cases, held or read; fewer positions read than there are; NaN read from a cache that is right."""
    if not scene.whole:
        return
    yield from _contents(scene, held_by(scene), "table")
    yield from _blocks(scene, foreign=True)
    attention = mixing(scene)
    if attention is None:
        return
    yield from _shortened(scene, attention)
    if _caches_right(scene, attention):
        rows = torch.cat([scene.candidate(scene.point, c) for c in scene.cases])
        there = torch.cat([scene.present(scene.point, c) for c in scene.cases])
        if bool((~rows.isfinite()).all(1)[there].any()):
            text = f"{attention.module} gives NaN or Inf, and its cache holds the right keys and values"
            yield Pattern(f"{text}: other slots are read than were written", 0.7)


def stale(scene: Scene) -> Iterator[Trial | Pattern]:
    """What an earlier request left, under other tokens before it; a hit that is too long; blocks after preemption."""
    if not scene.whole:
        return
    held = held_by(scene)
    yield from _contents(scene, held, "stale")
    if _after_hit(scene, held):
        case = next(c for c, h in held.items() if h.lost.any())
        place = shared_prefix(scene, case)
        text = f"position {place} of {case} was never written: it follows the {place} tokens that an earlier request"
        yield Pattern(f"{text} left in the prefix cache, so that the hit is taken to be longer than it is", 0.8)


def _share(held: dict[str, Held], which: Callable[[Held], torch.Tensor]) -> float:
    """Share of the positions of those cases that have any wrong one."""
    hit = [h for h in held.values() if h.wrong.any()]
    return float(torch.cat([which(h) for h in hit]).double().mean()) if hit else 0.0


def _contents(scene: Scene, held: dict[str, Held], name: str) -> Iterator[Trial]:
    """The rows that were found in the cache in the place of the right ones."""
    if not any(h.found.any() for h in held.values()):
        return
    verdict = judged(scene, held)
    label = f"with the cache holding {_content_words(held)}"
    yield Trial(label, partial(content, scene, held), free=1, prior=1.0 if verdict == name else AGAINST)


def judged(scene: Scene, held: dict[str, Held]) -> str:
    """What the places speak for: ``slot``, ``table`` or ``stale``."""
    foreign = sum(int(h.foreign.sum()) for h in held.values())
    moved = sum(int(h.moved.sum()) for h in held.values())
    if foreign >= moved:
        # One that lost its blocks to others goes on over what these left there.
        left = [h.foreign & (_is_earlier(scene, c, h) | was_interrupted(scene, c)) for c, h in held.items()]
        return "stale" if int(torch.cat(left).sum()) * 2 > foreign else "table"
    case = max(held, key=lambda c: int(held[c].moved.sum()))
    if not _whole_blocks(scene, held[case]):
        return "slot"
    return "stale" if was_interrupted(scene, case) else "table"


def _is_earlier(scene: Scene, case: str, held: Held) -> torch.Tensor:
    """Positions whose content is that of a case which was over before this one began."""
    before = torch.tensor([earlier(scene, case, n) for n in held.names])
    return before[held.case.clamp(min=0)]


def _whole_blocks(scene: Scene, held: Held) -> bool:
    size = block_size(scene)
    place = torch.arange(len(held.wrong))[held.moved]
    step = held.position[held.moved] - place
    return bool(size and len(place) >= size and (step % size == 0).all())


def _after_hit(scene: Scene, held: dict[str, Held]) -> bool:
    """Whether what was never written begins where a prefix ends that an earlier request had."""
    if not prefix_caching(scene):
        return False
    lost = {c: h.lost.nonzero().flatten() for c, h in held.items() if h.lost.any()}
    return bool(lost) and all(shared_prefix(scene, c) == int(places[0]) > 0 for c, places in lost.items())


def _content_words(held: dict[str, Held]) -> str:
    case = max(held, key=lambda c: int(held[c].found.sum()))
    mine = held[case]
    place = int(mine.found.nonzero()[0])
    whose = mine.names[int(mine.case[place])]
    other = f"position {int(mine.position[place])}" + (f" of {whose}" if whose != case else "")
    count = sum(int(h.found.sum()) for h in held.values())
    return f"{other} at position {place} of {case} ({count} such positions)"


def _lost_words(scene: Scene, held: dict[str, Held]) -> str:
    case = max(held, key=lambda c: int(held[c].lost.sum()))
    places = held[case].lost.nonzero().flatten().tolist()
    size = block_size(scene)
    edge = f", the first of blocks of {size}" if size and all(p % size == 0 for p in places) else ""
    if not edge and places[0] >= scene.prompt(case) - 1:
        edge = ", all in decode"
    shown = ", ".join(map(str, places[:4])) + (" and others" if len(places) > 4 else "")
    text = (
        f"the cache holds nothing that was computed at position {shown} of {case}{edge}, and the right rows elsewhere"
    )
    return f"{text}: they were written elsewhere, not at all, or written over"


def _blocks(scene: Scene, *, foreign: bool) -> Iterator[Trial]:
    """Attention over blocks that were read for others."""
    attention = mixing(scene)
    size = block_size(scene)
    if attention is None or not size:
        return
    reads = reads_of(attention, size)
    if not reads.any_moved:
        return
    yield Trial(reads.words(), reads.predict, free=1, prior=1.0 if foreign == reads.foreign else AGAINST)


def _shortened(scene: Scene, attention: Attention) -> Iterator[Trial]:
    """As many positions read as another case has; only full blocks in decode."""
    lengths = {c: scene.prompt(c) for c in scene.reference_capture.cases}
    best = {c: _best_length(scene, attention, c, [n for o, n in lengths.items() if o != c]) for c in scene.cases}
    if any(best.values()):
        case = next(c for c, n in best.items() if n)
        whose = next(o for o, n in lengths.items() if n == best[case] and o != case)
        label = f"with only {best[case]} positions of {case} read, as many as {whose} has,"
        yield Trial(
            label, lambda c: _cut(attention, c, best[c]) if best[c] else scene.reference(scene.point, c), free=1
        )
    size = block_size(scene)
    if size:
        label = f"with only full blocks of {size} read"
        core = attention.core
        yield Trial(
            label,
            partial(attention.masked, mask=lambda q, k: core.sees(q, k) & (k < ((q + 1) // size * size).clamp(min=1))),
        )


def _best_length(scene: Scene, attention: Attention, case: str, lengths: list[int]) -> int:
    """The number of positions with which the candidate's rows of a case come out best; 0 for all of them."""
    theirs = scene.candidate(scene.point, case)

    ours = scene.reference(scene.point, case)

    def left(rows: torch.Tensor) -> float:
        """Share of the difference that is left, with as much of this effect as comes nearest."""
        effect, difference = (rows - ours).nan_to_num().double(), (theirs - ours).nan_to_num().double()
        share = (effect * difference).sum() / effect.pow(2).sum().clamp_min(1e-300)
        return float((difference - share * effect).norm() / difference.norm().clamp_min(1e-300))

    tried = {n: left(_cut(attention, case, n)) for n in lengths if n < scene.length(case)}
    best = min(tried, key=tried.__getitem__, default=0)
    return best if tried and tried[best] < SHORTENED else 0


def _cut(attention: Attention, case: str, length: int) -> torch.Tensor:
    return attention.masked(case, mask=lambda q, k: attention.core.sees(q, k) & (k < length))


def _caches_right(scene: Scene, attention: Attention) -> bool:
    """Whether the candidate shows its keys and values, and they are the reference's."""
    for port in ("key_cache", "value_cache"):
        key = point_key(attention.module, port=port)
        if key not in scene.rules:
            return False
        for case in scene.cases:
            there = scene.present(key, case)
            ours, theirs = scene.reference(key, case)[there], scene.candidate(key, case)[there]
            if not float((theirs - ours).norm()) <= scene.allowed.position * float(ours.norm()):
                return False
    return True
