"""A mixture of experts: the router, and all experts' weights stacked."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from paritykit.engines.nano.config import Experts, NanoConfig
from paritykit.engines.nano.layers import Activation
from paritykit.engines.nano.parameter import Build, LoadedParameter, Shard, copy_checked, load_whole, narrow_checked

GATE, DOWN, UP = "w1", "w2", "w3"


class Router(nn.Module):
    """Which experts a token goes to, and how much each counts."""

    def __init__(self, hidden: int, experts: Experts, *, build: Build) -> None:
        super().__init__()
        self._experts, self.top_k = experts, experts.chosen
        self.weight = build.parameter(experts.count, hidden, loader=load_whole)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits ``[tokens, experts]``, then share and number of the chosen ones, ``[tokens, chosen]`` each."""
        logits = functional.linear(x, self.weight)
        shares, chosen = self.choose(logits)
        return logits, shares.to(x.dtype), chosen

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest probabilities, made to sum to 1 where the model wants it, and whose they are."""
        odds = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        shares, chosen = odds.topk(self._experts.chosen, dim=-1)
        return (shares / shares.sum(-1, keepdim=True) if self._experts.renormalise else shares), chosen


class FusedExperts(nn.Module):
    """All experts: ``w13_weight`` holds gate above up, ``w2_weight`` down; every rank has its share of each width."""

    def __init__(self, hidden: int, experts: Experts, *, activation: str, build: Build) -> None:
        super().__init__()
        self._group, self._width = build.group, experts.width
        local = experts.width // build.group.size
        self.count, self._local = experts.count, local
        self.w13_weight = build.parameter(experts.count, 2 * local, hidden, loader=self.load)
        self.w2_weight = build.parameter(experts.count, hidden, local, loader=self.load)
        self.act_fn = Activation(activation)

    def load(self, parameter: LoadedParameter, tensor: torch.Tensor, shard: Shard = None) -> None:
        """Copy this rank's share of one expert's gate, down or up; ``shard`` is (expert, ``w1``, ``w2`` or ``w3``)."""
        assert isinstance(shard, tuple)
        expert, name = shard
        axis = 1 if name == DOWN else 0
        own = narrow_checked(tensor, axis, self._group.rank * self._local, self._local, total=self._width)
        target = parameter.data[expert]
        copy_checked(target if name == DOWN else target.narrow(0, self._local * (name == UP), self._local), own)

    def forward(self, x: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]``: the chosen experts' outputs, weighted by their shares."""
        total = torch.zeros_like(x)
        for expert in range(self.count):
            rows, place = torch.where(chosen == expert)
            if len(rows):
                total.index_add_(0, rows, self.expert(expert, x[rows]) * shares[rows, place, None])
        return self._group.all_reduce(total)

    def expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What this rank's share of one expert makes of ``x``, ``[tokens, hidden]``."""
        gate, up = functional.linear(x, self.w13_weight[expert]).chunk(2, dim=-1)
        return functional.linear(self.act_fn(gate) * up, self.w2_weight[expert])


class SparseMLP(nn.Module):
    """Router and experts in the place of an MLP."""

    def __init__(self, config: NanoConfig, build: Build) -> None:
        super().__init__()
        assert config.experts is not None
        self.gate = Router(config.hidden_size, config.experts, build=build)
        self.experts = FusedExperts(config.hidden_size, config.experts, activation=config.activation, build=build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        _, shares, chosen = self.gate(x)
        total: torch.Tensor = self.experts(x, shares, chosen)
        return total
