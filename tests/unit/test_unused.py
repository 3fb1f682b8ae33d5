"""What the reference holds and never reads is told from what a few tokens did not choose."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from paritykit.engines.layout import reference_layout
from paritykit.engines.unused import Following, fill_with_zeros, held_tensors, unused_tensors
from paritykit.provenance.names import numbers
from paritykit.testing.drawn.model import drawn_model


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(psutil.Process().memory_info().rss)


def unused(folder: Path) -> list[str]:
    """Of all tensors of a checkpoint."""
    layout = reference_layout(str(folder))
    assert layout is not None
    return unused_tensors(str(folder), list(layout.parameters), layout.parameters)


@pytest.mark.parametrize(
    "name", ["qwen2", "mixtral", "deepseek_v3", "deepseek_v4", "minimax", "gpt2", "opt", "mamba", "rwkv", "jamba"]
)
def test_what_is_used_is_used(name: str) -> None:
    """Experts that no token chose, biases that only choose, states and windows that later tokens read."""
    assert unused(drawn_model(name)) == []


def test_experts_without_weights_that_the_reference_holds_weights_for() -> None:
    """Of LongCat's 10 experts two hand on what they get."""
    found = unused(drawn_model("longcat_flash"))
    assert {numbers(n)[1] for n in found} == {8, 9}
    assert all(".mlp.experts." in n and ("gate_proj" in n or "up_proj" in n) for n in found)


def test_a_pooler_whose_output_is_thrown_away() -> None:
    assert set(unused(drawn_model("big_bird"))) == {"bert.pooler.weight", "bert.pooler.bias"}


def test_what_cannot_be_built_is_all_used(tmp_path: Path) -> None:
    assert unused_tensors(str(tmp_path), ["a"], {"a": "a"}) == []


def test_zeros_take_no_memory_and_ties_stay() -> None:
    with torch.device("meta"):
        one, two, norm = nn.Linear(1 << 16, 1 << 14), nn.Linear(1, 1, bias=False), nn.BatchNorm1d(4)
        two.weight = one.weight
    before = resident()
    fill_with_zeros(nn.Sequential(one, two, norm))
    assert resident() < before + (1 << 30)
    assert two.weight is one.weight
    assert two.weight.nbytes == 4 << 30
    assert float(one.weight[-1, -1]) == float(one.bias[0]) == 0.0
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.dtype == torch.int64
    assert norm.running_mean is not None
    assert norm.running_mean.device.type == "cpu"


def test_following_goes_through_memory_choices_and_objects() -> None:
    a, b, c, d = (torch.ones(3) for _ in range(4))
    with Following({"a": a, "b": b, "c": c, "d": d}) as followed:
        out, aside = torch.zeros(4), torch.zeros(4)
        out[:3].copy_(a)  # into a view
        index = (b * 2).argmax()
        picked = torch.arange(5.0).index_select(0, index[None])
        torch.zeros(3) + d
    assert followed.seen == {"a", "b", "d"}
    assert followed.reaching(out) == {"a"}
    assert followed.reaching(picked) == {"b"}
    assert followed.reaching(aside) == set()
    with Following({"a": a}) as followed:
        many = int(a.sum())
        after = torch.zeros(many)
    assert followed.reaching(after) == {"a"}

    class Cache:
        def __init__(self) -> None:
            self.layers, self.also, self.itself = [{"keys": a}], (b,), self

    assert {id(t) for t in held_tensors(Cache())} == {id(a), id(b)}
