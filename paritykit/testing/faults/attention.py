"""Mistakes in how queries and keys become weights: scale, softcap, mask, window; and in what attention is fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from paritykit.engines.nano.attention import Scores
from paritykit.testing.faults import needs
from paritykit.testing.faults.conditions import BEYOND, BEYOND_DECODE, CHUNKS, DECODE
from paritykit.testing.faults.site import Core, Site
from paritykit.testing.faults.table import fault

ATTENTION = "model.layers.{layer}.self_attn"
SCALE = {"kind": "scale", "point": ATTENTION, "checks": ("modules", "logits"), "graded": True}
MASK = {"kind": "attention", "point": ATTENTION, "checks": ("modules", "logits"), "graded": True}
DECODING = {
    "point": ATTENTION,
    "checks": ("modules", "logits", "decode_prefill"),
    "graded": True,
    "engines": ("nano", "vllm"),
}
CAP, WINDOW = 2.0, 8


def in_decode(core: Core, wrong: torch.Tensor) -> torch.Tensor:
    """The wrong result where a token is decoded, the right one elsewhere."""
    return torch.where(core.decode, wrong, core.right)


Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What is not seen, of query positions ``[n, 1]`` and key positions ``[1, m]``."""


def masked(core: Core, hidden: Mask, *, added: bool = False) -> torch.Tensor:
    """Attention with another mask; ``added``: the mask, 1 for what may be seen, is only added to the scores."""
    output = core.right.clone()
    for rows, query, keys, values, start in core.requests():
        group = query.shape[1] // keys.shape[1]
        wide = (t.repeat_interleave(group, dim=1).transpose(0, 1).float() for t in (keys, values))
        key, value = wide
        weights = query.transpose(0, 1).float() @ key.transpose(1, 2) * core.scores.scale
        if core.scores.cap is not None:
            weights = torch.tanh(weights / core.scores.cap) * core.scores.cap
        place = torch.arange(start, start + query.shape[0])[:, None], torch.arange(keys.shape[0])[None]
        unseen = hidden(*place).to(weights.device)
        weights = weights + (~unseen).float() if added else weights.masked_fill(unseen, float("-inf"))
        weights = weights.softmax(-1)
        output[rows] = (weights @ value).transpose(0, 1).to(output.dtype)
    return output


@fault("attention-scale", cause="attention-scale", seen=("vLLM #29908",), **SCALE)
def scale(site: Site) -> None:
    """Scores are multiplied by a factor meant for another class."""
    site.on_attention(lambda core: core.run(scores=replace(core.scores, scale=core.scores.scale * 1.1)))


@fault(
    "attention-scale-of-head-dim",
    cause="attention-scale",
    needs=(needs.OWN_SCALE,),
    **SCALE,
)
def default_scale(site: Site) -> None:
    """Scores are divided by sqrt(head_dim) where the config has a number of its own."""
    site.on_attention(lambda core: core.run(scores=replace(core.scores, scale=core.right.shape[-1] ** -0.5)))


@fault(
    "value-scale",
    cause="scale-factor",
    seen=("vLLM #31175", "vLLM #37054", "SGLang #18396"),
    **SCALE,
)
def value_scale(site: Site) -> None:
    """Values are multiplied by a scale that does not belong to this checkpoint."""
    site.on_attention(lambda core: core.right * 0.7)


@fault(
    "attention-softcap-missing",
    cause="softcap",
    needs=(needs.ATTENTION_CAP,),
    **SCALE,
)
def cap_missing(site: Site) -> None:
    """The config's cap on scores is not passed to the attention backend."""
    site.on_attention(lambda core: core.run(scores=replace(core.scores, cap=None)))


@fault(
    "attention-softcap-added",
    cause="softcap",
    seen=("SGLang #5622",),
    needs=(needs.NO_ATTENTION_CAP,),
    **SCALE,
)
def cap_added(site: Site) -> None:
    """Scores are capped as in the family's predecessor, though this model has no cap."""
    site.on_attention(lambda core: core.run(scores=replace(core.scores, cap=CAP)))


@fault(
    "attention-softcap-missing-in-decode",
    kind="scale",
    cause="softcap",
    needs=(needs.ATTENTION_CAP,),
    when=DECODE,
    **DECODING,
)
def cap_missing_in_decode(site: Site) -> None:
    """The decode path leaves the cap on scores out."""
    site.on_attention(lambda core: in_decode(core, core.run(scores=replace(core.scores, cap=None))))


@fault(
    "window-missing",
    cause="sliding-window",
    seen=("vLLM #14896", "vLLM #17180", "litgpt #1995"),
    needs=(needs.WINDOW,),
    when=BEYOND,
    **MASK,
)
def window_missing(site: Site) -> None:
    """A layer with a sliding window sees all of the past."""
    site.on_attention(lambda core: core.run(scores=replace(core.scores, window=None)))


@fault(
    "window-on-full-attention",
    cause="sliding-window",
    seen=("vLLM #11583", "SGLang #6162"),
    needs=(needs.NO_WINDOW,),
    when=BEYOND,
    **MASK,
)
def window_added(site: Site) -> None:
    """A layer with full attention gets the window of the others."""
    site.on_attention(lambda core: core.run(scores=replace(core.scores, window=WINDOW)))


