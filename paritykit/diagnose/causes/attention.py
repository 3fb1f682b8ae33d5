"""How queries and keys become weights: scale, cap, mask, window; and which heads meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from paritykit.diagnose.bench.attention import Attention, Core, attention_of, config_windows
from paritykit.diagnose.bench.linear import is_head, linear_of
from paritykit.diagnose.causes.weights import rows_permuted
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial

USUAL_CAPS = (50.0, 30.0, 20.0, 15.0, 10.0, 5.0, 3.0, 2.0)
GOLDEN = (math.sqrt(5) - 1) / 2
ROUNDS = 40


def mixing(scene: Scene) -> Attention | None:
    """The attention whose result shows at the scene's point; None where its cache is what differs."""
    found = attention_of(scene)
    return None if found is None or scene.port in ("key_cache", "value_cache") else found


def fitted(scene: Scene, predict: Callable[[float, str], torch.Tensor], low: float, high: float) -> float:
    """The number between ``low`` and ``high`` whose prediction is nearest to the candidate, by golden section of logs."""
    target = {c: scene.candidate(scene.point, c) for c in scene.cases[:2]}

    def error(log: float) -> float:
        parts = [(predict(math.exp(log), c) - t).nan_to_num().double().norm() ** 2 for c, t in target.items()]
        return float(torch.stack(parts).sum())

    a, b = math.log(low), math.log(high)
    for _ in range(ROUNDS):
        c, d = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
        a, b = (a, d) if error(c) < error(d) else (c, b)
    return math.exp((a + b) / 2)


def scale(scene: Scene) -> Iterator[Trial]:
    """Factors that config numbers make, then the one that fits best."""
    attention = mixing(scene)
    if attention is None:
        return
    own, size = attention.core.scale, attention.head_dim
    sizes = {"head_dim": size, "hidden_size": scene.config.get("hidden_size"), "heads": scene.config.get("num_attention_heads")}
    known = {f"{n} ** -0.5": v**-0.5 for n, v in sizes.items() if isinstance(v, int) and v > 0}
    known |= {"1": 1.0, "1 / head_dim": 1 / size, "its square": own**2, "its root": own**0.5}
    for name, value in known.items():
        if abs(value - own) > 1e-4 * own:
            label = f"with attention scores scaled by {value:.4g} = {name} instead of {own:.4g}"
            yield Trial(label, partial(attention.changed, scale=value))
    best = fitted(scene, lambda value, case: attention.changed(case, scale=value), own / 20, own * 20)
    if abs(best - own) > 1e-4 * own:
        label = f"with attention scores scaled by {best:.5g}, {best / own:.4g} times the reference's,"
        yield Trial(label, partial(attention.changed, scale=best), free=1)


def softcap(scene: Scene) -> Iterator[Trial]:
    """Scores, or logits, without the cap, with usual caps, with the one that fits best."""
    attention = mixing(scene)
    if attention is not None:
        own = attention.core.cap
        yield from _caps(scene, "attention scores", own, lambda cap, case: attention.changed(case, cap=cap))
    raw = _raw_logits(scene)
    if raw:
        config = scene.config.get("final_logit_softcapping")
        final = float(config) if isinstance(config, int | float) else None
        yield from _caps(scene, "logits", final, lambda cap, case: _capped(scene.reference(raw, case), cap))


def _caps(
    scene: Scene, what: str, own: float | None, predict: Callable[[float | None, str], torch.Tensor]
) -> Iterator[Trial]:
    told = f"instead of {own:g}" if own else "though there is none"
    if own is not None:
        yield Trial(f"with {what} not capped", partial(predict, None))
    named = [scene.config.get(n) for n in ("attn_logit_softcapping", "final_logit_softcapping")]
    for cap in dict.fromkeys([*(float(c) for c in named if isinstance(c, int | float)), *USUAL_CAPS]):
        if cap != own:
            yield Trial(f"with {what} capped at {cap:g} {told}", partial(predict, cap))
    best = fitted(scene, predict, 0.3, 300.0)
    yield Trial(f"with {what} capped at {best:.4g} {told}", partial(predict, best), free=1)


def _capped(rows: torch.Tensor, cap: float | None) -> torch.Tensor:
    return rows if cap is None else torch.tanh(rows / cap) * cap


def _raw_logits(scene: Scene) -> str:
    """The head's output before any cap, where the scene's point is the logits."""
    if scene.port != "logits":
        return ""
    return next((k for k, p in scene.points.items() if not p.port and is_head(scene, p.module)), "")


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
    begins = _first_wrong(scene)
    if begins and begins != own:
        label = f"with a sliding window of {begins} {told}"
        yield Trial(label, partial(attention.changed, window=begins), free=1)


def _first_wrong(scene: Scene) -> int:
    """The first position that differs, in any case; 0 for none."""
    found = []
    for case in scene.cases:
        ours, theirs = scene.reference(scene.point, case), scene.candidate(scene.point, case)
        wrong = (theirs - ours).nan_to_num().norm(dim=1) > scene.allowed.position * ours.norm(dim=1)
        found += wrong.nonzero().flatten()[:1].tolist()
    return min(found, default=0)


def mask(scene: Scene) -> Iterator[Trial]:
    """No mask, one off, added as a number, and each chunk alone."""
    attention = mixing(scene)
    if attention is None:
        return
    core = attention.core
    yield Trial("with every token seeing the whole text", partial(attention.masked, mask=lambda q, k: (k >= 0) & (q >= 0)))
    yield Trial(
        "with every token also seeing the one after it",
        partial(attention.masked, mask=lambda q, k: core.sees(q, k) | (k == q + 1)),
    )
    yield Trial("with no token seeing itself", partial(attention.masked, mask=lambda q, k: core.sees(q, k) & ((k < q) | (q == 0))))
    if not core.causal:
        yield Trial("with a causal mask", partial(attention.changed, causal=True))
    yield Trial("with the mask added to the scores as 0 and 1", partial(_added, attention))
    yield Trial("with each chunk of a prompt seeing itself only", partial(_chunks_alone, attention, core))
    if core.window is not None:
        label = "with each chunk of a prompt seeing itself only, and no window,"
        yield Trial(label, partial(_chunks_alone, attention, replace(core, window=None)))


def _added(attention: Attention, case: str) -> torch.Tensor:
    query, key, value = attention.turned(case)
    group = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (key, value))
    scores = query.transpose(0, 1) @ keys.transpose(1, 2) * attention.core.scale
    scores = _capped(scores, attention.core.cap)
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
    start = torch.where(late, 0, start)
    return attention.masked(case, mask=lambda q, k: core.sees(q, k) & (k >= start[:, None]))


def permuted(scene: Scene) -> Iterator[Trial]:
    """Rows of a linear layer; heads that meet others, or are laid out otherwise; keys for values."""
    yield from rows_permuted(scene)
    attention = mixing(scene)
    if attention is None:
        return
    yield Trial("with kv heads taken in turn, not in groups", partial(_in_turn, attention))
    yield Trial("with keys and values in each other's place", partial(_exchanged, attention, turned=True))
    yield Trial("with keys and values in each other's place before rotation", partial(_exchanged, attention, turned=False))
    for label, change in _layouts(attention).items():
        yield Trial(f"with heads {label}", lambda case, c=change: attention.predict(case, c(attention.output(attention.turned(case)))))  # type: ignore[misc]


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
