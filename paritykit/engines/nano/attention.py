"""Attention over a KV cache: the core module, and the plain torch backend that reads each request's keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from paritykit.engines.nano.kv import LayerCache
from paritykit.engines.nano.layers import softcap
from paritykit.engines.nano.step import Step
from paritykit.errors import UnknownNameError


@dataclass(frozen=True)
class Scores:
    """How queries and keys become weights: factor, window (None: all of the past), tanh cap (None: no cap)."""

    scale: float
    window: int | None = None
    cap: float | None = None


Backend = Callable[[torch.Tensor, LayerCache, Step, Scores], torch.Tensor]
"""Queries ``[tokens, heads, head_dim]`` of a step, whose keys and values the cache holds, to the same shape."""


class Attention(nn.Module):
    """The core: writes keys and values to the layer's cache and attends over what it holds.

    ``cache`` is put there by whoever runs the model.
    """

    cache: LayerCache

    def __init__(self, scores: Scores, backend: Backend) -> None:
        super().__init__()
        self.scores, self.backend = scores, backend

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step) -> torch.Tensor:
        """``[tokens, heads * head_dim]`` of queries, keys and values ``[tokens, (kv) heads, head_dim]``."""
        self.cache.write(key, value, step)
        return self.backend(query, self.cache, step, self.scores).flatten(1)


def gather_attention(query: torch.Tensor, cache: LayerCache, step: Step, scores: Scores) -> torch.Tensor:
    """Request after request, each over its own keys and values: any cache gives the same bits."""
    parts = []
    for chunk, rows in zip(step.chunks, step.rows, strict=True):
        keys, values = cache.read(chunk.table, chunk.end, query.dtype)
        parts.append(attend(query[rows], keys, values, start=chunk.start, scores=scores))
    return torch.cat(parts)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, start: int, scores: Scores
) -> torch.Tensor:
    """Softmax attention of one request.

    ``query`` ``[tokens, heads, head_dim]`` from position ``start`` on; ``keys`` and ``values``
    ``[context, kv_heads, head_dim]`` from position 0 on. Softmax in float32 at least, as in transformers.
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (keys, values))
    weights = softcap(query.transpose(0, 1) @ keys.transpose(1, 2) * scores.scale, scores.cap)
    hidden = hidden_keys(query.shape[0], keys.shape[1], start=start, window=scores.window, device=query.device)
    weights = weights.masked_fill(hidden, float("-inf"))
    weights = weights.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ values).transpose(0, 1)


def hidden_keys(tokens: int, context: int, *, start: int, window: int | None, device: torch.device) -> torch.Tensor:
    """What a query must not see, bool ``[tokens, context]``: the future, and the past beyond the window."""
    query = torch.arange(start, start + tokens, device=device)[:, None]
    key = torch.arange(context, device=device)[None]
    future = key > query
    return future if window is None else future | (key <= query - window)


BACKENDS: dict[str, Backend] = {"torch": gather_attention}


def find_backend(name: str) -> Backend:
    """The attention backend of that name. Raises UnknownNameError."""
    if name not in BACKENDS:
        raise UnknownNameError("attention backend of nano", name, BACKENDS)
    return BACKENDS[name]
