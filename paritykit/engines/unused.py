"""Which tensors of a checkpoint the reference holds and never reads, seen in a run of a few tokens.

The model is built with zeros that take no memory until they are written. Of a parameter as a whole it is followed
whether anything that was computed from it reaches the logits, or what the next step is handed. Rows of one parameter
that integers choose, as of stacked experts, are not all chosen by a few tokens: the module that holds it runs again
with every integer that it is handed set to that row, which holds NaN then.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from paritykit.engines.causal import carried
from paritykit.engines.hf import quiet
from paritykit.engines.layout import bare_model
from paritykit.provenance.names import numbers, pattern

CHOOSING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"})
"""What makes a number of Python's of a tensor's, or a shape: all that comes after may depend on it."""


TOKENS = 16


class Call(NamedTuple):
    """What a module was handed."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def unused_tensors(folder: str, tensors: list[str], parameters: dict[str, str]) -> list[str]:
    """Those of ``tensors`` that the reference cannot read, whatever it is given; none where that cannot be told.

    ``parameters``: each tensor of the checkpoint to the parameter that it fills.
    """
    try:
        with quiet(), torch.no_grad():
            model = bare_model(folder)
            fill_with_zeros(model)
            return _unused(model.eval(), tensors, parameters)
    except Exception:  # a model's own code may fail on zeros with any error
        return []


def _unused(model: nn.Module, tensors: Iterable[str], parameters: Mapping[str, str]) -> list[str]:
    rows, wanted = stacked_rows(model, parameters), {t: parameters[t] for t in tensors}
    owners = {p: model.get_submodule(p.rpartition(".")[0]) for p in wanted.values()}
    calls: dict[nn.Module, list[Call]] = defaultdict(list)
    followed = Following({p: _tensor(model, p) for t, p in wanted.items() if t not in rows})
    with ExitStack() as stack:
        for module in dict.fromkeys(owners.values()):
            hook = module.register_forward_pre_hook(partial(_note, calls), with_kwargs=True)
            stack.callback(hook.remove)
        with followed:
            output = model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True)
    if not bool(output.logits.isfinite().all()):
        return []
    idle = followed.seen.difference(*map(followed.reaching, held_tensors([output.logits, carried(model, output)])))
    return [t for t, p in wanted.items() if p in idle or (t in rows and _is_idle(owners[p], p, rows[t], calls))]


def held_tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in lists, mappings and objects, such as caches, one within the other."""
    met: set[int] = set()
    left = [value]
    while left:
        held = left.pop()
        if isinstance(held, torch.Tensor):
            yield held
        elif id(held) not in met and not isinstance(held, type | nn.Module):
            met.add(id(held))
            inside = held if isinstance(held, Mapping) else getattr(held, "__dict__", {})
            left += [*inside.values(), *(held if isinstance(held, list | tuple | set) else ())]


def fill_with_zeros(model: nn.Module) -> None:
    """Give a model that was built on the meta device numbers: zeros, which take memory as soon as they are written."""
    made: dict[int, torch.Tensor] = {}

    def zeros(like: torch.Tensor) -> torch.Tensor:
        if id(like) not in made:
            wide = torch.float32 if like.is_floating_point() else like.dtype
            bare = _blank(like.numel() * wide.itemsize).view(wide).view(like.shape)
            made[id(like)] = nn.Parameter(bare, requires_grad=False) if isinstance(like, nn.Parameter) else bare
        return made[id(like)]

    for module in model.modules():
        held: Any
        for held in (module._parameters, module._buffers):
            held.update({name: zeros(t) for name, t in held.items() if t is not None})


def _blank(size: int) -> torch.Tensor:
    """So many bytes of zero, none of which is in memory. From Python 3.13 on they may be more than there is."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)


def stacked_rows(model: nn.Module, parameters: Mapping[str, str]) -> dict[str, int]:
    """Of tensors that are stacked in one parameter, one for each row: which row each is, in order of their numbers."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for tensor, parameter in parameters.items():
        groups[parameter, pattern(tensor)].append(tensor)
    found: dict[str, int] = {}
    for (parameter, _), names in groups.items():
        if len(names) > 1 and len(names) == len(_tensor(model, parameter)):
            found |= {name: row for row, name in enumerate(sorted(names, key=numbers))}
    return found


class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what is computed from ``parameters``, by the memory that it lies in.

    ``seen`` are those that an operation took.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()
        self._everywhere: set[str] = set()
        self._kept: list[torch.Tensor] = list(parameters.values())
        """Memory that is not freed is not used again for something else."""
        self._within: dict[int, set[str]] = defaultdict(set)
        for name, tensor in parameters.items():
            self._within[_memory(tensor)].add(name)

    def reaching(self, tensor: torch.Tensor) -> set[str]:
        """The parameters that a tensor may depend on."""
        return self._everywhere | self._within.get(_memory(tensor), set())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out one operation; what it gives or writes depends on all that it takes."""
        del types
        result = func(*args, **(kwargs or {}))
        taken = set().union(*(self._within.get(_memory(t), ()) for t in _tensors((args, kwargs))))
        if not taken:
            return result
        self.seen |= taken
        if func.overloadpacket.__name__ in CHOOSING:
            self._everywhere |= taken
        for tensor in _tensors((result, _written(func, args, kwargs or {}))):
            self._kept.append(tensor)
            self._within[_memory(tensor)] |= taken
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
    return [named.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _is_idle(owner: nn.Module, parameter: str, row: int, calls: Mapping[nn.Module, list[Call]]) -> bool:
    """Whether a module that is handed nothing but one row of its parameter to choose does not read that row."""
    tensor = _tensor(owner, parameter.rpartition(".")[2])
    chosen = [c for c in calls.get(owner, []) if any(map(_chooses, tree_leaves(tuple(c))))]
    if not chosen:
        return False
    before = tensor[row].clone()
    tensor[row] = torch.nan
    try:
        force: Callable[[Any], Any] = lambda x: torch.full_like(x, row) if _chooses(x) else x  # noqa: E731
        given = [owner(*tree_map(force, c.args), **tree_map(force, c.kwargs)) for c in chosen]
    finally:
        tensor[row] = before
    found = [t for t in _tensors(given) if t.is_floating_point()]
    return bool(found) and not any(bool(t.isnan().any()) for t in found)


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or a buffer."""
    path, _, own = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), own)
    return found


def _chooses(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)


def _note(calls: dict[nn.Module, list[Call]], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls[module].append(Call(args, kwargs))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
