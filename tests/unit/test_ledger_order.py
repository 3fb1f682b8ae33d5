"""What arrived in the wrong place: order, ranks, layers, experts and declared places, at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import torch

from paritykit.ledger.order import layers_disagree, wrong_order
from paritykit.ledger.problem import Problem
from paritykit.ledger.problems import find_problems
from paritykit.ledger.subject import Expected, WeightSubject
from paritykit.mapping.rules import Part
from paritykit.provenance.names import numbers, pattern
from paritykit.provenance.weightmap import Landing, ParameterInfo, RankLedger, Span, TensorInfo, WeightMap
from tests.weights import Fault, Toy, altered, judged, problems, subject, swapped

RANKS = [1, 4]
Change = Callable[[torch.Tensor], torch.Tensor]


def codes(found: list[Problem]) -> dict[str, set[str]]:
    """The kinds of problem of each name."""
    told: dict[str, set[str]] = {}
    for p in found:
        told.setdefault(p.name, set()).add(p.code)
    return told


def one(found: list[Problem], code: str) -> Problem:
    return next(p for p in found if p.code == code)


@pytest.mark.parametrize(("first", "second", "names"), [
    ("1.attn.k_proj", "1.attn.v_proj", [f"attn.{p}_proj.{k}" for p in "kv" for k in ("weight", "bias")]),
    ("1.mlp.gate_proj", "1.mlp.up_proj", ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
])  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", RANKS)
def test_swapped_parts(ranks: int, transposed: bool, first: str, second: str, names: list[str]) -> None:
    found = problems(Toy(ranks=ranks, transposed=transposed), fault=swapped(first, second))
    assert codes(found) == {f"layers.1.{n}": {"wrong-order"} for n in names}
    assert "but landed in part" in found[0].message


def test_swapped_q_and_k() -> None:
    toy = Toy(kv_heads=4)
    found = problems(toy, fault=swapped("1.attn.q_proj", "1.attn.k_proj"))
    text = (
        "layers.1.attn.q_proj.weight: declared as part 0 of layers.1.attn.qkv_proj.weight, but landed in part 1 of it"
    )
    assert one(found, "wrong-order").message == text
    assert len(codes(found)) == 4
    undeclared = problems(toy, expected=toy.expected(declared={}), fault=swapped("1.attn.q_proj", "1.attn.k_proj"))
    assert {c for told in codes(undeclared).values() for c in told} == {"layers-disagree"}


@pytest.mark.parametrize(("name", "change", "text"), [
    ("attn.k_proj.weight", lambda t: t[[0, 2, 1, 3]], "layers.1.attn.k_proj.weight: axis 0 is "),
    ("attn.q_proj.bias", lambda t: t[[1, 0, 3, 2, 5, 4, 7, 6]], "axis 0 "),
    ("attn.o_proj.weight", lambda t: t.flip(0), "axis 0 runs backwards in layers.1.attn.o_proj.weight"),
    ("mlp.down_proj.weight", lambda t: t.flip(1), "axis 1 "),
    ("mlp.up_proj.weight", lambda t: t.roll(1, 0), "axis 0 is out of order: [0:"),
    ("norm.weight", lambda t: torch.cat([t[4:], t[:4]]), "axis 0 is out of order: [0:4] comes after [4:8]"),
    ("norm.weight", lambda t: torch.cat([t[::2], t[1::2]]), "axis 0 is interleaved: [1:8:2] comes after [0:7:2]"),
    ("norm.weight", lambda t: t.flip(0), "axis 0 runs backwards"),
    ("experts.1.w2.weight", lambda t: t[torch.arange(7, -1, -1)], "axis 0 runs backwards"),
])  # fmt: skip
@pytest.mark.parametrize("ranks", RANKS)
def test_rows_that_are_permuted(ranks: int, name: str, change: Change, text: str) -> None:
    found = problems(Toy(ranks=ranks), fault=altered(f"layers.1.{name}", change))
    assert codes(found)[f"layers.1.{name}"] - {"wrong-slice"} == {"wrong-order"}
    assert set(codes(found)) == {f"layers.1.{name}"}
    assert text in one(found, "wrong-order").message


@pytest.mark.parametrize(("other", "order", "cancels"), [
    ("k_proj", (0, 2, 1, 3), True),
    ("k_proj", (0, 1, 3, 2), False),
    ("nothing", (0, 2, 1, 3), False),
])  # fmt: skip
@pytest.mark.parametrize("ranks", [1, 2])
def test_queries_and_keys_in_one_order_within_each_head(
    ranks: int, other: str, order: tuple[int, ...], cancels: bool
) -> None:
    """As Llama 4's are, for the rotary embedding of its engine; what attention gives shows whether that follows."""

    def fault(name: str, tensor: torch.Tensor, rank: int) -> tuple[str, torch.Tensor, int]:
        kept = (0, 2, 1, 3) if "attn.q_proj" in name else order if other in name else None
        heads = tensor.unflatten(0, (-1, 4)) if kept else tensor
        return name, heads[:, list(kept)].flatten(0, 1) if kept else tensor, rank

    found = judged(Toy(ranks=ranks, hidden=16), fault=fault)
    wrong = {f.point.split(".")[-2] for f in found.findings if f.verdict == "fail"}
    assert wrong == (set() if cancels else {"q_proj"} | ({"k_proj"} if other == "k_proj" else set()))
    told = [f.message for f in found.findings if f.verdict == "pass" and f.message]
    assert all("that cancels in a product of both" in text for text in told)
    assert bool(told) == cancels


