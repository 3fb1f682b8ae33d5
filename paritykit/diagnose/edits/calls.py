"""Edits of single calls: left out, with the other operand, negated, turned round, shifted, of another function."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from paritykit.diagnose.causes.mlp import ACTIVATIONS as KNOWN
from paritykit.diagnose.causes.mlp import Function
from paritykit.diagnose.edits.edit import Edit
from paritykit.diagnose.edits.sites import Act, Called, Editing, Place

WORDED = {"gelu in its tanh form": "gelu's tanh form", "quick gelu": "gelu's sigmoid form"}
"""How a function is named where it takes another's place."""
ACTIVATIONS: dict[str, Function] = {
    **{WORDED.get(name, name): function for name, function in KNOWN.items() if name != "no activation"},
    "softplus": functional.softplus,
}
"""Functions of one number that take each other's place."""
NAMED = {"silu", "gelu", "relu", "sigmoid", "tanh", "softplus", "sigmoid_", "tanh_", "relu_", "silu_"}
SHARES = {"softmax": "sigmoid", "sigmoid": "softmax"}
"""How scores become shares: each for itself, or among all."""
IN_ORDER = {"cat", "stack"}
REARRANGING = {
    *("view", "reshape", "transpose", "permute", "expand", "contiguous", "unsqueeze", "squeeze", "flatten"),
    *("__getitem__", "chunk", "split", "unbind", "repeat_interleave", "to", "float", "type", "type_as", "clone"),
    *("detach", "dropout", "zeros", "zeros_like", "new_zeros", "empty_like", "arange"),
}
"""Calls that compute nothing: to leave one out gives another shape, or the same numbers."""
LEFT_OUT, OTHER, NARROW = 1.0, 0.7, 0.2
"""Which of two edits that leave the same is the plainer: to leave a step out, to do another in its place, to round."""


def call_edits(calls: Iterable[Called], *, tokens: int) -> Iterator[Edit]:
    """Edits at each place, then at all places of a function in a file: q, k and v are often three lines alike."""
    known: dict[Place, Called] = {}
    for call in calls:
        known.setdefault(call.place, call)
    for call in known.values():
        for label, act, prior in _acts(call, tokens=tokens):
            yield _edit(label, {call.place: act}, call.place, prior)
    for places in _alike(known).values():
        several: dict[str, dict[Place, Act]] = defaultdict(dict)
        for call in places:
            for label, act, _ in _acts(call, tokens=tokens):
                several[label][call.place] = act
        for label, acts in several.items():
            if len(acts) > 1:
                yield _edit(f"{label} at {len(acts)} places", acts, places[0].place, LEFT_OUT)


def _alike(known: Mapping[Place, Called]) -> dict[tuple[str, str], list[Called]]:
    found: dict[tuple[str, str], list[Called]] = defaultdict(list)
    for place, call in known.items():
        found[place.file, place.name].append(call)
    return {key: calls for key, calls in found.items() if len(calls) > 1}


def _edit(label: str, acts: Mapping[Place, Act], place: Place, prior: float) -> Edit:
    return Edit(label=label, enter=partial(Editing, acts), where=place.short, code=place.code, prior=prior)


def _acts(call: Called, *, tokens: int) -> Iterator[tuple[str, Act, float]]:
    name = call.place.name
    if not call.floating or not call.operands:
        return
    if name in IN_ORDER:
        yield f"{name} in the other order", _turned, OTHER
        return
    if name in REARRANGING:
        return
    if call.operands[0] == call.gives:
        yield f"{name} left out", _first, LEFT_OUT
    if len(call.operands) > 1 and call.operands[1] == call.gives:
        yield f"the second operand in place of {name}", _second, OTHER
    yield f"the result of {name} negated", _negated, OTHER
    if tokens in call.gives and tokens > 1:
        yield f"the result of {name} a token late", partial(_late, axis=call.gives.index(tokens)), OTHER
    if name in NAMED:
        for other, function in ACTIVATIONS.items():
            yield f"{other} in place of {name}", partial(_replaced, function=function), OTHER
    if name in SHARES:
        yield f"{SHARES[name]} in place of {name}", partial(_shared, other=SHARES[name]), OTHER
    yield f"{name} in bfloat16", _narrow, NARROW


def _first(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))


def _second(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)][1]


def _negated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return -func(*args, **kwargs)


def _turned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts, *rest = args
    return func(parts[::-1], *rest, **kwargs)


def _late(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, axis: int) -> Any:
    return func(*args, **kwargs).roll(1, axis)


def _replaced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, function: Function) -> Any:
    return function(_first(func, args, kwargs))


def _shared(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, other: str) -> Any:
    scores = _first(func, args, kwargs)
    return torch.sigmoid(scores) if other == "sigmoid" else scores.softmax(-1)


def _narrow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call on operands of bfloat16, its result in the dtype that it would have."""
    cast = lambda x: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    wide = next(t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point())
    return func(*tree_map(cast, args), **tree_map(cast, kwargs)).to(wide)
