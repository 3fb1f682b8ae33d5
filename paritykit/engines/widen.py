"""A true float64 computation out of model code that casts to float32 on its own.

Transformers computes norms, softmax, rotary tables and router probabilities in float32, whatever the model's dtype: in
float64 these casts are the largest error left. While ``widened`` is active they ask for float64 instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDE: dict[Any, torch.dtype] = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor), torch.float64),
    **dict.fromkeys(("torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor"), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
"""What a dtype becomes, in each form that torch takes. Eight-bit floats stay: a quantized model means that rounding."""
FORMS = frozenset(type(form) for form in WIDE)
CASTS: dict[Any, Any] = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.half: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double,
    **{getattr(torch.Tensor, name): getattr(torch.Tensor, "cdouble") for name in ("cfloat", "chalf")},  # noqa: B009
}
BYTES = frozenset({torch.Tensor.view, torch.frombuffer})
"""These convert nothing, they read the same bytes as another dtype: so safetensors are read."""
TORCH = str(Path(torch.__file__).parent)


@contextmanager
def widened() -> Iterator[None]:
    """Every float32, float16 or bfloat16 that Python code asks torch for is float64, every complex64 complex128.

    That holds for casts, for ``dtype`` arguments and for what torch gives by default; integers, masks, eight-bit floats
    and views of bytes stay. The default dtype counts for the whole process, the rest for the calling thread.
    TorchScript, numpy and ``torch.FloatTensor(...)`` are not reached: ``NarrowOps`` sees those.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(before)


class _Widening(TorchFunctionMode):
    """Sees each call of torch's Python interface, properties too: what it does there counts for speed."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        func, kwargs = CASTS.get(func, func), kwargs or {}
        if any(type(a) in FORMS for a in (*args, *kwargs.values())) and not _takes_bytes(func, args):
            args = tuple(_wide(a) for a in args)
            kwargs = {name: _wide(a) for name, a in kwargs.items()}
        return func(*args, **kwargs)


def _wide(argument: Any) -> Any:
    return WIDE.get(argument, argument) if type(argument) in FORMS else argument


def _takes_bytes(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the dtype says what given bytes mean: ``torch.load`` puts them under a tensor made without elements."""
    return func in BYTES or (func is torch.empty and args == ((0,),))


class NarrowOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation torch carries out, also those no Python code asks for; slow.

    ``found`` maps each operation that took or gave a floating tensor of fewer bits than float64 to the line of code
    that it came from.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out one operation and look at its tensors."""
        del types
        with torch._C.DisableTorchFunction():  # or ``widened`` would widen what it does not reach without this watch
            result = func(*args, **(kwargs or {}))
        if any(is_narrow(leaf) for leaf in tree_leaves((args, kwargs, result))):
            self.found.setdefault(str(func), _place(sys._getframe(1)))
        return result


def is_narrow(value: object) -> bool:
    """Whether ``value`` is a real or complex floating tensor of fewer bits than float64 has."""
    return isinstance(value, torch.Tensor) and (
        value.dtype in WIDE or (value.is_floating_point() and value.itemsize < 8)
    )


def _place(frame: FrameType | None) -> str:
    """The innermost line that is not torch's own, as ``file:line``."""
    while frame is not None and (frame.f_code.co_filename.startswith(TORCH) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
