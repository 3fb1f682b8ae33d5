"""The KV cache of transformers as points of a capture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from paritykit.captures.manifest import CACHE_PORTS
from paritykit.captures.recorder import Seen
from paritykit.engines.reading import FirstTensor


class CacheReading(FirstTensor):
    """Reads transformers' modules; attention modules also show what they hand to the KV cache, before their output.

    That is what the cache holds, in every row: sliding layers of transformers' cache forget all but their window.
    """

    def __init__(self) -> None:
        self._handed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._watched: Any = None

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Seen]:
        """As always; a cache that is met for the first time is watched from now on."""
        cache = kwargs.get("past_key_values")
        if cache is not None and cache is not self._watched and hasattr(cache, "update"):
            self._watch(cache)
        yield from super().inputs(module, args, kwargs)

    def outputs(self, module: nn.Module, output: Any) -> Iterator[Seen]:
        """The keys and values that the module cached in this call, heads before tokens, and its output."""
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and layer in self._handed:
            for port, tensor in zip(CACHE_PORTS, self._handed.pop(layer), strict=True):
                yield Seen(port, tensor.transpose(1, 2))
        yield from super().outputs(module, output)

    def _watch(self, cache: Any) -> None:
        update = cache.update

        def watched(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self._handed[layer_idx] = (keys, values)
            return update(keys, values, layer_idx, *args, **kwargs)

        cache.update = watched
        self._watched = cache
        self._handed.clear()
