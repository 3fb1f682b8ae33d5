"""vLLM's own loader, watched: where each weight lands is traced before the real weights are read.

A load format of its own, registered as vLLM's plug-ins do. It hands addresses to the model's ``load_weights`` first,
reads them back, restores what was there, and then loads as vLLM does; of a large model it follows the loading itself.
Linear weights are compared at once, since on a CPU vLLM packs and deletes them right after loading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import torch
from torch import nn
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from paritykit.provenance.watch import Give, watch_load
from paritykit.provenance.weightmap import RankLedger
from paritykit.registry import load_attribute

LOAD_FORMAT = "paritykit"
LEDGERS: WeakKeyDictionary[nn.Module, RankLedger] = WeakKeyDictionary()
"""The ledger of each model this process loaded."""


class LoadOrders(msgspec.Struct, frozen=True, kw_only=True):
    """What to do around loading.

    ``before_load`` is ``package.module:function``, called with the model and ``before_load_args`` first.
    """

    before_load: str = ""
    before_load_args: dict[str, Any] = {}
    trace: bool = True


@register_model_loader(LOAD_FORMAT)
class WatchedLoader(DefaultModelLoader):  # type: ignore[misc,unused-ignore]
    """``load_format="paritykit"``; its extra config is a ``LoadOrders``."""

    def __init__(self, load_config: Any) -> None:
        self._orders = msgspec.convert(load_config.model_loader_extra_config or {}, LoadOrders)
        plain = {"load_format": "auto", "model_loader_extra_config": {}, "use_tqdm_on_load": False}
        super().__init__(dataclasses.replace(load_config, **plain))

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Trace, load, compare."""
        orders = self._orders
        stage = int(get_pp_group().rank_in_group)
        rank = stage * get_tensor_model_parallel_world_size() + get_tensor_model_parallel_rank()
        if orders.before_load:
            load_attribute(orders.before_load, kind="before_load function")(model, rank=rank, **orders.before_load_args)
        if not orders.trace:
            super().load_weights(model, model_config)
            return
        with torch.no_grad():
            ledger = watch_load(
                model,
                weights=partial(self.get_all_weights, model_config, model),
                load=model.load_weights,  # type: ignore[arg-type]
                load_real=partial(self._load_given, model, model_config),
                rank=rank,
                padding=padding(model),
            )
            LEDGERS[model] = msgspec.structs.replace(ledger, stage=stage)

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """What vLLM reads, each tensor shown to who follows it."""
        for name, tensor in super().get_all_weights(model_config, model):
            yield name, tensor if self._give is None else self._give(name, tensor)

    def _load_given(self, model: nn.Module, model_config: Any, give: Give) -> None:
        self._give = give
        try:
            super().load_weights(model, model_config)
        finally:
            self._give = None

    _give: Give | None = None


def padding(model: nn.Module) -> dict[str, tuple[int, str]]:
    """Parameters with padding rows on this rank: their first such row, and why."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        indices = getattr(module, "shard_indices", None)
        if indices is not None and hasattr(module, "num_embeddings_padded"):
            why = f"the vocabulary of {module.org_vocab_size} is padded to {module.num_embeddings_padded}"
            for kind in ("weight", "bias"):
                found[f"{name}.{kind}".lstrip(".")] = (int(indices.num_org_elements), why)
    return found
