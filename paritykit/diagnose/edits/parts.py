"""Edits of what a module holds: children left out or exchanged, parameters changed, settings turned."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paritykit.captures.nested import exchange, first_tensor
from paritykit.diagnose.edits.edit import Edit

PLAIN, OTHER = 1.0, 0.7
Change = Callable[[torch.Tensor], torch.Tensor]
VECTORS: dict[str, Change] = {
    "{} zero": torch.zeros_like,
    "{} all ones": torch.ones_like,
    "one added to {}": lambda p: p + 1,
    "one taken from {}": lambda p: p - 1,
}
MATRICES: dict[str, Change] = {
    "the halves of {} exchanged": lambda p: p.roll(len(p) // 2, 0),
    "the rows of both halves of {} in turn": lambda p: p.reshape(2, -1, *p.shape[1:]).transpose(0, 1).flatten(0, 1),
    "every second row of {} first": lambda p: p.reshape(-1, 2, *p.shape[1:]).transpose(0, 1).flatten(0, 1),
}
"""What becomes of a parameter, by the label that takes its name."""


def child_edits(module: nn.Module) -> Iterator[Edit]:
    """Each module inside left out, where it gives what it gets in shape; two of one class and size exchanged."""
    inside = [(name, m) for name, m in module.named_modules() if name and not isinstance(m, nn.ModuleList)]
    for name, inner in inside:
        where, code = called_at(module, name)
        yield Edit(f"{name} left out", partial(_without, inner), where=where, code=code)
    for (name, one), (other, two) in combinations(inside, 2):
        if type(one) is type(two) and _shapes(one) == _shapes(two) and _shapes(one):
            where, code = called_at(module, name)
            label = f"{name} and {other} exchanged"
            yield Edit(label, partial(_exchanged, one, two), where=where, code=code, prior=OTHER)


def parameter_edits(module: nn.Module) -> Iterator[Edit]:
    """Each parameter as nothing; a vector with one added or taken away; the rows of a matrix in another order."""
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            continue
        changes = VECTORS if parameter.dim() == 1 else MATRICES if len(parameter) % 2 == 0 else {}
        for label, change in changes.items():
            prior = PLAIN if label == "{} zero" else OTHER
            yield Edit(label.format(name), partial(_holding, parameter, change), prior=prior)


def setting_edits(module: nn.Module) -> Iterator[Edit]:
    """Each number, flag or absence that a module or one inside keeps, turned: off, one more or less, a multiple."""
    for path, inner in module.named_modules():
        for name, value in vars(inner).items():
            if name.startswith("_") or name in ("training", "layer_idx"):
                continue
            setting = f"{path}.{name}".lstrip(".")
            where, code = read_at(inner, name)
            for other in _others(value):
                label = f"{setting} {other!r} in place of {value!r}"
                yield Edit(label, partial(_set, inner, name, other), where=where, code=code, prior=OTHER)


def _others(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value - 1, value + 1, None)
    elif isinstance(value, float) and value:
        yield from (1.0, value * 2, value / 2, 1 / value, value**0.5, value * value)
        yield from ((1e-5, 1e-6, 1e-8, 1e-12) if value < 1e-2 else ())


def called_at(module: nn.Module, path: str) -> tuple[str, str]:
    """File and line, and that line, where a module inside is called by the one that holds it."""
    owner, _, name = path.rpartition(".")
    return read_at(module.get_submodule(owner), name)


def read_at(module: nn.Module, name: str) -> tuple[str, str]:
    """File and line, and that line, where a module's own ``forward`` reads an attribute first; empty for nowhere."""
    kind: Any = type(module)
    file, lines, start = _source_of(kind)
    found = re.compile(rf"\bself\.{re.escape(name)}\b")
    place = next((n for n, line in enumerate(lines) if found.search(line)), None)
    return ("", "") if place is None else (f"{file}:{start + place}", lines[place].strip())


@cache
def _source_of(kind: type[nn.Module]) -> tuple[str, list[str], int]:
    """A class's file, the lines of its ``forward`` and the number of the first; no line where there is no source."""
    try:
        file, (lines, start) = inspect.getsourcefile(kind), inspect.getsourcelines(kind.forward)
    except (OSError, TypeError):
        return "", [], 0
    return Path(file or "").name, lines, start


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, p.shape) for name, p in module.named_parameters()]


@contextmanager
def _without(module: nn.Module) -> Iterator[None]:
    """The module gives what it is handed."""

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given, made = first_tensor((*args, *kwargs.values())), first_tensor(output)
        if given is None or made is None or given.shape != made.shape:
            raise ValueError("it gives another shape than it is handed")
        return exchange(output, made, given)

    hook = module.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _exchanged(one: nn.Module, two: nn.Module) -> Iterator[None]:
    """Each computes with the other's parameters."""

    def exchange_all() -> None:
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            a.data, b.data = b.data, a.data

    exchange_all()
    try:
        yield
    finally:
        exchange_all()


@contextmanager
def _holding(parameter: nn.Parameter, change: Change) -> Iterator[None]:
    before = parameter.data
    parameter.data = change(before)
    try:
        yield
    finally:
        parameter.data = before


@contextmanager
def _set(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
