"""A mixture of experts of the reference: what every expert makes of every token, and how much each counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional

from paritykit.captures.manifest import point_key
from paritykit.diagnose.bench.calibrate import reproduces
from paritykit.diagnose.scene import Scene

NUMBERED = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")
ROLES = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1, "w2": 2, "down_proj": 2}
BIASES = ("e_score_correction_bias", "expert_bias")
"""What moves the choice of experts and not their shares."""
LARGEST = 1 << 28
"""Numbers that all experts' outputs may be."""
Function = Callable[[torch.Tensor], torch.Tensor]
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gate, up and down of all experts: ``[experts, width, hidden]`` twice, ``[experts, hidden, width]``."""


@dataclass(frozen=True)
class Choice:
    """How logits become shares: of ``chosen`` experts, made to sum to 1 or not, times ``factor``.

    Experts are chosen by their odds and ``bias``, which no share has (arXiv 2408.15664) but where it is ``weighed``.
    Of ``groups`` of experts only the best ``kept`` count, by the sum of their ``best`` odds (arXiv 2405.04434 and
    2412.19437).
    """

    chosen: int
    renormalise: bool
    sigmoid: bool = False
    factor: float = 1.0
    bias: tuple[float, ...] = ()
    weighed: bool = False
    groups: int = 1
    kept: int = 1
    best: int = 1

    def shares(self, logits: torch.Tensor) -> torch.Tensor:
        """``[tokens, experts]``, 0 for those that are not chosen."""
        odds = torch.sigmoid(logits) if self.sigmoid else logits.softmax(-1)
        liked = odds + odds.new_tensor(self.bias) if self.bias else odds
        places = self._grouped(liked).topk(self.chosen, dim=-1).indices
        top = (liked if self.weighed else odds).gather(-1, places)
        top = top / top.sum(-1, keepdim=True) if self.renormalise else top
        return torch.zeros_like(odds).scatter(-1, places, top * self.factor)

    def _grouped(self, liked: torch.Tensor) -> torch.Tensor:
        """Minus infinity for experts of groups that do not count."""
        if self.kept >= self.groups:
            return liked
        groups = liked.reshape(*liked.shape[:-1], self.groups, -1)
        scores = groups.topk(min(self.best, groups.shape[-1]), dim=-1).values.sum(-1)
        lost = torch.ones_like(scores).scatter(-1, scores.topk(self.kept, dim=-1).indices, 0.0).bool()
        return groups.masked_fill(lost[..., None], -torch.inf).flatten(-2)


@dataclass(frozen=True)
class Mixture:
    """Router and experts under ``parent``; ``choice`` is the one with which the recorded output comes out."""

    scene: Scene
    parent: str
    router: str
    experts: str
    weights: Weights
    function: Function
    choice: Choice

    def logits(self, case: str) -> torch.Tensor:
        """The router's, ``[positions, experts]``."""
        return self.scene.reference(self.router, case)

    def outputs(self, case: str, weights: Weights | None = None, function: Function | None = None) -> torch.Tensor:
        """What every expert makes of every position, ``[positions, experts, hidden]``."""
        if weights is None and function is None:
            return self.scene.once(
                ("experts", self.parent, case), lambda: self._outputs(case, self.weights, self.function)
            )
        return self._outputs(case, weights or self.weights, function or self.function)

    def mixed(self, case: str, shares: torch.Tensor | None = None, outputs: torch.Tensor | None = None) -> torch.Tensor:
        """The scene's point with other shares ``[positions, experts]`` or other outputs of the experts."""
        right_shares = self.choice.shares(self.logits(case))
        right = mix(right_shares, self.outputs(case))
        found = mix(right_shares if shares is None else shares, self.outputs(case) if outputs is None else outputs)
        return self.scene.reference(self.scene.point, case) + (found - right)

    def _outputs(self, case: str, weights: Weights, function: Function) -> torch.Tensor:
        x = self.scene.input_of(self.router, case)
        made = [
            functional.linear(function(functional.linear(x, g)) * functional.linear(x, u), d)
            for g, u, d in zip(*weights, strict=True)
        ]
        return torch.stack(made, dim=1)


