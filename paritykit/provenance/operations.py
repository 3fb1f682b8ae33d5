"""What an operation of torch makes of elements that are followed: the same elsewhere, a function of each, or unknown.

Nothing here knows a model or a loader; the vocabulary is that of torch's own operations, and whether one works element
by element is told by its tag.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map

from paritykit.provenance.boxes import Box, find_boxes
from paritykit.provenance.pieces import CONSTANT, Ints, spread
from paritykit.provenance.weightmap import Span

COPIES = {"clone", "_to_copy", "_unsafe_view", "_reshape_copy", "view_copy", "detach_copy"}
"""Operations that give the elements of one tensor at the same places."""
MOVES = {
    "flip", "roll", "rot90", "index", "index_select", "gather", "take", "repeat", "masked_select", "index_copy",
    "index_copy_", "index_put", "index_put_", "scatter", "scatter_", "slice_scatter", "select_scatter",
    "constant_pad_nd", "tril", "triu", "where", "masked_fill", "masked_fill_", "masked_scatter_",
}  # fmt: skip
"""Operations that put elements elsewhere and change none: carried out once more, on addresses."""
CONTROL = {"index", "indices", "mask", "condition"}
"""Arguments of those that say where to, by their names in torch's schemas."""
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
"""Operations that give memory as it was."""

PLACE = object()
"""Stands for the tensor that is followed in the arguments that are kept."""

Step = Callable[[torch.Tensor], torch.Tensor]
Held = Callable[[torch.Tensor], list[Box]]


class Call(NamedTuple):
    """One operation, with its arguments as torch dispatched them."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Without namespace and overload: ``copy_``."""
        return str(self.func._schema.name).removeprefix("aten::")

    @property
    def named(self) -> dict[str, Any]:
        """Every argument by its name in the schema; torch calls the first one ``self``."""
        return dict(zip((a.name for a in self.func._schema.arguments), self.args, strict=False)) | self.kwargs

    @property
    def inputs(self) -> list[torch.Tensor]:
        """All tensors handed in."""
        return [t for t in tree_flatten((self.args, self.kwargs))[0] if isinstance(t, torch.Tensor)]

    @property
    def written(self) -> list[torch.Tensor]:
        """Tensors that it writes into."""
        if torch.Tag.inplace_view in self.func.tags:  # shape or memory of the tensor, not what lies there
            return []
        writes = {a.name for a in self.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        return [t for n in writes if isinstance(t := self.named.get(n), torch.Tensor)]

    @property
    def pointwise(self) -> bool:
        """Whether every element of the output is made of the elements at its place."""
        return torch.Tag.pointwise in self.func.tags


def whole(shape: Sequence[int], label: int) -> list[Box]:
    """One box over a shape."""
    return [Box(tuple(Span(0, n) for n in shape), label, 0, (0,) * len(shape))]


def copied_by(call: Call) -> torch.Tensor | None:
    """The tensor whose elements an operation gives at the same places; None for another operation."""
    if call.name in ("copy_", "fill_") and isinstance(call.args[1], torch.Tensor):
        return call.args[1].expand(call.args[0].shape)
    found: torch.Tensor | None = call.args[0] if call.name in COPIES else None
    return found


def joined(call: Call, held: Held) -> list[Box]:
    """What ``cat`` and ``stack`` make."""
    tensors = call.args[0]
    axis = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
    found: list[Box] = []
    stacked, start = call.name == "stack", 0
    axis %= tensors[0].dim() + stacked
    for tensor in tensors:
        part = tensor.unsqueeze(axis) if stacked else tensor
        for box in held(part):
            s = box.spans[axis]
            spans = (*box.spans[:axis], Span(s.start + start, s.count, s.step), *box.spans[axis + 1 :])
            found.append(box._replace(spans=spans))
        start += part.shape[axis]
    return found


def moved(call: Call, held: Held) -> list[Box] | None:
    """What an operation of ``MOVES`` makes, by carrying it out on addresses and on labels; None where it cannot be."""
    results = []
    for labels in (False, True):

        def spelled(value: Any, *, labels: bool = labels) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return torch.from_numpy(spell(held(value), tuple(value.shape))[labels]).to(value.device)

        named = {n: a if n in CONTROL else tree_map(spelled, a) for n, a in call.named.items()}
        if "value" in named and not isinstance(named["value"], torch.Tensor):
            named["value"] = 0
        try:
            results.append(call.func(**named).cpu().numpy())
        except (RuntimeError, TypeError):
            return None
    addresses, marks = results
    shape = addresses.shape or (1,)
    return find_boxes(addresses.reshape(shape), marks.reshape(shape) + CONSTANT)


def spell(boxes: list[Box], shape: tuple[int, ...]) -> tuple[Ints, Ints]:
    """Addresses and labels of every place; labels count from ``CONSTANT``, so that a number put between is one."""
    addresses, labels = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for box in boxes:
        index = tuple(slice(s.start, s.last + 1, s.step) for s in box.spans)
        labels[index] = box.label - CONSTANT
        addresses[index] = spread(tuple(s.count for s in box.spans), box.base, box.strides)
    return addresses, labels


def step_of(call: Call, followed: torch.Tensor) -> Step | None:
    """A pointwise operation as a function of the tensor that is followed; None where it takes more than numbers."""
    if any(t is not followed and t.numel() != 1 for t in call.inputs):
        return None

    def kept(value: Any) -> Any:
        return PLACE if value is followed else value.clone() if isinstance(value, torch.Tensor) else value

    args, kwargs = tree_map(kept, (call.args, call.kwargs))

    def step(x: torch.Tensor) -> torch.Tensor:
        given = tree_map(lambda value: x.clone() if value is PLACE else value, (args, kwargs))
        found: torch.Tensor = call.func(*given[0], **given[1])
        return found

    return step
