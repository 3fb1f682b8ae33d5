"""A small model in plain torch that can be cut into modules in several ways: one function, cut otherwise."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import torch
from torch import nn

import paritykit as pk
from paritykit.config import load_config
from paritykit.results import Finding, Results
from paritykit.runner import compare_captures

WIDTH, VOCABULARY, LAYERS = 24, 61, 3
CASES = [
    pk.Case(id="a", tokens=tuple(range(5, 25)), new_tokens=2),
    pk.Case(id="b", tokens=(7, 9, 40), new_tokens=3, batch=1),
]


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """How the model is cut into modules, and what is wrong with it in layer ``where``.

    ``residual_in``: the mixer adds the residual; ``gate_in``: the expert multiplies by its gate; ``scaled_in``: the
    embedding multiplies; ``turned``: rows of q, and of k, in another order; ``odd``: the block gives something that is
    used by nobody, and beside it what it should; ``narrow``: of half the width.
    """

    residual_in: bool = False
    gate_in: bool = False
    scaled_in: bool = False
    turned: tuple[str, ...] = ()
    odd: bool = False
    narrow: bool = False
    scale: float = 3.0
    wrong: str = ""
    by: float = 1.05
    where: int = 1


class Mixer(nn.Module):
    """Causal attention of one head."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.cut = cut

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) * WIDTH**-0.5
        seen = torch.ones_like(scores, dtype=torch.bool).tril()
        mixed: torch.Tensor = self.o(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ self.v(x))
        return mixed + residual if self.cut.residual_in else mixed


class Expert(nn.Module):
    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.cut = cut

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.nn.functional.silu(self.up(x)))
        return gate.sigmoid() * out if self.cut.gate_in else out


class Block(nn.Module):
    """A gated expert beside a plain layer."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.gate, self.expert, self.plain = nn.Linear(WIDTH, 1), Expert(cut), nn.Linear(WIDTH, WIDTH)
        self.cut = cut

    def forward(self, x: torch.Tensor) -> Any:
        gate, plain = self.gate(x), self.plain(x)
        out = self.expert(x, gate)
        total = plain + (out if self.cut.gate_in else gate.sigmoid() * out)
        odd = plain * out * 0.1
        return (odd[..., : WIDTH // 2] if self.cut.narrow else odd, total) if self.cut.odd else (total,)


class Layer(nn.Module):
    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.norm, self.mixer, self.after, self.block = nn.LayerNorm(WIDTH), Mixer(cut), nn.LayerNorm(WIDTH), Block(cut)
        self.cut = cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.mixer(self.norm(x), x)
        x = mixed if self.cut.residual_in else x + mixed
        return x + self.block(self.after(x))[-1]


class Embedding(nn.Embedding):
    def __init__(self, cut: Cut) -> None:
        super().__init__(VOCABULARY, WIDTH)
        self.cut = cut

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = super().forward(ids)
        return rows * self.cut.scale if self.cut.scaled_in else rows


class Net(nn.Module):
    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.embed = Embedding(cut)
        self.layers = nn.ModuleList(Layer(cut) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.cut = cut

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x if self.cut.scaled_in else x * self.cut.scale
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def make(cut: Cut, dtype: torch.dtype = torch.float32) -> Net:
    """The model with values that depend on their names alone, but for what is wrong and for rows that are turned."""
    net = Net(cut)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, value in net.named_parameters():
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
            drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
            value.copy_(1 + 0.3 * drawn if value.dim() == 1 and "norm" in name else drawn * value.shape[-1] ** -0.5)
            if any(f".{part}." in name for part in cut.turned):
                value.copy_(value[order])
        if cut.wrong:
            net.get_parameter(f"layers.{cut.where}.{cut.wrong}").mul_(cut.by)
    return net.to(dtype).eval()


def compared(reference: Cut, candidate: Cut) -> Results:
    """The truth in float64 beside its twin in float32, and the candidate in float32."""
    engine: dict[str, Any] = {"forward": lambda model, ids, positions: model(ids), "head": "head"}

    def captured(cut: Cut, dtype: str, follow: pk.Capture | None = None) -> pk.Capture:
        made = pk.engine("module", model=make(cut), dtype=dtype, **engine)
        return pk.capture(made, cases=CASES, follow=follow)

    truth = captured(reference, "float64")
    twin, other = (captured(cut, "float32", truth) for cut in (reference, candidate))
    return compare_captures(truth, other, twin=twin, config=load_config({}, environ={}), explain=False)


def at(results: Results, point: str) -> list[Finding]:
    """The findings of a point, of every case."""
    return [f for f in results.findings if f.point == point]
