"""What is missing and what came twice: found where it was planted, named with its slice and rank, else quiet."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch

from paritykit.ledger.problem import Problem
from paritykit.ledger.problems import find_problems
from paritykit.ledger.subject import Expected, ReferenceLayout, WeightSubject
from paritykit.mapping.rules import Part
from paritykit.provenance.weightmap import (
    Gap,
    Landing,
    ParameterInfo,
    RankLedger,
    Span,
    TensorInfo,
    Unfilled,
    WeightMap,
)
from tests.weights import Toy, altered, dropped, ledgers, problems, random_tensor

RANKS = [1, 2, 4]
K = "layers.1.attn.k_proj.weight"


def told(found: list[Problem], name: str) -> list[tuple[str, str, int | None]]:
    return [(p.code, p.message, p.rank) for p in found if p.name == name]


@pytest.mark.parametrize("toy", [
    Toy(), Toy(tied=True), Toy(transposed=True), Toy(dtype=torch.bfloat16), Toy(dtype=torch.float16), Toy(kv_heads=1),
    Toy(kv_heads=4), Toy(layers=1), Toy(vocab=12), Toy(vocab=4), Toy(tied=True, transposed=True, dtype=torch.bfloat16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("ranks", RANKS)
def test_a_clean_engine_is_quiet(toy: Toy, ranks: int) -> None:
    assert problems(replace(toy, ranks=ranks)) == []


@pytest.mark.parametrize("ranks", RANKS)
def test_a_tensor_that_is_ignored(ranks: int) -> None:
    toy = Toy(ranks=ranks)
    found = problems(toy, fault=dropped(K))
    assert told(found, K) == [("unread", f"{K} was handed to the loader and ignored", None)]
    part, rows = toy.parts[0].local, toy.parts[1].local
    place = f"layers.1.attn.qkv_proj.weight[{part}:{part + rows}, :]"
    assert told(found, "layers.1.attn.qkv_proj.weight") == [
        ("unwritten", f"{place}{f' on rank {r}' * (ranks > 1)} is never written: it holds whatever was in memory", r)
        for r in range(ranks)
    ]
    assert len(found) == 1 + ranks
    assert found[0].elements == 32


def test_a_tensor_that_the_loader_is_never_handed() -> None:
    toy = Toy()
    extra = toy.expected(tensors=toy.expected().tensors | {"layers.9.new": ((3, 2), "float32")})
    assert told(problems(toy, expected=extra), "layers.9.new") == [
        ("unread", "layers.9.new was not even read by the loader", None)
    ]


@pytest.mark.parametrize(("ranks", "text"), [
    (1, "layers.1.attn.o_proj.weight[2:4, :] did not arrive (16 elements)"),
    (2, "layers.1.attn.o_proj.weight[2:4, :] landed on no rank (16 elements)"),
])  # fmt: skip
def test_a_slice_that_is_lost(ranks: int, text: str) -> None:
    fault = altered("layers.1.attn.o_proj", lambda t: torch.cat([t[:2], torch.zeros_like(t[:2]), t[4:]]))
    found = problems(Toy(ranks=ranks), fault=fault)
    assert told(found, "layers.1.attn.o_proj.weight")[0] == ("unread", text, None)
    where = [m for c, m, _ in told(found, "layers.1.attn.o_proj.weight") if c == "constant"]
    place, rest = "layers.1.attn.o_proj.weight[2:4, :]", "is set to 0.0 whatever the checkpoint holds"
    assert where == [f"{place}{f' on rank {r}' * (ranks > 1)} {rest}" for r in range(ranks)]


def test_a_bias_that_one_rank_leaves_out() -> None:
    found = problems(Toy(ranks=2), fault=lambda n, t, r: None if r == 1 and n == "layers.0.norm.weight" else (n, t, r))
    assert [(p.code, p.name, p.rank) for p in found] == [("unwritten", "layers.0.norm.weight", 1)]


@pytest.mark.parametrize("ranks", RANKS)
def test_padding_only_where_it_is_declared(ranks: int) -> None:
    toy = Toy(ranks=ranks)
    bare = [msgspec.structs.replace(x, padding={}) for x in ledgers(toy)]
    found = find_problems(WeightSubject(bare, toy.expected()))
    start = toy.vocab - (ranks - 1) * toy.padded
    where = f"embed.weight[{start}:{toy.padded}, :]{f' on rank {ranks - 1}' * (ranks > 1)}"
    assert told(found, "embed.weight") == [
        ("constant", f"{where} is set to 0.0 whatever the checkpoint holds", ranks - 1)
    ]
    early = [msgspec.structs.replace(x, padding={n: (at + 1, why) for n, (at, why) in x.padding.items()}) for x in bare]
    assert early == bare
    late = [msgspec.structs.replace(x, padding={"embed.weight": (start + 1, "padded")}) for x in bare]
    assert told(find_problems(WeightSubject(late, toy.expected())), "embed.weight")


@pytest.mark.parametrize(("kind", "value", "buffer", "code"), [
    ("unwritten", None, False, "unwritten"),
    ("unwritten", None, True, ""),
    ("constant", 0.0, False, ""),
    ("constant", 1.0, False, "constant"),
    ("constant", 1.0, True, "constant"),
    ("constant", 0.0, True, ""),
    ("unknown", None, False, "changed"),
    ("scattered", None, False, "wrong-order"),
])  # fmt: skip
def test_each_kind_of_gap(kind: Unfilled, value: float | None, buffer: bool, code: str) -> None:
    gap = Gap(parameter="p", target=(Span(2, 2),), kind=kind, value=value, tensor="t" if kind == "scattered" else "")
    found = WeightMap(
        tensors={"t": TensorInfo(shape=(2,), dtype="float32")},
        parameters=[ParameterInfo(name="p", shape=(4,), dtype="float32", buffer=buffer)],
        gaps=[gap],
    )
    ledger = RankLedger(found=found, padding={"p": (2, "padded")})
    got = find_problems(
        WeightSubject([ledger], Expected(tensors={"t": ((2,), "float32")} if kind == "scattered" else {}))
    )
    assert [p.code for p in got] == [code] * bool(code)
    assert all(p.message.startswith("p[2:4]") and p.elements == 2 for p in got)
    assert [p.name for p in got] == ["t" if kind == "scattered" else "p"] * bool(code)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_tensor_in_two_files(ranks: int) -> None:
    found = problems(Toy(ranks=ranks), more=[("layers.0.norm.weight", random_tensor(8, seed=99))])
    assert [(p.code, p.name) for p in found] == [("written-twice", "layers.0.norm.weight")]
    assert found[0].message == "the loader is handed 2 tensors named layers.0.norm.weight, and copy 2 of them stays"


@pytest.mark.parametrize("ranks", RANKS)
def test_one_tensor_in_two_parameters(ranks: int) -> None:
    fault = altered("layers.2.norm", lambda t: t)
    found = problems(
        Toy(ranks=ranks),
        fault=lambda n, t, r: ("layers.1.norm.weight", t, r) if n == "layers.2.norm.weight" else fault(n, t, r),
    )
    assert ("unwritten", "layers.2.norm.weight") in {(p.code, p.name) for p in found}
    assert ("unread", "layers.1.norm.weight") in {(p.code, p.name) for p in found}


def both(name: str, tensor: torch.Tensor, toy: Toy) -> list[Problem]:
    """A loader that is handed ``tensor`` once more, at the end, and takes it for the head."""
    found = []
    pairs = [*toy.checkpoint().items(), (name, tensor)]
    for ledger in ledgers(toy, more=[("head.weight", tensor)]):
        traced = ledger.found
        landings = [
            msgspec.structs.replace(x, tensor=name, copy=0) if x.tensor == "head.weight" else x for x in traced.landings
        ]
        tensors = {n: TensorInfo(shape=tuple(t.shape), dtype="float32") for n, t in pairs}
        whole = WeightMap(tensors=tensors, parameters=traced.parameters, landings=landings, gaps=traced.gaps)
        found.append(RankLedger(rank=ledger.rank, found=whole, padding=ledger.padding))
    return find_problems(WeightSubject(found, toy.expected()))


@pytest.mark.parametrize("ranks", RANKS)
def test_an_untied_head_filled_from_the_embedding(ranks: int) -> None:
    toy = Toy(ranks=ranks)
    found = both("embed.weight", toy.checkpoint()["embed.weight"], toy)
    assert told(found, "head.weight") == [("unread", "head.weight was handed to the loader and ignored", None)]
    assert told(found, "embed.weight") == [
        ("tied-wrongly", f"embed.weight fills embed.weight and head.weight{f' on rank {r}' * (ranks > 1)}; "
         "the config does not tie them", r)
        for r in range(ranks)
    ]  # fmt: skip


def test_a_head_filled_from_the_embedding_that_the_config_ties() -> None:
    toy = Toy()
    layout = ReferenceLayout(tied=True, embedding="embed.weight", head="head.weight")
    expected = Toy(tied=True).expected(reference=layout)
    for ledger in ledgers(toy, more=[]):
        landings = [x for x in ledger.found.landings if x.tensor != "head.weight"]
        again = [msgspec.structs.replace(x, parameter="head.weight") for x in landings if x.tensor == "embed.weight"]
        whole = WeightMap(tensors=ledger.found.tensors, parameters=ledger.found.parameters, landings=landings + again)
        assert find_problems(WeightSubject([RankLedger(found=whole)], expected)) == []


@pytest.mark.parametrize("ranks", RANKS)
def test_one_slice_in_two_parameters_is_written_twice(ranks: int) -> None:
    toy, name = Toy(ranks=ranks), "layers.0.norm.weight"
    wrong = []
    for ledger in ledgers(toy):
        (landing,) = [x for x in ledger.found.landings if x.tensor == name]
        more = msgspec.structs.replace(landing, parameter="layers.1.norm.weight")
        landings = [x for x in ledger.found.landings if x.tensor != "layers.1.norm.weight"]
        whole = msgspec.structs.replace(ledger.found, landings=[*landings, more])
        wrong.append(msgspec.structs.replace(ledger, found=whole))
    found = told(find_problems(WeightSubject(wrong, toy.expected())), name)
    assert [(c, r) for c, _, r in found if c == "written-twice"] == [("written-twice", r) for r in range(ranks)]
    assert f"{name} fills {name} and layers.1.norm.weight" in found[0][1]
    assert ("wrong-slice", f"{name} landed in layers.1.norm.weight{' on rank 0' * (ranks > 1)}", 0) in found


def fused(*parts: tuple[str, Span, Span], declared: int | None = None) -> list[tuple[str, str]]:
    """The problems of a tensor of six rows in parameters of fused parts of two rows each."""
    found = WeightMap(
        tensors={"t": TensorInfo(shape=(6,), dtype="float32")},
        parameters=[ParameterInfo(name=p, shape=(6,), dtype="float32") for p in {p for p, _, _ in parts}],
        landings=[Landing(tensor="t", parameter=p, source=(s,), target=(t,), axes=(0,)) for p, s, t in parts],
    )
    expected = Expected(
        tensors={"t": ((6,), "float32")},
        fused={"m": [Part(2, 2)] * 3},
        declared={} if declared is None else {"t": ("m.w", declared)},
    )
    return [(p.code, p.name) for p in find_problems(WeightSubject([RankLedger(found=found)], expected))]


def test_a_tensor_that_is_split_or_regrouped() -> None:
    assert not fused(("a.w", Span(0, 3), Span(0, 3)), ("b.w", Span(3, 3), Span(0, 3)))
    assert fused(("a.w", Span(0, 4), Span(0, 4)), ("b.w", Span(3, 3), Span(0, 3))) == [("written-twice", "t")]
    heads = [("m.w", Span(n, 2, 3), Span(2 * n, 2)) for n in range(3)]
    assert not fused(*heads)
    assert fused(*[("other.w", *x[1:]) for x in heads]) == [("wrong-order", "t")]
    assert fused(*heads, declared=1) == [("wrong-order", "t")]
    assert not fused(("m.w", Span(0, 6), Span(0, 6)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_shared_memory_that_the_config_does_not_tie(ranks: int) -> None:
    toy, free = Toy(ranks=ranks, tied=True), Toy(ranks=ranks)
    head = [("head.weight", free.checkpoint()["head.weight"])]
    found = find_problems(WeightSubject(ledgers(toy, more=head), free.expected()))
    text = "head.weight shares the memory of the embedding, but the config has tie_word_embeddings false"
    assert told(found, "head.weight") == [("tied-wrongly", text, None)]
    assert told(found, "embed.weight") == [("unread", "embed.weight was handed to the loader and ignored", None)]
    kept = ledgers(toy, fault=dropped("head.weight"), more=head)
    assert [p.code for p in find_problems(WeightSubject(kept, free.expected()))] == ["unread", "tied-wrongly"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_head_of_its_own_that_the_config_ties(ranks: int) -> None:
    toy = Toy(ranks=ranks)
    layout = msgspec.structs.replace(toy.expected().reference or ReferenceLayout(), tied=True)
    found = problems(toy, expected=toy.expected(reference=layout))
    text = "head.weight is loaded from head.weight, but the config ties it to the embedding"
    assert [(p.code, p.name, p.message) for p in found] == [("untied-wrongly", "head.weight", text)]


def test_both_tensors_in_the_one_memory_that_the_config_ties() -> None:
    toy = Toy(tied=True)
    found = problems(toy, more=[("head.weight", random_tensor(10, 8))])
    assert [(p.code, p.name) for p in found] == [("unread", "embed.weight")]


def test_without_a_reference_nothing_is_said_of_ties() -> None:
    toy = Toy()
    assert problems(toy, expected=toy.expected(reference=None)) == []