def test_the_rank_that_is_permuted_is_named() -> None:
    fault: Fault = lambda n, t, r: (n, t.flip(0) if n == "layers.2.norm.weight" and r == 1 else t, r)  # noqa: E731
    (found,) = problems(Toy(ranks=4), fault=fault)
    assert (found.code, found.rank, found.elements) == ("wrong-order", 1, 16)
    assert found.message.endswith("runs backwards in layers.2.norm.weight on rank 1")


@pytest.mark.parametrize(("ranks", "text", "rank_of", "message", "rank"), [
    (2, "1.mlp.gate", lambda r: 0, "rank 1 holds the same shard of {} as rank 0", 1),
    (4, "1.mlp.gate", lambda r: min(r, 2), "rank 3 holds the same shard of {} as rank 2", 3),
    (4, "1.mlp.gate", lambda r: 1 if r == 2 else r, "rank 2 holds the same shard of {} as rank 1", 2),
    (4, "1.attn.v_proj.weight", lambda r: 0, "rank 2 holds the same shard of {} as rank 0", 2),
    (2, "1.attn.o_proj", lambda r: 0, "rank 1 holds the same shard of {} as rank 0", 1),
    (2, "1.experts.2.w2", lambda r: 0, "rank 1 holds the same shard of {} as rank 0", 1),
    (2, "1.mlp.gate", lambda r: 1 - r, "the shards of {} in layers.1.mlp.gate_up_proj.weight do not follow", None),
    (4, "1.mlp.down", lambda r: r ^ 1, "the shards of {} in layers.1.mlp.down_proj.weight do not follow", None),
    (4, "1.attn.k_proj.bias", lambda r: r ^ 2, "the shards of {} in layers.1.attn.qkv_proj.bias do not follow", None),
])  # fmt: skip
def test_shards_of_other_ranks(
    ranks: int, text: str, rank_of: Callable[[int], int], message: str, rank: int | None
) -> None:
    found = problems(Toy(ranks=ranks), fault=altered(text, rank_of=rank_of))
    name = found[0].name
    assert (found[0].code, found[0].rank, len(codes(found))) == ("wrong-slice", rank, 1)
    assert found[0].message.startswith(message.format(name))
    assert text in name


@pytest.mark.parametrize("ranks", RANKS)
def test_swapped_experts(ranks: int) -> None:
    found = problems(Toy(ranks=ranks), fault=swapped("1.experts.0", "1.experts.2"))
    assert codes(found) == {f"layers.1.experts.{e}.w{w}.weight": {"wrong-slice"} for e in (0, 2) for w in (1, 2, 3)}
    first = next(p for p in found if p.name == "layers.1.experts.0.w2.weight")
    where = f"place 2 of layers.1.experts.w2_weight{' on rank 0' * (ranks > 1)}"
    assert first.message == f"layers.1.experts.0.w2.weight landed in {where}, where number 2 belongs"
    assert first.rank == 0


