"""Tracing a loader: it is handed addresses for weights, and the parameters are read back.

Every parameter and persistent buffer is poisoned first, so that what the loader leaves alone shows, and restored after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from paritykit.provenance.changes import explain_change
from paritykit.provenance.codes import Coding, coding_for
from paritykit.provenance.decode import Readings, add_reading, decode, poison
from paritykit.provenance.sources import Source, list_sources, probe_table, probe_values
from paritykit.provenance.weightmap import ParameterInfo, TensorInfo, WeightMap

Weights = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""Gives a fresh iterator over (checkpoint name, tensor), as the engine's loader reads them; shapes are looked at."""
Load = Callable[[Iterator[tuple[str, torch.Tensor]]], object]
"""The engine's own loader: puts such an iterator into the parameters."""

Parameters = Callable[[], Mapping[str, torch.Tensor]]
"""Lists an engine's parameters by name, as they are now."""


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer of a module by all of its names, tied ones under each."""
    kept = set(model.state_dict(keep_vars=True))
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found |= {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in kept}
    return found


def trace(
    parameters: Parameters | Mapping[str, torch.Tensor],
    *,
    weights: Weights,
    load: Load,
    rank: int = 0,
    restore: bool = True,
) -> WeightMap:
    """Where each element that ``load`` is handed lands in ``parameters``. Errors of ``load`` go through.

    A function as ``parameters`` is asked again after each load, for loaders that make or replace parameters. Memory: 8
    bytes an element of all parameters for each pass. ``restore`` puts the values from before back
    where a parameter kept its shape.
    """
    listed: Parameters = parameters if callable(parameters) else lambda: parameters
    kept = {n: p.detach().clone() for n, p in _owners(listed, rank).items()} if restore else {}
    sources = list_sources(weights())
    try:
        _load(_owners(listed, rank), sources, weights, load, probe_values)
        live = _owners(listed, rank)
        probe = {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}
        coding = coding_for(({s.dtype for s in sources} | {p.dtype for p in live.values()}) - {torch.bool})
        readings = _run_passes(listed, sources, coding, weights=weights, load=load, rank=rank)
    finally:
        for name, tensor in _owners(listed, rank).items():
            if name in kept and tensor.shape == kept[name].shape:
                tensor.detach().copy_(kept[name])
    found = WeightMap(tensors=tensor_infos(sources), parameters=describe(listed(), rank))
    probes = probe_table(sources)
    for name, reading in readings.items():
        reading.probe = probe[name].to(torch.float64)
        landings, gaps = decode(name, reading, coding, sources, probes=probes, rank=rank)
        found.landings += landings
        found.gaps += gaps
    return explain_change(found, sources, probe)


def _owners(listed: Parameters, rank: int) -> dict[str, torch.Tensor]:
    """Each traced piece of memory once, by its first name."""
    now = listed()
    return {i.name: now[i.name] for i in describe(now, rank) if not i.same_as}


def describe(parameters: Mapping[str, torch.Tensor], rank: int) -> list[ParameterInfo]:
    """What there is, and who owns each piece of memory. Empty and boolean ones hold no address: left out."""
    owners: dict[object, str] = {}
    infos = []
    for name, p in parameters.items():
        if nn.parameter.is_lazy(p) or not p.numel() or p.dtype == torch.bool:
            continue
        key = (p.data_ptr(), tuple(p.shape), p.stride())
        owner = owners.setdefault(key, name)
        infos.append(
            ParameterInfo(
                name=name,
                rank=rank,
                shape=tuple(p.shape),
                dtype=str(p.dtype).removeprefix("torch."),
                buffer=not isinstance(p, nn.Parameter),
                same_as="" if owner == name else owner,
            )
        )
    return infos


def tensor_infos(sources: Iterable[Source]) -> dict[str, TensorInfo]:
    """What a loader is handed: each name with its shape, dtype and number of copies."""
    found: dict[str, TensorInfo] = {}
    for s in sources:
        found[s.name] = TensorInfo(shape=s.shape, dtype=str(s.dtype).removeprefix("torch."), copies=s.copy + 1)
    return found


def _run_passes(
    listed: Parameters, sources: list[Source], coding: Coding, *, weights: Weights, load: Load, rank: int
) -> dict[str, Readings]:
    readings = {name: Readings() for name in _owners(listed, rank)}
    for number in range(coding.passes):

        def fill(source: Source, number: int = number) -> torch.Tensor:
            addresses = torch.arange(source.start, source.start + source.size, dtype=torch.int64)
            return coding.digit(addresses, number).reshape(source.shape).to(source.dtype)

        _load(_owners(listed, rank), sources, weights, load, fill)
        for name, tensor in _owners(listed, rank).items():
            add_reading(readings[name], tensor.detach().cpu())
    return readings


def _load(
    live: Mapping[str, torch.Tensor],
    sources: list[Source],
    weights: Weights,
    load: Load,
    fill: Callable[[Source], torch.Tensor],
) -> None:
    for tensor in live.values():
        poison(tensor)
    due = iter(sources)
    load((name, fill(next(due)).to(real.device)) for name, real in weights())
