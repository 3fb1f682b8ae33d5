"""A toy engine whose loader fuses, shards, pads and replicates as real ones do, and faults to plant in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paritykit.ledger.judge import Judged, judge_weights
from paritykit.ledger.problem import Problem
from paritykit.ledger.problems import find_problems
from paritykit.ledger.subject import Expected, ReferenceLayout, WeightSubject
from paritykit.mapping.rules import Part
from paritykit.provenance.trace import trace
from paritykit.provenance.values import compare_values
from paritykit.provenance.weightmap import RankLedger, WeightMap

Pairs = Sequence[tuple[str, torch.Tensor]]
Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], None]
Fault = Callable[[str, torch.Tensor, int], tuple[str, torch.Tensor, int] | None]
"""What a wrong loader takes a tensor for: other name, other numbers, other rank; None where it leaves it out."""


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trace_pairs(parameters: Mapping[str, torch.Tensor], pairs: Pairs, load: Loader, rank: int = 0) -> WeightMap:
    with torch.no_grad():
        return trace(parameters, weights=lambda: iter(pairs), load=load, rank=rank)


@dataclass(frozen=True)
class Toy:
    """Sizes of a small decoder with attention, a gated MLP and three experts, and how its engine holds them.

    ``ranks`` share every layer; there are as many on each of the ``stages`` of a pipeline.
    """

    ranks: int = 1
    stages: int = 1
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 8
    inner: int = 12
    vocab: int = 10
    tied: bool = False
    transposed: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def parts(self) -> list[Part]:
        """Rows of q, k and v in the fused parameter."""
        head_dim, replicas = self.hidden // self.heads, max(1, self.ranks // self.kv_heads)
        kv = self.kv_heads * head_dim
        return [Part(self.hidden, self.hidden // self.ranks), *[Part(kv, kv * replicas // self.ranks, replicas)] * 2]

    @property
    def padded(self) -> int:
        """Rows of the vocabulary on each rank."""
        return 12 // self.ranks

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint."""
        h, i, kv = self.hidden, self.inner, self.parts[1].total
        found: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab, h)}
        for n in range(self.layers):
            at = f"layers.{n}"
            found[f"{at}.norm.weight"] = (h,)
            for name, rows in zip("qkv", (h, kv, kv), strict=True):
                found[f"{at}.attn.{name}_proj.weight"] = (rows, h)
                found[f"{at}.attn.{name}_proj.bias"] = (rows,)
            found[f"{at}.attn.o_proj.weight"] = (h, h)
            found |= {f"{at}.mlp.gate_proj.weight": (i, h), f"{at}.mlp.up_proj.weight": (i, h)}
            found[f"{at}.mlp.down_proj.weight"] = (h, i)
            for e in range(3):
                found |= {f"{at}.experts.{e}.{w}.weight": (h, i) if w == "w2" else (i, h) for w in ("w1", "w3", "w2")}
        return found if self.tied else found | {"head.weight": (self.vocab, h)}

    def checkpoint(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return {n: random_tensor(*s, dtype=dtype, seed=k) for k, (n, s) in enumerate(self.shapes().items())}

    def parameters(self) -> dict[str, torch.Tensor]:
        """What one rank holds, of no value yet."""
        h, i, qkv = self.hidden, self.inner // self.ranks, sum(p.local for p in self.parts)
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.padded, h)}
        for n in range(self.layers):
            at = f"layers.{n}"
            shapes |= {f"{at}.norm.weight": (h,), f"{at}.attn.qkv_proj.weight": (qkv, h)}
            shapes |= {f"{at}.attn.qkv_proj.bias": (qkv,), f"{at}.attn.o_proj.weight": (h, h // self.ranks)}
            shapes |= {f"{at}.mlp.gate_up_proj.weight": (2 * i, h), f"{at}.mlp.down_proj.weight": (h, i)}
            shapes |= {f"{at}.experts.w13_weight": (3, 2 * i, h), f"{at}.experts.w2_weight": (3, h, i)}
        if self.transposed:
            shapes = {n: s if n == "embed.weight" else (*s[:-2], *s[-2:][::-1]) for n, s in shapes.items()}
        found: dict[str, torch.Tensor] = {n: nn.Parameter(torch.zeros(s, dtype=self.dtype)) for n, s in shapes.items()}
        found["head.weight"] = (
            found["embed.weight"] if self.tied else nn.Parameter(found["embed.weight"].detach().clone())
        )
        return found

    def on_stage(self, name: str, stage: int) -> bool:
        """Whether a stage has the tensor or parameter of that name."""
        if name.startswith("layers."):
            return int(name.split(".")[1]) * self.stages // self.layers == stage
        ends = [0, self.stages - 1] if self.tied else [0] if name.startswith("embed") else [self.stages - 1]
        return stage in ends

    def load(
        self, held: Mapping[str, torch.Tensor], weights: Iterable[tuple[str, torch.Tensor]], rank: int, fault: Fault
    ) -> None:
        for name in {"embed.weight", "head.weight"} & held.keys():
            held[name].detach()[max(0, self.vocab - rank * self.padded) :] = 0
        for given in weights:
            meant = fault(*given, rank)
            if meant is not None:
                self._put(held, *meant)

    def _put(self, held: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor, rank: int) -> None:
        path, _, kind = name.rpartition(".")
        module, _, leaf = path.rpartition(".")
        local = self.inner // self.ranks
        if leaf[0] in "qkv" and leaf.endswith("_proj"):
            number = "qkv".index(leaf[0])
            part, first = self.parts[number], sum(p.local for p in self.parts[:number])
            piece = shard(tensor, 0, rank // part.replicas, part.local)
            self._at(held[f"{module}.qkv_proj.{kind}"])[first : first + part.local] = piece
        elif leaf in {"gate_proj", "up_proj"}:
            first = local * (leaf == "up_proj")
            self._at(held[f"{module}.gate_up_proj.weight"])[first : first + local] = shard(tensor, 0, rank, local)
        elif leaf in {"o_proj", "down_proj"}:
            whole = self._at(held[name])
            whole[:] = shard(tensor, 1, rank, whole.shape[1])
        elif leaf in {"embed", "head"}:
            rows = shard(tensor, 0, rank, self.padded)
            held[name].detach()[: len(rows)] = rows
        elif leaf in {"w1", "w3"}:
            stack, _, expert = module.rpartition(".")
            first = local * (leaf == "w3")
            self._at(held[f"{stack}.w13_weight"][int(expert)])[first : first + local] = shard(tensor, 0, rank, local)
        elif leaf == "w2":
            stack, _, expert = module.rpartition(".")
            self._at(held[f"{stack}.w2_weight"][int(expert)])[:] = shard(tensor, 1, rank, local)
        else:
            held[name].detach()[:] = tensor

    def _at(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter with its output features first."""
        return parameter.detach().t() if self.transposed and parameter.dim() == 2 else parameter.detach()

    def expected(self, **fields: Any) -> Expected:
        names, declared = self.shapes(), {}
        for name in names:
            for part, leaf in enumerate(("q_proj", "k_proj", "v_proj")):
                if leaf in name:
                    declared[name] = (name.replace(leaf, "qkv_proj"), part)
            for part, leaf in enumerate(("gate_proj", "up_proj")):
                if leaf in name:
                    declared[name] = (name.replace(leaf, "gate_up_proj"), part)
        gate = Part(self.inner, self.inner // self.ranks)
        fused = {f"layers.{n}.attn.qkv_proj": self.parts for n in range(self.layers)}
        fused |= {f"layers.{n}.mlp.gate_up_proj": [gate, gate] for n in range(self.layers)}
        layout = ReferenceLayout(
            parameters={n: n for n in names},
            features=dict.fromkeys(names, 0),
            lookups=["embed.weight"],
            tied=self.tied,
            embedding="embed.weight",
            head="head.weight",
        )
        dtype, tensors = str(self.dtype).removeprefix("torch."), {n: (s, "float32") for n, s in names.items()}
        told: dict[str, Any] = {
            "reference": layout,
            "declared": declared,
            "fused": fused,
            "dtype": dtype,
            "tensors": tensors,
        }
        return Expected(**(told | fields))


def shard(tensor: torch.Tensor, axis: int, rank: int, size: int) -> torch.Tensor:
    """A rank's slice of a tensor; shorter, or empty, where the tensor ends."""
    start = min(rank * size, tensor.shape[axis])
    return tensor.narrow(axis, start, min(size, tensor.shape[axis] - start))


def right(name: str, tensor: torch.Tensor, rank: int) -> tuple[str, torch.Tensor, int]:
    """No fault."""
    return name, tensor, rank


def ledgers(toy: Toy, *, fault: Fault = right, later: Fault | None = None, more: Pairs = ()) -> list[RankLedger]:
    """What every rank would report; ``later`` is the fault while real weights load, ``more`` are handed over last."""
    found = []
    everything = [*toy.checkpoint().items(), *more]
    for rank in range(toy.ranks * toy.stages):
        stage, number = divmod(rank, toy.ranks)
        held = {n: p for n, p in toy.parameters().items() if toy.on_stage(n, stage)}
        pairs = [(n, t) for n, t in everything if toy.on_stage((fault(n, t, number) or (n, t, number))[0], stage)]

        def load(weights: Iterable[tuple[str, torch.Tensor]], rank: int = number, held: Any = held) -> None:
            toy.load(held, weights, rank, fault)

        traced = trace_pairs(held, pairs, load, rank)
        toy.load(held, pairs, number, later or fault)
        padding = {n: (max(0, toy.vocab - number * toy.padded), "padded") for n in ("embed.weight", "head.weight")}
        arrived = list(compare_values(traced, held, pairs))
        found.append(RankLedger(rank=rank, stage=stage, found=traced, arrived=arrived, padding=padding))
    return found


def subject(toy: Toy, *, expected: Expected | None = None, **faults: Any) -> WeightSubject:
    return WeightSubject(ledgers(toy, **faults), expected or toy.expected())


def problems(toy: Toy, *, expected: Expected | None = None, **faults: Any) -> list[Problem]:
    return find_problems(subject(toy, expected=expected, **faults))


def judged(toy: Toy, *, expected: Expected | None = None, **faults: Any) -> Judged:
    return judge_weights(subject(toy, expected=expected, **faults))


def swapped(first: str, second: str) -> Fault:
    """A loader that takes names with one text for those with the other."""

    def fault(name: str, tensor: torch.Tensor, rank: int) -> tuple[str, torch.Tensor, int]:
        for one, other in ((first, second), (second, first)):
            if one in name:
                return name.replace(one, other), tensor, rank
        return name, tensor, rank

    return fault


def altered(
    text: str, change: Callable[[torch.Tensor], torch.Tensor] = lambda t: t, rank_of: Callable[[int], int] = lambda r: r
) -> Fault:
    """A loader that changes the tensors, or the rank, of names with ``text`` in them."""

    def fault(name: str, tensor: torch.Tensor, rank: int) -> tuple[str, torch.Tensor, int]:
        return (name, change(tensor), rank_of(rank)) if text in name else (name, tensor, rank)

    return fault


def dropped(text: str) -> Fault:
    """A loader that leaves names with ``text`` in them out."""
    return lambda name, tensor, rank: None if text in name else (name, tensor, rank)
