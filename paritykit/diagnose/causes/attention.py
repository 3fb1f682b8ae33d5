"""How queries and keys become weights: scale, cap, mask, window; and which heads meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from paritykit.diagnose.bench.attention import Attention, Core, attention_of, config_windows
from paritykit.diagnose.causes.cap import capped, caps, fitted
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial

SAME = 1e-7
"""Relative difference below which a fitted factor is the reference's."""
AHEAD = 6
"""Positions before a difference shows that a window may begin at: what it hides there counts for little."""


def mixing(scene: Scene) -> Attention | None:
    """The attention whose result shows at the scene's point; None where its cache is what differs."""
    found = attention_of(scene)
    return None if found is None or scene.port in ("key_cache", "value_cache") else found


def scale(scene: Scene) -> Iterator[Trial]:
    """Factors that config numbers make, then the one that fits best."""
    attention = mixing(scene)
    if attention is None:
        return
    own, size = attention.core.scale, attention.head_dim
    sizes = {
        "head_dim": size,
        "hidden_size": scene.config.get("hidden_size"),
        "heads": scene.config.get("num_attention_heads"),
    }
    known = {f"{n} ** -0.5": v**-0.5 for n, v in sizes.items() if isinstance(v, int) and v > 0}
    known |= {"1": 1.0, "1 / head_dim": 1 / size, "its square": own**2, "its root": own**0.5}
    for name, value in known.items():
        if abs(value - own) > 1e-4 * own:
            label = f"with attention scores scaled by {value:.4g} = {name} instead of {own:.4g}"
            yield Trial(label, partial(attention.changed, scale=value))
    best = fitted(
        scene, lambda value, case: attention.changed(case, scale=value), name="scale", low=own / 20, high=own * 20
    )
    if abs(best - own) > SAME * own:
        label = f"with attention scores scaled by {best:.5g}, {best / own:.4g} times the reference's,"
        yield Trial(label, partial(attention.changed, scale=best), free=1)


def softcap(scene: Scene) -> Iterator[Trial]:
    """Scores without the cap, with usual caps, with the one that fits best."""
    attention = mixing(scene)
    if attention is not None:
        own = attention.core.cap
        yield from caps(scene, "attention scores", own, lambda cap, case: attention.changed(case, cap=cap))


def window(scene: Scene) -> Iterator[Trial]:
    """No window, one position more or less, the config's, and the length where the difference begins."""
    attention = mixing(scene)
    if attention is None:
        return
    own = attention.core.window
    told = f"instead of {own}" if own else "though this layer has none"
    if own is not None:
        yield Trial(f"without the sliding window of {own}", partial(attention.changed, window=None))
    near = [] if own is None else [own - 1, own + 1, own * 2, own // 2]
    for size in dict.fromkeys([*config_windows(scene), *near]):
        if size != own and size > 0:
            yield Trial(f"with a sliding window of {size} {told}", partial(attention.changed, window=size))
    for begins in first_wrong(scene):
        if begins != own:
            label = f"with a sliding window of {begins} {told}"
            yield Trial(label, partial(attention.changed, window=begins), free=1)


def first_wrong(scene: Scene) -> list[int]:
    """The position from which on rows differ by more than before, and the few ahead of it, where that hardly shows."""
    size = max(scene.length(c) for c in scene.cases)
    sums, rows = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for case in scene.cases:
        ours, theirs = scene.reference(scene.point, case).double(), scene.candidate(scene.point, case).double()
        error = (theirs - ours).norm(dim=1) / ours.norm(dim=1).clamp_min(1e-30)
        there = error.isfinite()
        sums[: len(error)] += error.nan_to_num(posinf=0.0).pow(2)
        rows[: len(error)] += there
    after, before = sums.flip(0).cumsum(0).flip(0)[1:], sums.cumsum(0)[:-1]
    count_after, count = rows.flip(0).cumsum(0).flip(0)[1:], rows.cumsum(0)[:-1]
    cost = sum(
        n * (total / n.clamp_min(1)).clamp_min(1e-30).log() for n, total in ((count_after, after), (count, before))
    )
    if not len(before):
        return []
    edge = int(torch.as_tensor(cost).argmin()) + 1
    return [n for n in range(edge, edge - AHEAD, -1) if n > 0]


def mask(scene: Scene) -> Iterator[Trial]:
    """No mask, one off, added as a number, and each chunk alone."""
    attention = mixing(scene)
    if attention is None:
        return
    core = attention.core
    yield Trial(
        "with every token seeing the whole text", partial(attention.masked, mask=lambda q, k: (k >= 0) & (q >= 0))
    )
    yield Trial(
        "with every token also seeing the one after it",
        partial(attention.masked, mask=lambda q, k: core.sees(q, k) | (k == q + 1)),
    )
    yield Trial(
        "with no token seeing itself",
        partial(attention.masked, mask=lambda q, k: core.sees(q, k) & ((k < q) | (q == 0))),
    )
    if not core.causal:
        yield Trial("with a causal mask", partial(attention.changed, causal=True))
    yield Trial("with the mask added to the scores as 0 and 1", partial(_added, attention))
    yield Trial("with each chunk of a prompt seeing itself only", partial(_chunks_alone, attention, core))
    if core.window is not None:
        label = "with each later chunk of a prompt seeing itself only, without a window,"
        yield Trial(label, partial(_chunks_alone, attention, replace(core, window=None)))


def _added(attention: Attention, case: str) -> torch.Tensor:
    query, key, value = attention.turned(case)
    group = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (key, value))
    scores = query.transpose(0, 1) @ keys.transpose(1, 2) * attention.core.scale
    scores = capped(scores, attention.core.cap)
    place = torch.arange(len(query))[:, None], torch.arange(len(key))[None]
    weights = (scores + attention.core.sees(*place).to(scores)).softmax(-1)
    return attention.predict(case, (weights @ values).transpose(0, 1).reshape(len(query), -1))