@fault(
    "window-off-by-one",
    cause="sliding-window",
    needs=(needs.WINDOW,),
    when=BEYOND,
    **MASK,
)
def window_short(site: Site) -> None:
    """The window is one position shorter than the config's."""

    def wrong(core: Core) -> torch.Tensor:
        assert core.scores.window is not None
        return core.run(scores=replace(core.scores, window=core.scores.window - 1))

    site.on_attention(wrong)


@fault(
    "window-missing-in-decode",
    kind="attention",
    cause="sliding-window",
    needs=(needs.WINDOW,),
    when=BEYOND_DECODE,
    **DECODING,
)
def window_missing_in_decode(site: Site) -> None:
    """The decode path leaves the sliding window out."""
    site.on_attention(lambda core: in_decode(core, core.run(scores=replace(core.scores, window=None))))


@fault(
    "mask-bidirectional",
    cause="mask",
    seen=("vLLM #11801", "vLLM #46108"),
    **MASK,
)
def bidirectional(site: Site) -> None:
    """Every token sees the whole text, as in an encoder."""
    site.on_attention(lambda core: masked(core, lambda query, key: (key < 0) & (query < 0)))


@fault("mask-off-by-one", cause="mask", **MASK)
def off_by_one(site: Site) -> None:
    """Every token also sees the one after it."""

    def wrong(core: Core) -> torch.Tensor:
        window = core.scores.window or 1 << 30
        return masked(core, lambda query, key: (key > query + 1) | (key <= query - window))

    site.on_attention(wrong)


@fault(
    "mask-added-as-bool",
    cause="mask",
    seen=("mlx-lm #27",),
    **MASK,
)
def added_as_bool(site: Site) -> None:
    """A mask of true and false is added to the scores, where it should choose."""
    site.on_attention(lambda core: masked(core, windowed(core), added=True))


@fault(
    "chunk-forgets-the-past",
    kind="attention",
    cause="mask",
    point=ATTENTION,
    checks=("modules", "logits", "chunking"),
    seen=("vLLM #22034", "vLLM #15492"),
    when=CHUNKS,
    graded=True,
    engines=("nano",),
)
def forgets(site: Site) -> None:
    """A later chunk of a prompt attends to itself only."""

    def wrong(core: Core) -> torch.Tensor:
        output = core.right.clone()
        for rows, query, keys, values, start in core.requests():
            if query.shape[0] > 1 and start:
                own = masked(Own(core, rows, query, keys[start:], values[start:]), lambda q, k: k > q)
                output[rows] = own[rows]
        return output

    site.on_attention(wrong)


@fault(
    "kv-heads-in-turn",
    kind="attention",
    cause="rows-permuted",
    point=ATTENTION,
    checks=("modules", "logits"),
    needs=(needs.GROUPED,),
    graded=True,
)
def heads_in_turn(site: Site) -> None:
    """Heads take kv heads in turn, where neighbours should share one."""

    def wrong(core: Core) -> torch.Tensor:
        output = core.right.clone()
        for rows, query, keys, values, start in core.requests():
            group = query.shape[1] // keys.shape[1]
            tiled = Own(core, rows, query, keys.repeat(1, group, 1), values.repeat(1, group, 1), start)
            output[rows] = masked(tiled, windowed(core))[rows]
        return output

    site.on_attention(wrong)


@fault(
    "attention-heads-interleaved",
    kind="attention",
    cause="rows-permuted",
    point=ATTENTION,
    checks=("modules", "logits"),
    seen=("gpt-fast 776b733",),
    graded=True,
)
def interleaved(site: Site) -> None:
    """The heads' outputs are laid out element by element, and not head by head."""
    site.on_attention(lambda core: core.right.transpose(1, 2).reshape(core.right.shape))


@fault(
    "keys-and-values-swapped",
    kind="attention",
    cause="rows-permuted",
    point=ATTENTION,
    checks=("modules", "logits"),
    seen=("vLLM #13687", "vLLM #8055"),
    graded=True,
)
def swapped(site: Site) -> None:
    """The fused projection is split in the wrong order: keys are taken for values."""

    def wrong(core: Core) -> torch.Tensor:
        output = core.right.clone()
        for rows, query, keys, values, start in core.requests():
            output[rows] = masked(Own(core, rows, query, values, keys, start), windowed(core))[rows]
        return output

    site.on_attention(wrong)


@fault(
    "attention-in-half-precision",
    kind="dtype",
    cause="dtype-rounding",
    seen=("vLLM #11921", "vLLM #35617"),
    point=ATTENTION,
    checks=("modules", "logits"),
    graded=True,
)
def in_half(site: Site) -> None:
    """Attention weights are rounded to bfloat16 in a float32 model."""
    site.on_attention(lambda core: core.right.bfloat16().to(core.right.dtype))


def windowed(core: Core) -> Mask:
    """The right mask, as a function of positions."""
    window = core.scores.window or 1 << 30
    return lambda query, key: (key > query) | (key <= query - window)


class Own:
    """One request of a core, with other keys and values."""

    def __init__(self, core: Core, *request: Any) -> None:
        self.scores, self.right, self.decode, self.count = core.scores, core.right, core.decode, 1
        self._request = request

    def run(self, *, scores: Scores | None = None, order: list[int] | None = None) -> torch.Tensor:
        """What the core gave."""
        del scores, order
        return self.right

    def requests(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, int]]:
        """The one."""
        rows, query, keys, values, *start = self._request
        yield rows, query, keys, values, start[0] if start else 0
