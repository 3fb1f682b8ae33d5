"""Rules that tell weights from a *delta*: the difference to a base model, which somebody must add first."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from paritykit.audit.folder import Folder
from paritykit.audit.notice import Notice, count
from paritykit.audit.scan import decode, read_chunks, read_values

CENTRED = 0.3
"""A norm weight whose mean is below this part of its rms has as many values below zero as above. Trained norms that
start at 1 keep one sign; where layers start small (Mistral's first) they are small, but not centred."""
MOST = 0.8
SHRUNK = 0.5
"""A delta is smaller than its base by at least this factor; a fine-tuned tensor is as large as its base."""
FAR = 0.8
"""The distance from the base, over the base's size, of what is not close to the base at all."""


def looks_like_delta(folder: Folder) -> Iterator[Notice]:
    """Norm weights around zero in a model whose norms start at one."""
    if not folder.deep:
        return
    sources = folder.sources(folder.hf) or folder.sources(folder.vllm)
    ones = [n for n, value in folder.model.norms.items() if value == 1.0 and n in sources]
    centred, means = [], []
    for name in ones:
        values = read_values(folder.path / sources[name], folder.files[sources[name]], name)
        if values is not None and values.size and np.isfinite(values).all():
            means.append(float(values.mean()))
            if abs(values.mean()) <= CENTRED * float(np.sqrt(np.mean(values**2))):
                centred.append(name)
    if len(centred) < max(2, MOST * len(means)):
        return
    yield Notice(
        code="looks-like-delta",
        severity="warning",
        place=centred[0],
        message=f"{len(centred)} of {len(means)} norm weights are centred on zero (mean {np.mean(means):.2g}), "
        f"but {folder.model.class_name} starts them at 1: this may be a delta, not weights",
        hf="loads it as weights; the output is noise",
        vllm="loads it as weights; the output is noise",
        fix="add the base model's weights first; audit with base=FOLDER for proof",
    )


class Distance(msgspec.Struct, frozen=True):
    """A tensor against its base, over the base's size: ``stored`` is its own size, ``apart`` that of the difference."""

    stored: float
    apart: float


def against_base(folder: Folder, base: Folder) -> Iterator[Notice]:
    """Every tensor against the base's tensor of the same name and shape."""
    ours, theirs = (f.sources(f.hf) or f.sources(f.vllm) for f in (folder, base))
    shared = [n for n in ours if n in theirs and folder.tensors[n].shape == base.tensors[n].shape]
    found = {n: d for n in shared if (d := _distance(folder, ours[n], base, theirs[n], n))}
    yield from _judge(shared, found)


def _distance(folder: Folder, file: str, base: Folder, other: str, name: str) -> Distance | None:
    """None where the values cannot be set against each other element by element."""
    one, two = folder.files[file].tensors[name], base.files[other].tensors[name]
    if one.bytes != two.bytes:
        return None
    own = apart = size = 0.0
    left = read_chunks(folder.path / file, folder.files[file], name)
    right = read_chunks(base.path / other, base.files[other], name)
    for first, second in zip(left, right, strict=True):
        a, b = decode(one, first), decode(two, second)
        if a is None or b is None:
            return None
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are another rule's
            difference = a - b
            own, size, apart = own + float(a @ a), size + float(b @ b), apart + float(difference @ difference)
    return Distance((own / size) ** 0.5, (apart / size) ** 0.5) if size > 0 else None


def _judge(shared: list[str], found: dict[str, Distance]) -> Iterator[Notice]:
    if not found:
        yield _notice("base-unrelated", "note", "config.json", "no tensor could be compared with the base", "")
        return
    deltas = [n for n, d in found.items() if d.stored < SHRUNK and d.apart > FAR]
    sizes = float(np.median([d.stored for d in found.values()]))
    apart = float(np.median([d.apart for d in found.values()]))
    numbers = f"median size {sizes:.3g} of the base's, distance {apart:.3g}"
    if len(deltas) >= MOST * len(found):
        said = f"{count(deltas)}: far smaller than the base's and no nearer to them than zero is ({numbers})"
        yield _notice("is-delta", "error", deltas[0], said, "add the base model's weights to it")
    elif apart == 0:
        yield _notice("equals-base", "note", shared[0], f"most of {len(found)} tensors equal the base's", "")
    elif apart > FAR:
        said = f"{len(found)} tensors share names with the base, but not values ({numbers})"
        yield _notice("base-unrelated", "note", shared[0], said, "give the base it was made from")


def _notice(code: str, severity: str, place: str, message: str, fix: str) -> Notice:
    wrong = severity == "error"
    said = "loads it as weights; the output is noise" if wrong else "loads it as it is"
    return Notice(
        code=code,
        severity="error" if wrong else "note",
        place=place,
        message=message,
        hf=said,
        vllm=said,
        fix=fix or "none needed",
    )


RULES = (looks_like_delta,)