def chunk_starts(scene: Scene, case: str) -> torch.Tensor:
    """For every position the first one that the candidate computed with it in one step, ``[positions]``."""
    capture, key = scene.candidate_capture, scene.rules[scene.point].candidate
    found = torch.arange(scene.length(case))
    for span in capture.spans(capture.point(key), case):
        found[span.position : span.position + span.length] = span.position
    return found


def _chunks_alone(attention: Attention, core: Core, case: str) -> torch.Tensor:
    start = chunk_starts(attention.scene, case)
    late = torch.arange(len(start)) >= attention.scene.prompt(case)
    start = torch.where(late, 0, start)[:, None]
    own = attention.core

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.where(start > 0, core.sees(query, key) & (key >= start), own.sees(query, key))

    return attention.masked(case, mask=sees)


def permuted(scene: Scene) -> Iterator[Trial]:
    """Heads that meet others, or are laid out otherwise; keys for values."""
    attention = mixing(scene)
    if attention is None:
        return
    yield Trial("with kv heads taken in turn, not in groups", partial(_in_turn, attention))
    yield Trial("with keys and values in each other's place", partial(_exchanged, attention, turned=True))
    yield Trial(
        "with keys and values in each other's place before rotation", partial(_exchanged, attention, turned=False)
    )
    for label, change in _layouts(attention).items():
        yield Trial(f"with heads {label}", partial(_laid_out, attention, change))


def _laid_out(attention: Attention, change: Callable[[torch.Tensor], torch.Tensor], case: str) -> torch.Tensor:
    return attention.predict(case, change(attention.output(attention.turned(case))))


def _in_turn(attention: Attention, case: str) -> torch.Tensor:
    query, key, value = attention.turned(case)
    group = query.shape[1] // key.shape[1]
    return attention.predict(case, attention.output((query, key.repeat(1, group, 1), value.repeat(1, group, 1))))


def _exchanged(attention: Attention, case: str, *, turned: bool) -> torch.Tensor:
    if turned:
        query, key, value = attention.turned(case)
        return attention.predict(case, attention.output((query, value, key)))
    query, key, value = attention.plain(case)
    place = torch.arange(len(query))
    turn = attention.rotation.turn
    return attention.predict(case, attention.output((turn(query, place), turn(value, place), key)))


def _layouts(attention: Attention) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    size = attention.head_dim

    def heads(rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(len(rows), -1, size)

    return {
        "laid out element by element": lambda r: heads(r).transpose(1, 2).reshape(r.shape),
        "in reverse order": lambda r: heads(r).flip(1).reshape(r.shape),
        "one place further on": lambda r: heads(r).roll(1, dims=1).reshape(r.shape),
    }
