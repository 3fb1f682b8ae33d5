"""What vLLM's modules mean, by what they do and by class: the one place that knows.

Most modules agree with Hugging Face once their tuples are read right. The rest is listed here with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from paritykit.captures.nested import exchange
from paritykit.captures.recorder import Call, Seen

ROTARY = "vLLM's rotary module returns rotated q and k, not cos and sin; its effect shows at the attention's output"
FUSED_ACTIVATION = "vLLM's activation multiplies gate and up; the product is compared as down_proj#input"
ATTENTION_CORE = "the attention core has no module in the reference; its output is compared as o_proj#input"
PARTIAL = "a partial sum on each rank here; it is reduced further out, where it is compared"
SHARED_EXPERTS = "vLLM's experts add the shared ones, which the reference adds outside; the sum is compared around both"
LOGITS = "vLLM applies the head in its logits processor; compared as #logits"


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm: nothing inside it, and one weight for each feature, or none and a norm's name."""
    weight = getattr(module, "weight", None)
    if next(module.children(), None) is not None or is_linear(module):
        return False
    scales = isinstance(weight, torch.Tensor) and weight.dim() == 1 and weight.numel() > 0
    return scales or type(module).__name__.endswith("Norm")


def adds_residual(module: nn.Module, call: Call) -> bool:
    """Whether a norm that is handed (hidden, residual) adds both and hands on the sum: tried on ones and twos.

    Others give the residual back as it was, or take a second tensor for something else.
    """
    first, second = floating(*call)[:2]
    ones = torch.ones_like(first)
    try:
        args, kwargs = exchange(exchange(call, first, ones), second, twos := ones * 2)
        output = module.forward(ones, twos) if first is second else module.forward(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return False
    if not isinstance(output, tuple | list) or len(output) < 2 or not isinstance(output[1], torch.Tensor):
        return False
    return output[1].shape == first.shape and bool((output[1] == 3).all())


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
        self._adds: dict[nn.Module, bool] = {}
        self._fused: set[nn.Module] = set()
        """Norms whose last call added a residual."""

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Seen]:
        """A norm's input is hidden plus residual where it adds them: the residual stream; a row-parallel linear's is
        its slice.
        """
        tensors = floating(args, kwargs)
        if is_norm(module) and tensors:
            added = self._adds_residual(module, (args, dict(kwargs)), tensors)
            (self._fused.add if added else self._fused.discard)(module)
            yield Seen("input", tensors[0] + tensors[1] if added else tensors[0])
        elif is_row_parallel(module) and tensors:
            yield Seen("input", tensors[0])

    def _adds_residual(self, module: nn.Module, call: Call, tensors: list[torch.Tensor]) -> bool:
        if len(tensors) != 2 or tensors[0].shape != tensors[1].shape:
            return False
        if module not in self._adds:
            self._adds[module] = adds_residual(module, call)
        return self._adds[module]

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
        if module not in self._fused:
            return exchange(call, tensors[0], tensor)  # type: ignore[no-any-return]
        zeroed = exchange(call, tensors[0], torch.zeros_like(tensor))
        return exchange(zeroed, tensors[1], tensor)  # type: ignore[no-any-return]

    def put_output(self, module: nn.Module, output: Any, seen: Seen, tensor: torch.Tensor) -> Any:
        """See ``Reading.put_output``: as for the input, where a layer gives hidden and residual apart."""
        del seen
        if isinstance(output, torch.Tensor):
            return tensor
        first, *rest = output
        if rest and is_bias(rest[0], first):
            return type(output)((tensor - rest[0], *rest))
        if self._apart(module) and is_sum(module, output):
            return type(output)((torch.zeros_like(first), tensor, *rest[1:]))
        return type(output)((tensor, *rest))

    def _apart(self, module: nn.Module) -> bool:
        return any(child in self._fused for child in module.children())


def floating(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The floating-point tensors among the arguments of a call."""
    return [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def meaning_of(module: nn.Module, output: Any, *, apart: bool = False) -> torch.Tensor | None:
    """The one tensor of an output: the first, or hidden plus residual where a module gives them ``apart``.

    A bias that is left to others to add is added.
    """
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    if not isinstance(output, tuple | list) or not output or not isinstance(output[0], torch.Tensor):
        return None
    both = len(output) > 1 and (is_bias(output[1], output[0]) or (apart and is_sum(module, output)))
    return output[0] + output[1] if both else output[0]


def is_bias(value: Any, output: torch.Tensor) -> bool:
    """Whether a module gives ``value`` beside its ``output`` as a bias that is not in it."""
    return isinstance(value, torch.Tensor) and value.dim() == 1 and value.shape == output.shape[-1:]


def is_sum(module: nn.Module, output: Any) -> bool:
    """Whether the first two tensors of an output can be hidden and residual."""
    second = output[1] if len(output) > 1 else None
    alike = isinstance(second, torch.Tensor) and second.shape == output[0].shape
    return alike and not (is_linear(module) or is_norm(module))
