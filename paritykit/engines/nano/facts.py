"""What nano says of its modules, for mapping: fused parts, names of weights, other meanings; and what it records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from paritykit.captures.recorder import Call, Seen
from paritykit.engines.features import experts_chosen
from paritykit.engines.nano.attention import Attention
from paritykit.engines.nano.linear import ColumnParallelLinear
from paritykit.engines.nano.model import CausalLM, Decoder
from paritykit.engines.nano.moe import Router
from paritykit.engines.nano.rotary import Rotary
from paritykit.engines.nano.weights import checkpoint_targets
from paritykit.engines.reading import FirstTensor

HEAD = "lm_head"
ROTARY = "nano's rotary module returns rotated q and k, not cos and sin; its effect shows at the attention's output"
ATTENTION_CORE = "the attention core has no module in the reference; its output is compared as o_proj#input"


def module_facts(model: CausalLM) -> dict[str, Any]:
    """Everything mapping needs of the modules of this rank, JSON-ready; the same fields as a vLLM worker's."""
    named = list(model.named_modules(remove_duplicate=False))
    return {
        "modules": [n for n, _ in named],
        "fused": {n: fused_parts(m) for n, m in named if isinstance(m, ColumnParallelLinear)},
        "meanings": {n: why for n, m in named if (why := other_meaning(m))},
        "packed": {k: list(v.values()) for k, v in model.packed_modules_mapping.items()},
        "names": weight_names(model),
        "routers": {n: count for n, m in named if (count := experts_chosen(m))},
        "head": HEAD,
    }


def fused_parts(module: ColumnParallelLinear) -> list[dict[str, int]]:
    """The parts of a fused linear on this rank."""
    return [{"total": p.total, "local": p.local, "replicas": p.replicas} for p in module.parts.values()]


def weight_names(model: CausalLM) -> dict[str, tuple[str, str]]:
    """Checkpoint tensor name to (parameter, shard); experts are no shards, since they share one module's output."""
    found = {}
    for name, (parameter, shard) in checkpoint_targets(model).items():
        found[name] = (parameter, "" if shard is None or isinstance(shard, tuple) else str(shard))
    return found


def other_meaning(module: nn.Module) -> str:
    """Why the module's output must not be compared by name; empty if it may be."""
    if isinstance(module, Rotary):
        return ROTARY
    return ATTENTION_CORE if isinstance(module, Attention) else ""


def goes_on(module: nn.Module) -> bool:
    """Whether what the module gives is not its output yet: the next stage goes on with it."""
    return isinstance(module, Decoder) and not module.stage.last


class NanoReading:
    """The first tensor of each call, but for modules that mean something else or are not done on this stage."""

    def __init__(self) -> None:
        self._plain = FirstTensor()

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Seen]:
        """See ``Reading.inputs``."""
        if not other_meaning(module):
            yield from self._plain.inputs(module, args, kwargs)

    def outputs(self, module: nn.Module, output: Any) -> Iterator[Seen]:
        """See ``Reading.outputs``."""
        if not other_meaning(module) and not goes_on(module):
            yield from self._plain.outputs(module, output)

    def put_input(self, module: nn.Module, call: Call, seen: Seen, tensor: torch.Tensor) -> Call:
        """See ``Reading.put_input``."""
        return self._plain.put_input(module, call, seen, tensor)

    def put_output(self, module: nn.Module, output: Any, seen: Seen, tensor: torch.Tensor) -> Any:
        """See ``Reading.put_output``; a router chooses anew by its other logits."""
        if isinstance(module, Router):
            shares, chosen = module.choose(tensor)
            return tensor, shares.to(output[1].dtype), chosen
        return self._plain.put_output(module, output, seen, tensor)


def token_rows(count: int, tensor: torch.Tensor, key: str) -> torch.Tensor | None:
    """``tensor`` if its first axis are the ``count`` tokens of the step."""
    del key
    return tensor if tensor.dim() >= 2 and tensor.shape[0] == count else None