def mix(shares: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The weighted sum of experts' outputs, ``[positions, hidden]``."""
    return (shares[..., None] * outputs).sum(1)


def mixture_of(scene: Scene, functions: dict[str, Function]) -> Mixture | None:
    """The mixture whose output the scene's point is, or that is part of it; None where there is none.

    ``functions`` are the activations that the experts may have.
    """
    return scene.once("mixture", lambda: _mixture_of(scene, functions))


def _mixture_of(scene: Scene, functions: dict[str, Function]) -> Mixture | None:
    parent = scene.module.removesuffix(".experts")
    router = next((f"{parent}.{n}" for n in ("gate", "router") if f"{parent}.{n}" in scene.points), "")
    experts = f"{parent}.experts"
    if scene.port or not router or experts not in scene.points or point_key(router, port="input") not in scene.points:
        return None
    weights = _weights(scene, experts)
    rows = max(scene.length(c) for c in scene.cases)
    if weights is None or len(weights[0]) != scene.width(router) or weights[2].shape[:2].numel() * rows > LARGEST:
        return None
    for function in functions.values():
        found = Mixture(scene, parent, router, experts, weights, function, Choice(1, renormalise=True))
        made = {c: found._outputs(c, weights, function) for c in scene.cases}
        for choice in _choices(scene, router):
            tried = replace(found, choice=choice)
            if reproduces(scene, experts, partial(_mixed_plainly, tried, made)):
                return tried
    return None


def _mixed_plainly(mixture: Mixture, made: dict[str, torch.Tensor], case: str) -> torch.Tensor:
    return mix(mixture.choice.shares(mixture.logits(case)), made[case])


def _choices(scene: Scene, router: str) -> Iterator[Choice]:
    """Ways to choose that config and checkpoint allow for."""
    bias = next((t for n in BIASES if (t := scene.parameter(f"{router}.{n}")) is not None), None)
    found = () if bias is None else tuple(bias.tolist())
    groups, kept = (scene.config.get(n) for n in ("n_group", "topk_group"))
    if not (isinstance(groups, int) and isinstance(kept, int) and scene.width(router) % groups == 0):
        groups = kept = 1
    for choice in _plain_choices(scene):
        for best in (1, 2) if kept < groups else (1,):
            yield replace(choice, bias=found, groups=groups, kept=kept, best=best)


def _plain_choices(scene: Scene) -> Iterator[Choice]:
    """These without bias and groups."""
    count = next((int(scene.config[n]) for n in ("num_experts_per_tok", "moe_topk", "top_k") if n in scene.config), 1)
    factor = scene.config.get("routed_scaling_factor")
    for value in dict.fromkeys([1.0, *([float(factor)] if isinstance(factor, int | float) else [])]):
        for sigmoid in (False, True):
            for renormalise in (True, False):
                yield Choice(count, renormalise, sigmoid, value)


def _weights(scene: Scene, experts: str) -> Weights | None:
    return scene.once(("expert weights", experts), lambda: _numbered(scene, experts) or _stacked(scene, experts))


def _numbered(scene: Scene, experts: str) -> Weights | None:
    """Experts that the checkpoint keeps one by one."""
    known: dict[str, str] = scene.reference_capture.manifest.facts.get("parameters", {})
    found: tuple[dict[int, str], ...] = ({}, {}, {})
    for name, parameter in known.items():
        match = NUMBERED.search(name)
        if match and parameter.startswith(f"{experts}.") and match[2] in ROLES:
            found[ROLES[match[2]]][int(match[1])] = name
    if not found[0] or not len(found[0]) == len(found[1]) == len(found[2]):
        return None
    stacked = []
    for names in found:
        tensors = [scene.tensor(names[n]) for n in sorted(names)]
        if any(t is None for t in tensors):
            return None
        stacked.append(torch.stack([t for t in tensors if t is not None]))
    return stacked[0], stacked[1], stacked[2]


def _stacked(scene: Scene, experts: str) -> Weights | None:
    """Experts that the checkpoint keeps in one tensor, gate above up."""
    both, down = scene.parameter(f"{experts}.gate_up_proj"), scene.parameter(f"{experts}.down_proj")
    if both is None or down is None or both.dim() != 3 or both.shape[2] != down.shape[1]:
        return None
    gate, up = both.chunk(2, dim=1)
    return gate, up, down