@pytest.mark.parametrize("what", ["", "norm", "experts", "mlp.down_proj", "attn.q_proj"])
@pytest.mark.parametrize(("ranks", "layers"), [(1, 2), (2, 3)])
def test_swapped_layers(ranks: int, layers: int, what: str) -> None:
    toy = Toy(ranks=ranks, layers=layers)
    wanted = {n: {"wrong-slice"} for n in toy.shapes() if n.startswith((f"layers.0.{what}", f"layers.1.{what}"))}
    fault = swapped(f"layers.0.{what}", f"layers.1.{what}")
    assert codes(problems(toy, fault=fault)) == wanted
    found = problems(toy, expected=toy.expected(declared={}), fault=fault)
    assert codes(found) == wanted
    assert any(p.message.startswith(next(iter(wanted))) and " landed in layers.1." in p.message for p in found)


@pytest.mark.parametrize("number", [lambda n: n + 2, lambda n: 2 * n + 1])
def test_layers_that_are_numbered_otherwise_are_no_swap(number: Callable[[int], int]) -> None:
    """Parameters for layer n + 2, or every other one, in order: the engine counts in its own way."""
    found = subject(Toy(layers=4, tied=True))
    text = msgspec.json.encode(found.found).decode()
    for n in range(4):
        for key in ("parameter", "name"):
            text = text.replace(f'"{key}":"layers.{n}.', f'"{key}":"blocks.{number(n)}.')
    whole = msgspec.json.decode(text, type=WeightMap)
    expected = Toy(layers=4, tied=True).expected(declared={}, fused={})
    renamed = WeightSubject([msgspec.structs.replace(found.ledgers[0], found=whole)], expected)
    assert find_problems(renamed) == []


def test_declared_for_another_parameter() -> None:
    toy = Toy()
    expected = toy.expected()
    declared = expected.declared | {
        "layers.0.norm.weight": ("layers.1.norm.weight", None),
        "layers.2.norm.weight": ("not.traced", None),
        "not.handed": ("layers.1.norm.weight", None),
    }
    (found,) = problems(toy, expected=msgspec.structs.replace(expected, declared=declared))
    assert (found.code, found.name) == ("wrong-slice", "layers.0.norm.weight")
    assert (
        found.message == "layers.0.norm.weight: declared for layers.1.norm.weight, but landed in layers.0.norm.weight"
    )


def test_declared_for_another_name_of_the_same_memory() -> None:
    toy = Toy(tied=True)
    assert problems(toy, expected=toy.expected(declared={"embed.weight": ("head.weight", None)})) == []


@pytest.mark.parametrize(("fault", "wanted"), [
    (swapped("nothing", "here"), {}),
    (swapped("1.mlp.gate_proj", "1.mlp.up_proj"),
     {"layers.1.mlp.gate_proj.weight": {"wrong-order"}, "layers.1.mlp.up_proj.weight": {"wrong-order"}}),
])  # fmt: skip
def test_declared_as_a_part_of_another_name_of_the_same_memory(fault: Fault, wanted: dict[str, set[str]]) -> None:
    """The engine reaches one module over two paths, and its rules speak of the second one."""
    toy = Toy()
    expected = toy.expected()
    second = [
        ParameterInfo(name=f"also.{n}.gate_up_proj.weight", shape=(24, 8), dtype="float32", same_as=name)
        for n in range(3)
        for name in [f"layers.{n}.mlp.gate_up_proj.weight"]
    ]
    declared = {
        name: (f"also.{parameter.split('.')[1]}.gate_up_proj.weight", part) if "gate_up" in parameter else home
        for name, home in expected.declared.items()
        for parameter, part in [home]
    }
    fused = {f"also.{m.split('.')[1]}.gate_up_proj" if "gate_up" in m else m: p for m, p in expected.fused.items()}
    made = subject(toy, expected=msgspec.structs.replace(expected, declared=declared, fused=fused), fault=fault)
    (ledger,) = made.ledgers
    whole = msgspec.structs.replace(ledger.found, parameters=[*ledger.found.parameters, *second])
    told = find_problems(WeightSubject([msgspec.structs.replace(ledger, found=whole)], made.expected))
    assert codes(told) == wanted


