"""What vLLM's modules mean, by class: the one place that knows.

Most modules agree with Hugging Face once their tuples are read right. The rest is listed here with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from paritykit.captures.recorder import Call, Seen
from paritykit.engines.reading import exchange

ROTARY = "vLLM's rotary module returns rotated q and k, not cos and sin; its effect shows at the attention's output"
FUSED_ACTIVATION = "vLLM's activation multiplies gate and up; the product is compared as down_proj#input"
ATTENTION_CORE = "the attention core has no module in the reference; its output is compared as o_proj#input"
PARTIAL = "a partial sum on each rank here; it is reduced further out, where it is compared"
SHARED_EXPERTS = "vLLM's experts add the shared ones, which the reference adds outside; the sum is compared around both"
LOGITS = "vLLM applies the head in its logits processor; compared as #logits"


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm: with a residual it returns (normed, residual sum)."""
    return type(module).__name__.endswith("Norm")


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is one of vLLM's linear layers, which return (output, bias)."""
    return any(c.__name__ == "LinearBase" for c in type(module).__mro__)


def is_row_parallel(module: nn.Module) -> bool:
    """Whether ``module`` takes a slice of its input on each rank."""
    return any(c.__name__ == "RowParallelLinear" for c in type(module).__mro__)


def is_partial(module: nn.Module) -> bool:
    """Whether the module's output, and so that of the block it ends, is one rank's share of a sum."""
    found: Any = module
    return is_row_parallel(module) and found.tp_size > 1 and not found.reduce_results


def other_meaning(module: nn.Module) -> str:
    """Why the module's output must not be compared by name; empty if it may be."""
    names = {c.__name__ for c in type(module).__mro__}
    if any("Rotary" in n for n in names):
        return ROTARY
    if any(n.endswith("AndMul") for n in names):
        return FUSED_ACTIVATION
    if getattr(module, "_shared_experts", None) is not None:
        return SHARED_EXPERTS
    if "AttentionLayerBase" in names:
        return ATTENTION_CORE
    return LOGITS if "LogitsProcessor" in names else ""


def has_batch_axis(model: nn.Module) -> bool:
    """Whether activations are ``[1, tokens, ...]``: models that vLLM runs through transformers' own code."""
    return any(c.__module__.startswith("vllm.model_executor.models.transformers") for c in type(model).__mro__)


class VllmReading:
    """Which tensors of a vLLM module are points. Norms and row-parallel linears also show their input.

    A layer gives hidden and residual apart where a norm inside it was handed both; otherwise its first tensor is all.
    """

    def __init__(self) -> None:
        self._fused: set[int] = set()

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Seen]:
        """A norm's input is hidden plus residual: the residual stream; a row-parallel linear's is its slice."""
        tensors = floating(args, kwargs)
        if is_norm(module) and tensors:
            (self._fused.add if len(tensors) > 1 else self._fused.discard)(id(module))
            yield Seen("input", tensors[0] + tensors[1] if len(tensors) > 1 else tensors[0])
        elif is_row_parallel(module) and tensors:
            yield Seen("input", tensors[0])

    def outputs(self, module: nn.Module, output: Any) -> Iterator[Seen]:
        """The tensor that the module of the same name gives in Hugging Face."""
        if other_meaning(module):
            return
        tensor = meaning_of(module, output, apart=self._apart(module))
        if tensor is not None:
            yield Seen("", tensor)

    def put_input(self, module: nn.Module, call: Call, seen: Seen, tensor: torch.Tensor) -> Call:
        """See ``Reading.put_input``: of hidden and residual the sum is what counts, so hidden becomes zero."""
        del seen
        tensors = floating(*call)
        if not is_norm(module) or len(tensors) == 1:
            return exchange(call, tensors[0], tensor)  # type: ignore[no-any-return]
        zeroed = exchange(call, tensors[0], torch.zeros_like(tensor))
        return exchange(zeroed, tensors[1], tensor)  # type: ignore[no-any-return]

    def put_output(self, module: nn.Module, output: Any, seen: Seen, tensor: torch.Tensor) -> Any:
        """See ``Reading.put_output``: as for the input, where a layer gives hidden and residual apart."""
        del seen
        if isinstance(output, torch.Tensor):
            return tensor
        first, *rest = output
        if self._apart(module) and is_sum(module, output):
            return type(output)((torch.zeros_like(first), tensor, *rest[1:]))
        return type(output)((tensor, *rest))

    def _apart(self, module: nn.Module) -> bool:
        return any(id(child) in self._fused for child in module.children())


def floating(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The floating-point tensors among the arguments of a call."""
    return [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def meaning_of(module: nn.Module, output: Any, *, apart: bool = False) -> torch.Tensor | None:
    """The one tensor of an output: the first, or hidden plus residual where a module gives them ``apart``."""
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    if not isinstance(output, tuple | list) or not output or not isinstance(output[0], torch.Tensor):
        return None
    return output[0] + output[1] if apart and is_sum(module, output) else output[0]


def is_sum(module: nn.Module, output: Any) -> bool:
    """Whether the first two tensors of an output can be hidden and residual."""
    second = output[1] if len(output) > 1 else None
    alike = isinstance(second, torch.Tensor) and second.shape == output[0].shape
    return alike and not (is_linear(module) or is_norm(module))
