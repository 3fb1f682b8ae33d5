"""The KV cache of transformers as points of a capture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from paritykit.captures.manifest import CACHE_PORTS
from paritykit.captures.recorder import Seen
from paritykit.engines.reading import FirstTensor

Stored = Callable[[torch.Tensor], torch.Tensor]
"""What a cache makes of the numbers that it is handed."""


def is_cache(value: object) -> bool:
    """Whether an argument is a KV cache of transformers', by what it can do: a mapping has no length in tokens."""
    return not isinstance(value, torch.Tensor) and hasattr(value, "update") and hasattr(value, "get_seq_length")


class CacheReading(FirstTensor):
    """Reads transformers' modules, and what attention modules hand to the KV cache, as soon as a hook fires after it.

    That is what the cache holds, in every row: sliding layers of transformers' cache forget all but their window. With
    ``stored`` it is kept, and shown, as that makes it.
    """

    def __init__(self, *, stored: Stored | None = None) -> None:
        self._stored = stored
        self._entered: dict[int, list[nn.Module]] = defaultdict(list)
        self._handed: list[Seen] = []
        self._watched: Any = None

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Seen]:
        """What was cached since, then as always; a cache that is met for the first time is watched from now on."""
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            self._entered[layer].append(module)  # the innermost module with a layer's number caches for it
        cache = next((a for a in (*kwargs.values(), *args) if is_cache(a)), None)  # some call it layer_past
        if cache is not None and cache is not self._watched:
            self._watch(cache)
        yield from self._shown()
        yield from super().inputs(module, args, kwargs)

    def outputs(self, module: nn.Module, output: Any) -> Iterator[Seen]:
        """What was cached since, then the module's output."""
        yield from self._shown()
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and module in self._entered[layer]:
            self._entered[layer].remove(module)
        yield from super().outputs(module, output)

    def _shown(self) -> Iterator[Seen]:
        handed, self._handed = self._handed, []
        yield from handed

    def _watch(self, cache: Any) -> None:
        update = cache.update

        def watched(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if self._stored is not None:
                keys, values = self._stored(keys), self._stored(values)
            owner = self._entered[layer_idx][-1] if self._entered[layer_idx] else None
            if owner is not None:
                pair = zip(CACHE_PORTS, (keys, values), strict=True)
                self._handed += [Seen(port, tensor.transpose(1, 2), owner) for port, tensor in pair]
            return update(keys, values, layer_idx, *args, **kwargs)

        cache.update = watched
        self._watched = cache
        self._handed.clear()
