"""Tracing a loader: what it fills, from where, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import nn

from paritykit.provenance import boxes
from paritykit.provenance.trace import describe, named_tensors, trace
from paritykit.provenance.weightmap import Gap, Landing, Span, WeightMap, merge_ranks
from tests.weights import Pairs, random_tensor, trace_pairs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Given = Iterable[tuple[str, torch.Tensor]]


def copied(held: dict[str, torch.Tensor], pairs: Pairs, rank: int = 0) -> WeightMap:
    """The map of a loader that copies every tensor to the parameter of its name."""

    def load(weights: Given) -> None:
        for name, tensor in weights:
            held[name].copy_(tensor)

    return trace_pairs(held, pairs, load, rank)


def whole(name: str, *shape: int, to: str = "", copy: int = 0, change: str = "") -> Landing:
    spans, axes = tuple(Span(0, n) for n in shape), tuple(-1 if n == 1 else k for k, n in enumerate(shape))
    return Landing(tensor=name, parameter=to or name, source=spans, target=spans, axes=axes, copy=copy, change=change)


@pytest.mark.parametrize("parameter", DTYPES)
@pytest.mark.parametrize("checkpoint", DTYPES)
def test_any_dtypes(parameter: torch.dtype, checkpoint: torch.dtype) -> None:
    held: dict[str, torch.Tensor] = {"w": nn.Parameter(random_tensor(5, 3, dtype=parameter))}
    before = held["w"].detach().clone()
    found = copied(held, [("w", random_tensor(5, 3, dtype=checkpoint))])
    assert (found.landings, found.gaps) == ([whole("w", 5, 3)], [])
    assert found.tensors["w"].dtype == str(checkpoint).removeprefix("torch.")
    assert torch.equal(held["w"], before)


@pytest.mark.parametrize("parameter", [torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("checkpoint", [torch.float32, torch.bfloat16, torch.int64, torch.int32])
def test_numbers_and_whole_numbers(parameter: torch.dtype, checkpoint: torch.dtype) -> None:
    found = copied({"w": torch.zeros(5, 3, dtype=parameter)}, [("w", torch.zeros(5, 3, dtype=checkpoint))])
    assert (found.landings, found.gaps) == ([whole("w", 5, 3)], [])


def test_a_loader_that_writes_only_once_is_not_understood() -> None:
    held = {"w": torch.zeros(4)}
    calls: list[int] = []

    def load(weights: Given) -> None:
        calls.append(1)
        for name, tensor in weights:
            if len(calls) == 2:
                held[name].copy_(tensor)

    assert [g.kind for g in trace_pairs(held, [("w", torch.zeros(4))], load).gaps] == ["unknown"]


def test_a_model_of_many_dtypes_shapes_and_buffers() -> None:
    held: dict[str, torch.Tensor] = {
        "half": nn.Parameter(torch.zeros(2, 3, dtype=torch.float16)), "scalar": nn.Parameter(torch.tensor(1.0)),
        "one": torch.zeros(1), "empty": nn.Parameter(torch.zeros(0, 4)), "ids": torch.zeros(4, dtype=torch.int64),
        "bytes": torch.zeros(4, dtype=torch.uint8), "small": torch.zeros(3, dtype=torch.int8),
        "turned": nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16).t()), "strided": torch.zeros(4, 6)[:, ::2],
        "eighth": torch.zeros(2, 2).to(torch.float8_e4m3fn), "mask": torch.ones(3, dtype=torch.bool),
    }  # fmt: skip
    pairs = [(n, p.detach().clone()) for n, p in held.items()]
    found = copied(held, pairs)
    assert not found.gaps
    assert sorted(found.landings, key=lambda x: x.tensor) == [
        whole(n, *p.shape) for n, p in sorted(held.items()) if n not in {"empty", "mask"}
    ]
    assert [p.name for p in found.parameters if not p.buffer] == ["half", "scalar", "turned"]
    for name, tensor in pairs:
        assert torch.equal(held[name].to(torch.float64), tensor.to(torch.float64)), name


def test_tensors_handed_over_twice_and_which_one_stays() -> None:
    held = {"a": torch.zeros(2, 2)}
    found = copied(held, [("a", torch.zeros(2, 2))] * 3)
    assert found.landings == [whole("a", 2, 2, copy=2)]
    assert found.tensors["a"].copies == 3


def test_names_of_one_memory_are_traced_once() -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    model.head.weight = model.embed.weight
    model.register_buffer("seen", torch.zeros(2))
    model.register_buffer("made", torch.zeros(2), persistent=False)
    held = named_tensors(model)
    assert list(held) == ["embed.weight", "head.weight", "seen"]
    found = copied(held, [("embed.weight", torch.zeros(6, 4)), ("seen", torch.zeros(2))])
    assert [(p.name, p.same_as, p.buffer) for p in found.parameters] == [
        ("embed.weight", "", False), ("head.weight", "embed.weight", False), ("seen", "", True),
    ]  # fmt: skip
    assert found.landings == [whole("embed.weight", 6, 4), whole("seen", 2)]


def test_views_of_one_memory_are_parameters_of_their_own() -> None:
    memory = random_tensor(6, 4)
    before, held = memory.clone(), {"all": memory, "part": memory[2:4], "turned": memory.t()}
    found = copied(held, [("part", torch.zeros(2, 4))])
    assert [p.same_as for p in found.parameters] == [""] * 3
    assert {x.parameter for x in found.landings} == {"all", "part", "turned"}
    assert {x.parameter: x.target for x in found.landings}["all"] == (Span(2, 2), Span(0, 4))
    assert torch.equal(memory, before)


@pytest.mark.parametrize("value", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8])
def test_gaps(dtype: torch.dtype, value: int) -> None:
    held = {"p": torch.full((8, 2), 3).to(dtype)}

    def load(weights: Given) -> None:
        ((_, tensor),) = weights
        held["p"][:2] = tensor
        held["p"][2:4] = value
        held["p"][4:5] = tensor[:1] * tensor[1:]

    found = trace_pairs(held, [("t", torch.zeros(2, 2, dtype=dtype))], load)
    assert [(x.source, x.target) for x in found.landings] == [((Span(0, 2), Span(0, 2)), (Span(0, 2), Span(0, 2)))]
    columns = Span(0, 2)
    assert found.gaps == [
        Gap(parameter="p", target=(Span(2, 2), columns), kind="constant", value=float(value)),
        Gap(parameter="p", target=(Span(4, 1), columns), kind="unknown"),
        Gap(parameter="p", target=(Span(5, 3), columns), kind="unwritten"),
    ]
    assert (held["p"] == 3).all()


def test_a_scalar_that_is_left_alone_and_one_that_is_set() -> None:
    held = {"left": torch.tensor(2.0), "set": torch.tensor(2.0), "low": torch.zeros(2)}

    def load(weights: Given) -> None:
        list(weights)
        held["set"].fill_(7)
        held["low"].fill_(-torch.inf)

    found = trace_pairs(held, [("t", torch.zeros(3))], load)
    assert [(g.parameter, g.kind, g.value, g.target) for g in found.gaps] == [
        ("left", "unwritten", None, ()), ("set", "constant", 7.0, ()), ("low", "constant", -torch.inf, (Span(0, 2),)),
    ]  # fmt: skip
    assert held["set"] == 2


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_loader_that_fails_leaves_everything_as_it_was(failing: int) -> None:
    held: dict[str, torch.Tensor] = {
        "a": nn.Parameter(torch.tensor([1.0, float("nan"), -0.0])), "b": torch.tensor([3, 4], dtype=torch.int8),
    }  # fmt: skip
    before = {n: p.detach().clone() for n, p in held.items()}
    calls = 0

    def load(weights: Given) -> None:
        nonlocal calls
        for name, tensor in weights:
            held[name].copy_(tensor)
            if calls == failing:
                raise LookupError("no such layer")
        calls += 1

    with pytest.raises(LookupError, match="no such layer"):
        trace_pairs(held, [("a", torch.zeros(3)), ("b", torch.zeros(2, dtype=torch.int8))], load)
    assert torch.equal(held["a"].view(torch.int32), before["a"].view(torch.int32))
    assert torch.equal(held["b"], before["b"])


def test_parameters_that_the_loader_replaces() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()

    def load(weights: Given) -> None:
        model.register_parameter("bias", None)
        for _, tensor in weights:
            model.weight = nn.Parameter(tensor.clone())

    with torch.no_grad():
        found = trace(lambda: named_tensors(model), weights=lambda: [("w", torch.zeros(2, 3))], load=load)
    assert (found.landings, found.gaps) == ([whole("w", 2, 3, to="weight")], [])
    assert [p.name for p in found.parameters] == ["weight"]
    assert torch.equal(model.weight, before)


def test_a_loader_that_fails_amid_replacing_says_why() -> None:
    model = nn.Linear(3, 2)

    def load(weights: Given) -> None:
        model.register_parameter("bias", None)
        model.weight = nn.Parameter(torch.zeros(9))
        raise LookupError("no such layer")

    with torch.no_grad(), pytest.raises(LookupError, match="no such layer"):
        trace(lambda: named_tensors(model), weights=lambda: [("w", torch.zeros(2, 3))], load=load)


def test_values_may_be_left_as_loaded() -> None:
    held = {"a": torch.full((2,), 9.0)}
    with torch.no_grad():
        trace(
            held,
            weights=lambda: [("a", torch.zeros(2))],
            load=lambda w: [held[n].copy_(t) for n, t in w],
            restore=False,
        )
    assert not (held["a"] == 9).any()


def test_the_loader_sees_names_shapes_and_dtypes_but_no_real_numbers() -> None:
    pairs = [("a", random_tensor(3, 2, dtype=torch.bfloat16)), ("b", random_tensor(4))]
    seen: list[list[tuple[str, torch.Tensor]]] = []
    trace_pairs({"p": torch.zeros(1)}, pairs, lambda weights: seen.append(list(weights)))
    assert len(seen) == 8
    for one in seen:
        assert [(n, t.shape, t.dtype) for n, t in one] == [(n, t.shape, t.dtype) for n, t in pairs]
        assert not any(torch.equal(t, real) for (_, t), (_, real) in zip(one, pairs, strict=True))


def test_lazy_parameters_are_left_out() -> None:
    assert describe({"a": nn.parameter.UninitializedParameter(), "b": torch.zeros(1)}, 2)[0].name == "b"


def test_many_permuted_rows_are_scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "MOST", 16)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    held = {"p": torch.zeros(62, 3)}

    def load(weights: Given) -> None:
        ((_, tensor),) = weights
        held["p"].zero_()[1:61] = tensor[order]

    found = trace_pairs(held, [("t", torch.zeros(60, 3))], load)
    assert not found.landings
    assert [(g.kind, g.tensor, g.target[0], g.value) for g in found.gaps] == [
        ("constant", "", Span(0, 1), 0.0), ("scattered", "t", Span(1, 60), None), ("constant", "", Span(61, 1), 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together(ranks: int) -> None:
    """A stacked expert weight, a fused and sharded one, a replicated one and a broadcast one."""
    pairs = [("e0", torch.zeros(8, 3)), ("e1", torch.zeros(8, 3)), ("k", torch.zeros(4, 8)), ("s", torch.tensor(1.0))]

    def loader(held: dict[str, torch.Tensor], rank: int) -> Iterator[WeightMap]:
        def load(weights: Given) -> None:
            given = dict(weights)
            for e in range(2):
                held["experts"][e] = given[f"e{e}"].chunk(ranks)[rank]
            held["k"].copy_(given["k"][rank * 2 // ranks * 2 :][:2])
            held["scale"][:] = given["s"]

        yield trace_pairs(held, pairs, load, rank)

    maps: list[WeightMap] = []
    for rank in range(ranks):
        held = {"experts": torch.zeros(2, 8 // ranks, 3), "k": torch.zeros(2, 8), "scale": torch.zeros(3)}
        maps += loader(held, rank)
    found, rows = merge_ranks(maps), 8 // ranks
    assert (found.ranks, found.gaps, len(found.parameters)) == (ranks, [], 3 * ranks)
    for rank in range(ranks):
        for e, x in enumerate(found.of_parameter("experts", rank=rank)):
            assert (x.tensor, x.source[0], x.target[0], x.axes) == (
                f"e{e}",
                Span(rank * rows, rows),
                Span(e, 1),
                (-1, 0, 1),
            )
        (k,) = found.of_parameter("k", rank=rank)
        assert k.source[0] == Span(rank * 2 // ranks * 2, 2)
        assert [(x.source, x.axes) for x in found.of_parameter("scale", rank=rank)] == [((), (-1,))] * 3
