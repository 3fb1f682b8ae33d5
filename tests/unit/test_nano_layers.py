"""Every sharded layer gives, put together over its ranks, what the whole layer gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from paritykit.engines.nano.architectures import ExpertNames
from paritykit.engines.nano.config import Experts
from paritykit.engines.nano.embedding import ParallelHead, VocabParallelEmbedding, padded_vocabulary
from paritykit.engines.nano.group import Alone, Group
from paritykit.engines.nano.layers import RMSNorm, softcap
from paritykit.engines.nano.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from paritykit.engines.nano.moe import FusedExperts, Router
from paritykit.engines.nano.parameter import Build, LoadedParameter, Shard
from paritykit.errors import EngineError
from tests.nano import together

CPU = torch.device("cpu")


def build(group: Group) -> Build:
    return Build(group, torch.float32, CPU)


def load(parameter: Any, tensor: torch.Tensor, shard: Shard = None) -> None:
    assert isinstance(parameter, LoadedParameter)
    parameter.weight_loader(parameter, tensor, shard)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 2), (2, 2), (4, 2), (4, 1), (2, 4)])
def test_qkv(ranks: int, kv_heads: int) -> None:
    heads, dim, hidden = 4, 8, 12
    q, k, v = (normal(count * dim, hidden, seed=n) for n, count in enumerate((heads, kv_heads, kv_heads)))
    bias = normal(heads * dim, seed=3)
    x = normal(5, hidden, seed=4)
    replicas = max(1, ranks // kv_heads)
    parts: list[list[torch.Tensor]] = []
    for rank in range(ranks):
        layer = QKVParallelLinear(hidden, dim, heads, kv_heads, bias=True, build=build(Alone(rank, ranks)))
        for shard, tensor in (("q", q), ("k", k), ("v", v)):
            load(layer.weight, tensor, shard)
            load(layer.bias, bias if shard == "q" else bias[: kv_heads * dim], shard)
        assert not layer.weight.isnan().any()
        assert layer.weight.shape == ((layer.heads + 2 * layer.kv_heads) * dim, hidden)
        parts.append(list(layer(x).split(layer.widths, dim=-1)))
    torch.testing.assert_close(torch.cat([p[0] for p in parts], -1), functional.linear(x, q, bias))
    for n, weight in ((1, k), (2, v)):
        joined = torch.cat([p[n] for p in parts[::replicas]], -1)
        torch.testing.assert_close(joined, functional.linear(x, weight, bias[: kv_heads * dim]))
        assert all(torch.equal(parts[r][n], parts[r - r % replicas][n]) for r in range(ranks))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merged_columns_then_rows(ranks: int) -> None:
    gate, up, down, bias = normal(16, 6), normal(16, 6, seed=1), normal(6, 16, seed=2), normal(6, seed=3)
    x = normal(5, 6, seed=4)

    def work(group: Group) -> torch.Tensor:
        columns = MergedColumnParallelLinear(6, [16, 16], bias=False, build=build(group))
        rows = RowParallelLinear(16, 6, bias=True, build=build(group))
        load(columns.weight, gate, 0)
        load(columns.weight, up, 1)
        load(rows.weight, down)
        load(rows.bias, bias)
        left, right = columns(x).split(columns.widths, dim=-1)
        total: torch.Tensor = rows(left * right)
        return total

    expected = functional.linear(functional.linear(x, gate) * functional.linear(x, up), down, bias)
    for found in together(ranks, work):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("vocabulary", "ranks"), [(499, 1), (499, 2), (499, 4), (64, 2), (65, 2), (10, 4)])
def test_vocabulary(vocabulary: int, ranks: int) -> None:
    weight, ids = normal(vocabulary, 8), torch.tensor([0, vocabulary - 1, vocabulary // 2, 3])

    def work(group: Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        embedding = VocabParallelEmbedding(vocabulary, 8, build=build(group))
        head = ParallelHead(vocabulary, 8, build=build(group))
        load(embedding.weight, weight)
        head.tie(embedding)
        assert not embedding.weight[embedding.shard.real :].any()
        found = embedding(ids)
        return embedding.weight, found, head(found)

    for held, found, logits in together(ranks, work):
        assert held.shape[0] * ranks == padded_vocabulary(vocabulary, ranks)
        assert torch.equal(found, weight[ids])
        torch.testing.assert_close(logits, weight[ids] @ weight.T)


def test_padding_is_vllms() -> None:
    assert [padded_vocabulary(v, 1) for v in (1, 64, 65, 499, 32000)] == [64, 64, 128, 512, 32000]
    assert padded_vocabulary(499, 3) == 576


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("renormalise", [False, True])
def test_experts(ranks: int, renormalise: bool) -> None:
    count, width, hidden = 4, 8, 6
    experts = Experts(
        count=count, chosen=2, width=width, renormalise=renormalise, names=ExpertNames("mlp", "g", "d", "u")
    )
    gates, ups = normal(count, width, hidden), normal(count, width, hidden, seed=1)
    downs, route, x = normal(count, hidden, width, seed=2), normal(count, hidden, seed=3), normal(7, hidden, seed=4)

    def work(group: Group) -> torch.Tensor:
        router = Router(hidden, experts, build=build(group))
        layer = FusedExperts(hidden, experts, activation="silu", build=build(group))
        load(router.weight, route)
        for n in range(count):
            load(layer.w13_weight, gates[n], (n, "w1"))
            load(layer.w13_weight, ups[n], (n, "w3"))
            load(layer.w2_weight, downs[n], (n, "w2"))
        _, shares, chosen = router(x)
        total: torch.Tensor = layer(x, shares, chosen)
        return total

    odds = (x @ route.T).softmax(-1)
    best, index = odds.topk(2)
    shares = torch.zeros_like(odds).scatter(1, index, best / best.sum(-1, keepdim=True) if renormalise else best)
    parts = zip(gates, ups, downs, strict=True)
    each = torch.stack([(functional.silu(x @ gate.T) * (x @ up.T)) @ down.T for gate, up, down in parts])
    expected = torch.einsum("te,eth->th", shares, each)
    for found in together(ranks, work):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(offset: float) -> None:
    norm = RMSNorm(16, eps=1e-3, offset=offset, build=build(Alone()))
    load(norm.weight, normal(16))
    x = normal(3, 4, 16, seed=1)
    expected = functional.rms_norm(x, (16,), norm.weight + offset, eps=1e-3)
    torch.testing.assert_close(norm(x), expected)
    assert norm(x.bfloat16()).dtype == (torch.bfloat16 if offset else torch.float32)
    assert norm(x.double()).dtype == torch.float64


def test_softcap() -> None:
    x = torch.tensor([-100.0, 0.0, 1.0, 100.0])
    assert softcap(x, None) is x
    torch.testing.assert_close(softcap(x, 5.0), 5 * torch.tanh(x / 5))


def test_a_rank_built_alone_cannot_communicate() -> None:
    layer = RowParallelLinear(4, 4, bias=False, build=build(Alone(1, 2)))
    load(layer.weight, torch.eye(4))
    with pytest.raises(RuntimeError, match="rank 1 of 2 was built alone"):
        layer(torch.ones(1, 2))


@pytest.mark.parametrize("shape", [(7, 6), (8, 5), (8,)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    layer = MergedColumnParallelLinear(6, [8, 8], bias=False, build=build(Alone(1, 2)))
    with pytest.raises(EngineError, match="has shape"):
        load(layer.weight, torch.zeros(shape), 1)
