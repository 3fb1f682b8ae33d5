"""What arrived changed: transposed, offset, scaled, in fewer bits, or simply another number. Torch-free."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from paritykit.ledger.problem import Problem, on_rank, size_of
from paritykit.ledger.subject import WeightSubject
from paritykit.provenance.names import pattern
from paritykit.provenance.weightmap import Landing, size

OFFSET = re.compile(r"[+-]\d")
"""How a change that adds a number begins."""


def wrong_transpose(subject: WeightSubject) -> Iterator[Problem]:
    """Square weights whose output features lie along another axis than those of the engine's other weights.

    One that is not square would not fit if it were turned by mistake, so those tell the usual axis.
    """
    layout = subject.expected.reference
    if layout is None:
        return
    votes: dict[int, set[tuple[str, int]]] = defaultdict(set)
    square: dict[int, list[tuple[Landing, int]]] = defaultdict(list)
    for name, axis in layout.features.items():
        for x in subject.by_tensor.get(name, []):
            shape, held = subject.shape(name), subject.parameters[x.parameter, x.rank].shape
            running = [a for a in x.axes if a >= 0]
            if not len(shape) == len(running) == 2 or name in layout.lookups:
                continue
            if shape[0] == shape[1] or len({*held[-2:]}) == 1:
                square[len(held)].append((x, running.index(axis)))
            else:
                votes[len(held)].add((pattern(x.parameter), running.index(axis)))
    for dim, found in square.items():
        usual = _usual([axis for _, axis in votes[dim]] or [axis for _, axis in found])
        for x in {x.tensor: x for x, axis in found if axis != usual}.values():
            text = f"{x.tensor} is transposed in {x.parameter}, unlike the engine's other weights"
            yield Problem(
                code="wrong-transpose", name=x.tensor, message=text, elements=size_of(subject.shape(x.tensor))
            )


def _usual(axes: list[int]) -> int:
    return Counter(axes).most_common(1)[0][0]


def changed(subject: WeightSubject) -> Iterator[Problem]:
    """An offset, factor or function between checkpoint and parameter, unless the reference computes with the same."""
    derived = subject.expected.reference.derived if subject.expected.reference else {}
    for name, landings in subject.by_tensor.items():
        for x in landings:
            if x.change and x.change not in derived.get(name, ()):
                code = "offset" if OFFSET.match(x.change) else "scale" if x.change.startswith("*") else "changed"
                text = f"{name} arrives in {x.parameter} as {described(x.change)}{on_rank(subject, x.rank)}"
                yield Problem(code=code, name=name, message=text, elements=size(x.source), rank=x.rank)
                break


def described(change: str) -> str:
    """A change as a formula of ``w``.

    >>> described("+1"), described("*2"), described("-exp(x)")
    ('w + 1', 'w * 2', '-exp(w)')
    """
    if OFFSET.match(change):
        return f"w {change[0]} {change[1:]}"
    return f"w * {change[1:]}" if change.startswith("*") else change.replace("x", "w").replace("ewp", "exp")


def narrowed(subject: WeightSubject) -> Iterator[Problem]:
    """A parameter in fewer bits than both the checkpoint and the engine's dtype."""
    for name, landings in subject.by_tensor.items():
        dtype = subject.found.tensors[name].dtype
        for x in landings:
            held = subject.parameters[x.parameter, x.rank].dtype
            if bits(held) < bits(dtype) and bits(held) < bits(subject.expected.dtype or held):
                text = f"{name} is {dtype} and the engine runs in {subject.expected.dtype}, but {x.parameter} is {held}"
                yield Problem(code="dtype-narrowed", name=name, message=text, elements=size(x.source), rank=x.rank)
                break


def bits(dtype: str) -> int:
    """Mantissa bits of a floating dtype by name, 64 for any other."""
    known = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8, "float8_e4m3fn": 4, "float8_e5m2": 3}
    return known.get(dtype, 64)


def wrong_values(subject: WeightSubject) -> Iterator[Problem]:
    """Numbers that differ from the checkpoint's, where the loader put them."""
    for a in subject.arrived:
        if a.differing:
            text = (
                f"{a.differing} of {a.elements} elements of {a.tensor} differ in {a.parameter}"
                f"{on_rank(subject, a.rank)}; first at {list(a.index)}: {a.found:.6g} instead of {a.expected:.6g}"
            )
            yield Problem(code="value-changed", name=a.tensor, message=text, elements=a.differing, rank=a.rank)
