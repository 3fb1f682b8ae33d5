"""Attention over a KV cache: the core module, and the plain torch backend that reads each request's keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from paritykit.engines.nano.kv import LayerCache
from paritykit.engines.nano.layers import softcap
from paritykit.engines.nano.step import Step
from paritykit.engines.nano.triton_attention import paged_attention, why_no_triton
from paritykit.errors import UnknownNameError, UsageError


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
    """Softmax attention of one request, to the shape of ``query``.

    ``query`` ``[tokens, heads, head_dim]`` from position ``start`` on; ``keys`` and ``values``
    ``[context, kv_heads, head_dim]`` from position 0 on. Softmax in float32 at least, as in transformers.
    """
    tokens, heads, head_dim = query.shape
    context, kv_heads, _ = keys.shape
    # Queries that share a kv head are rows of one product: its keys and values are not repeated for them.
    rows = query.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
    weights = softcap(torch.bmm(rows, keys.permute(1, 2, 0)).mul_(scores.scale), scores.cap)
    beyond = scores.window is not None and start + tokens > scores.window
    if context > start + 1 or beyond:
        mask = mask_scores(tokens, context, start=start, window=scores.window, like=weights)
        weights.view(heads, tokens, context).add_(mask)
    weights = weights.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    mixed = torch.bmm(weights, values.transpose(0, 1)).view(heads, tokens, head_dim)
    return mixed.transpose(0, 1)


def mask_scores(tokens: int, context: int, *, start: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """What is added to scores, ``[tokens, context]``: -inf for the future and the past beyond the window, else 0."""
    never = like.new_full((tokens, context), float("-inf"))
    future = never.triu(start + 1)
    return future if window is None else future + never.tril(start - window)


BACKENDS: dict[str, Backend] = {"torch": gather_attention, "triton": paged_attention}


def find_backend(name: str) -> Backend:
    """The attention backend of that name. Raises UnknownNameError."""
    if name not in BACKENDS:
        raise UnknownNameError("attention backend of nano", name, (*BACKENDS, "auto"))
    return BACKENDS[name]


def choose_attention(name: str, *, device: str, dtype: str) -> str:
    """The name of the backend for a model of ``dtype`` on ``device``; ``auto`` is Triton on a GPU where it can run.

    Raises UnknownNameError, or UsageError where the one that is asked for cannot run.
    """
    if name == "auto":
        return "triton" if device.startswith("cuda") and not why_no_triton(device, dtype) else "torch"
    refusal = why_no_triton(device, dtype) if find_backend(name) is paged_attention else ""
    if refusal:
        raise UsageError(f"attention_backend {name!r} {refusal}")
    return name
