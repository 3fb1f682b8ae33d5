"""Captures and manifests made by hand, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from paritykit.captures.manifest import Manifest, Point, Segment, split_key
from paritykit.captures.reader import Capture
from paritykit.captures.writer import CaptureFolder, PartWriter
from paritykit.case import Case
from paritykit.results import Finding, Side

Step = tuple[list[Segment], Mapping[str, torch.Tensor]]
"""What one forward pass recorded: its row labels, and tensors by point key."""


def side(dtype: str = "float32") -> Side:
    return Side(engine="made", model="model", dtype=dtype)


def write_steps(part: PartWriter, steps: Iterable[Step], *, kinds: Mapping[str, str] | None = None) -> None:
    for segments, tensors in steps:
        part.step(segments)
        for key, tensor in tensors.items():
            module, port, call = split_key(key)
            part.record(
                tensor,
                module=module,
                port=port,
                call=call,
                kind=(kinds or {}).get(key, "Made"),
                axes="tokens, features",
            )


def write_capture(
    target: Path,
    *ranks: Iterable[Step],
    cases: Iterable[Case] | None = None,
    generated: Mapping[str, list[int]] | None = None,
    facts: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    kinds: Mapping[str, str] | None = None,
) -> Capture:
    """A capture of ``steps`` for each rank; the one case is ``a`` unless ``cases`` says otherwise."""
    found = list(cases) if cases is not None else [Case(id="a", tokens=(1,))]
    manifest = Manifest(side=side(dtype), cases=found, generated=dict(generated or {}), facts=dict(facts or {}))
    with CaptureFolder(target) as folder:
        parts = []
        for rank, steps in enumerate(ranks):
            with PartWriter(folder.path, rank=rank) as part:
                write_steps(part, steps, kinds=kinds)
                parts.append(part.finish())
        return Capture.open(folder.commit(manifest, parts))


def points(widths: Mapping[str, int | list[int]], *, ranks: int = 1, sources: Mapping[str, str] | None = None) -> Any:
    """Points by key and row shape, in order, on every rank."""
    found = []
    for rank in range(ranks):
        for key, width in widths.items():
            module, port, call = split_key(key)
            row = [width] if isinstance(width, int) else width
            source = (sources or {}).get(key, "")
            new = Point(module=module, port=port, call=call, rank=rank, dtype="float32", row=row, source=source)
            found.append(new)
    return found


def manifest(
    widths: Mapping[str, int | list[int]],
    *,
    ranks: int = 1,
    sources: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """A manifest without rows."""
    return Manifest(side=side(), cases=[], points=points(widths, ranks=ranks, sources=sources), facts=dict(facts or {}))


def finding(point: str, verdict: Any, *, order: int = 0, check: str = "modules", **fields: Any) -> Finding:
    return Finding(check=check, case=fields.pop("case", "a"), point=point, verdict=verdict, order=order, **fields)
