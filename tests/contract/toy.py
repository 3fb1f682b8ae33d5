"""A small engine with its own names and fused parameters, its loader, a checkpoint for it, and loading faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import paritykit as pk

LAYERS, WIDTH, EXPERTS = 3, 6, 4
Pair = tuple[str, torch.Tensor]
Stream = Callable[[Iterable[Pair]], Iterable[Pair]]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(WIDTH))
        self.qkv = nn.Parameter(torch.empty(WIDTH + 2 * 2, WIDTH))
        self.qkv_bias = nn.Parameter(torch.empty(WIDTH + 2 * 2))
        self.out = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.experts = nn.Parameter(torch.empty(EXPERTS, 2 * 5, WIDTH))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(11, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Parameter(torch.empty(11, WIDTH))


def load_weights(model: Toy, weights: Iterable[Pair]) -> None:
    """Checkpoint names to the toy's own, with no check that anything is there: as real loaders are."""
    rows = {"q": slice(0, 6), "k": slice(6, 8), "v": slice(8, 10), "gate": slice(0, 5), "up": slice(5, 10)}
    for name, tensor in weights:
        parts = name.split(".")
        if parts[0] in ("embed", "head"):
            getattr(model, parts[0]).copy_(tensor)
            continue
        layer: Layer = model.layers[int(parts[1])]  # type: ignore[assignment]
        if parts[2] == "experts":
            layer.experts.data[int(parts[3]), rows[parts[4]]] = tensor
        elif parts[2] in rows:
            target = layer.qkv if parts[3] == "weight" else layer.qkv_bias
            target.data[rows[parts[2]]] = tensor
        else:
            getattr(layer, parts[2]).copy_(tensor)


def tensors() -> dict[str, torch.Tensor]:
    found = {"embed.weight": torch.randn(11, WIDTH), "head.weight": torch.randn(11, WIDTH)}
    for n in range(LAYERS):
        found[f"layers.{n}.norm.weight"] = torch.randn(WIDTH)
        found[f"layers.{n}.out.weight"] = torch.randn(WIDTH, WIDTH)
        for part, size in (("q", WIDTH), ("k", 2), ("v", 2)):
            found[f"layers.{n}.{part}.weight"] = torch.randn(size, WIDTH)
            found[f"layers.{n}.{part}.bias"] = torch.randn(size)
        for e in range(EXPERTS):
            found[f"layers.{n}.experts.{e}.gate.weight"] = torch.randn(5, WIDTH)
            found[f"layers.{n}.experts.{e}.up.weight"] = torch.randn(5, WIDTH)
    return found


def write_checkpoint(folder: Path) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["Toy"], "vocab_size": 11}))
    return folder


def run(folder: Path, fault: Stream | None = None, *, after: Callable[[Toy], None] | None = None) -> pk.ParityRun:
    """Check ``weights`` on the toy, its loader as it is or with a fault between the files and it."""

    def load(model: Toy, weights: Iterable[Pair]) -> None:
        load_weights(model, fault(weights) if fault else weights)
        if after:
            after(model)

    return pk.weights(pk.engine("module", model=Toy(), load_weights=load, checkpoint=folder), checkpoint=folder)


def replaced(wanted: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Stream:
    def stream(weights: Iterable[Pair]) -> Iterator[Pair]:
        for name, tensor in weights:
            new = change(tensor) if name == wanted else tensor
            if new is not None:
                yield name, new

    return stream


def swapped(one: str, other: str) -> Stream:
    names = {one: other, other: one}
    return lambda weights: ((names.get(name, name), tensor) for name, tensor in weights)


def shared(weights: Iterable[Pair]) -> Iterator[Pair]:
    """The head is filled from the embedding, as if they were tied."""
    for name, tensor in weights:
        if name != "head.weight":
            yield name, tensor
        if name == "embed.weight":
            yield "head.weight", tensor


STREAMS: dict[str, Stream] = {
    "weight-not-loaded": replaced("layers.1.k.weight", lambda _: None),
    "bias-missing": replaced("layers.1.v.bias", lambda _: None),
    "rows-permuted": replaced("layers.1.q.weight", lambda w: w[[0, 2, 4, 1, 3, 5]]),
    "gate-up-swapped": swapped("layers.1.experts.2.gate.weight", "layers.1.experts.2.up.weight"),
    "norm-offset": replaced("layers.1.norm.weight", lambda w: w + 1),
    "weight-transposed": replaced("layers.1.out.weight", lambda w: w.T),
    "expert-swapped": swapped("layers.1.experts.0.up.weight", "layers.1.experts.3.up.weight"),
    "weight-shared-wrongly": shared,
    "weight-corrupt": replaced("layers.1.out.weight", lambda w: w.index_fill(0, torch.tensor([2]), 0.0)),
}
"""Loading faults by name, for every promise of check ``weights``."""