def test_a_tensor_that_spans_parts() -> None:
    toy = Toy()
    name = "layers.0.mlp.gate_proj.weight"
    fused = toy.expected().fused | {"layers.0.mlp.gate_up_proj": [Part(6, 6), Part(18, 18)]}
    found = problems(toy, expected=toy.expected(fused=fused))
    assert (
        found[0].message
        == f"{name}: declared as part 0 of layers.0.mlp.gate_up_proj.weight, but landed in part several of it"
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_unlike_the_others(ranks: int) -> None:
    turned = altered("layers.1.mlp.down_proj", lambda t: torch.cat([t[:, :6], t[:, 6:]], 1))
    assert problems(Toy(ranks=ranks), fault=turned) == []
    toy = Toy(ranks=ranks, kv_heads=4)
    found = problems(toy, expected=toy.expected(declared={}), fault=swapped("1.attn.k_proj", "1.attn.v_proj"))
    assert [p.code for p in found] == ["layers-disagree"] * 2
    kind = "layers.{}.attn.qkv_proj.weight"
    assert found[0].message == f"{kind.format(1)} is filled otherwise than {kind.format(0)} and 1 more like it"
    both = replace(toy, layers=2)
    assert problems(both, expected=both.expected(declared={}), fault=swapped("1.attn.k_proj", "1.attn.v_proj")) == []


def filled(*shapes: int, back: int | None = None) -> list[Problem]:
    """A vector for each layer, as long as ``shapes`` say, that arrived whole; backwards in layer ``back``."""
    landings, infos = [], []
    for n, length in enumerate(shapes):
        name = f"layers.{n}.norm.weight"
        place = Span(length - 1, 0, -1) if n == back else Span(0, length)
        landings.append(Landing(tensor=name, parameter=name, source=(place,), target=(Span(0, length),), axes=(0,)))
        infos.append(ParameterInfo(name=name, shape=(length,), dtype="float32"))
    tensors = {p.name: TensorInfo(shape=p.shape, dtype=p.dtype) for p in infos}
    found = WeightMap(tensors=tensors, parameters=infos, landings=landings)
    return list(layers_disagree(WeightSubject([RankLedger(rank=0, found=found)], Expected())))


def test_layers_of_another_shape_are_filled_in_their_own_way() -> None:
    assert filled(4, 4, 8, 4) == []
    assert [p.name for p in filled(4, 4, 8, 4, back=1)] == ["layers.1.norm.weight"]


def by_hand(*sources: tuple[int, Span, Span]) -> list[Problem]:
    """Rows of one tensor on some ranks, each from and to a span."""
    maps = []
    for rank in sorted({r for r, _, _ in sources}):
        landings = [
            Landing(tensor="t", parameter="p", rank=rank, source=(s, Span(0, 2)), target=(t, Span(0, 2)), axes=(0, 1))
            for r, s, t in sources if r == rank
        ]  # fmt: skip
        info = ParameterInfo(name="p", rank=rank, shape=(8, 2), dtype="float32")
        found = WeightMap(
            tensors={"t": TensorInfo(shape=(8, 2), dtype="float32")}, parameters=[info], landings=landings
        )
        maps.append(RankLedger(rank=rank, found=found))
    return list(wrong_order(WeightSubject(maps, Expected())))


def test_order_by_hand() -> None:
    assert not by_hand((0, Span(0, 4), Span(4, 4)))
    assert not by_hand((0, Span(0, 4), Span(0, 4)), (1, Span(4, 4), Span(0, 4)))
    assert not by_hand((0, Span(0, 4), Span(0, 4)), (1, Span(0, 4), Span(0, 4)), (2, Span(4, 4), Span(0, 4)))
    assert not by_hand((0, Span(0, 2), Span(0, 2)), (0, Span(6, 2), Span(2, 2)))
    assert by_hand((0, Span(4, 4), Span(0, 4)), (1, Span(0, 4), Span(0, 4)))[0].rank == 1
    assert "interleaved" in by_hand((0, Span(0, 4, 2), Span(0, 4)), (0, Span(1, 4, 2), Span(4, 4)))[0].message
    assert not by_hand((0, Span(3, 4, -1), Span(3, 4, -1)))


def test_names_and_their_numbers() -> None:
    assert pattern("model.layers.3.w1.weight") == "model.layers.*.w1.weight"
    assert numbers("h.11.mlp.experts.7.w2_2.weight") == [11, 7]
