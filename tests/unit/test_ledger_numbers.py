"""What arrived changed: transposed, offset, scaled, in fewer bits, or simply another number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import torch

from paritykit.ledger.numbers import bits, described, wrong_transpose
from paritykit.ledger.problem import Problem
from paritykit.ledger.problems import find_problems
from paritykit.ledger.subject import Expected, ReferenceLayout, WeightSubject
from paritykit.provenance.weightmap import Landing, ParameterInfo, RankLedger, Span, TensorInfo, WeightMap
from tests.weights import Toy, altered, dropped, problems

RANKS = [1, 4]
Change = Callable[[torch.Tensor], torch.Tensor]


def told(found: list[Problem]) -> set[tuple[str, str]]:
    return {(p.code, p.name) for p in found}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_square_weight_that_is_transposed(ranks: int, transposed: bool) -> None:
    toy = Toy(ranks=ranks, transposed=transposed)
    found = problems(toy, fault=altered("layers.1.attn.o_proj", torch.t))
    assert told(found) == {("wrong-transpose", "layers.1.attn.o_proj.weight")}
    where = "layers.1.attn.o_proj.weight is transposed in layers.1.attn.o_proj.weight"
    assert found[0].message == f"{where}, unlike the engine's other weights"
    everywhere = problems(toy, fault=altered("attn.o_proj", torch.t))
    assert told(everywhere) == {("wrong-transpose", f"layers.{n}.attn.o_proj.weight") for n in range(3)}


def test_a_square_part_of_a_fused_weight_that_is_transposed() -> None:
    found = problems(Toy(), fault=altered("layers.2.attn.q_proj.weight", torch.t))
    assert told(found) == {("wrong-transpose", "layers.2.attn.q_proj.weight")}


def laid_out(shapes: dict[str, tuple[int, int]], turned: str, features: dict[str, int]) -> list[Problem]:
    """The problems of whole weights, those whose names have a letter of ``turned`` with their axes exchanged."""
    parameters, landings = [], []
    for name, shape in shapes.items():
        axes = (1, 0) if name[0] in turned else (0, 1)
        held = tuple(shape[a] for a in axes)
        parameters.append(ParameterInfo(name=name, shape=held, dtype="float32"))
        source, target = (tuple(Span(0, n) for n in s) for s in (shape, held))
        landings.append(Landing(tensor=name, parameter=name, source=source, target=target, axes=axes))
    tensors = {n: TensorInfo(shape=s, dtype="float32") for n, s in shapes.items()}
    found = WeightMap(tensors=tensors, parameters=parameters, landings=landings)
    layout = ReferenceLayout(parameters={n: n for n in shapes}, features=features, lookups=["e"])
    expected = Expected(tensors={n: (s, "float32") for n, s in shapes.items()}, reference=layout)
    return find_problems(WeightSubject([RankLedger(found=found)], expected))


SHAPES = {"a": (4, 4), "b": (4, 4), "c": (4, 4), "e": (4, 4), "w": (6, 4)}


@pytest.mark.parametrize(("shapes", "turned", "features", "wrong"), [
    ("abcew", "", {}, ""),
    ("abcew", "abcw", {}, ""),
    ("abcew", "a", {}, "a"),
    ("abcew", "abc", {}, "abc"),
    ("abcew", "abw", {}, "c"),
    ("abc", "abc", {}, ""),
    ("abc", "a", {}, "a"),
    ("abce", "e", {}, ""),
    ("abcw", "w", {"a": 1, "b": 1, "c": 1}, ""),
    ("abcw", "abcw", {"a": 1, "b": 1, "c": 1, "w": 1}, ""),
    ("abcw", "abw", {"a": 1, "b": 1, "c": 1, "w": 1}, "c"),
])  # fmt: skip
def test_the_usual_axis_is_that_of_what_fits_one_way_only(shapes: str, turned: str, features: dict, wrong: str) -> None:
    found = laid_out({n: SHAPES[n] for n in shapes}, turned, dict.fromkeys(shapes, 0) | features)
    assert told(found) == {("wrong-transpose", n) for n in wrong}


def one_of_each(shape: tuple[int, ...], target: tuple[Span, ...], axes: tuple[int, ...]) -> list[Problem]:
    """The problems of dense weights as they are, and of one more, whose first rows and columns land as given."""
    held = tuple(s.count for s in target)
    counts = [next((target[k].count for k, a in enumerate(axes) if a == axis), 1) for axis in (0, 1)]
    rows, columns, square = Span(0, counts[0]), Span(0, counts[1]), (Span(0, 4), Span(0, 4))
    landings = [
        Landing(tensor=n, parameter=n, source=s, target=t, axes=a)
        for n, s, t, a in (
            ("d", (Span(0, 6), Span(0, 4)), (Span(0, 6), Span(0, 4)), (0, 1)),
            ("s", square, square, (0, 1)),
            ("x", (rows, columns), target, axes),
        )
    ]
    shapes = {"d": (6, 4), "s": (4, 4), "x": shape}
    parameters = [ParameterInfo(name=n, shape=held if n == "x" else s, dtype="float32") for n, s in shapes.items()]
    tensors = {n: TensorInfo(shape=s, dtype="float32") for n, s in shapes.items()}
    layout = ReferenceLayout(parameters={n: n for n in shapes}, features=dict.fromkeys(shapes, 0))
    found = WeightMap(tensors=tensors, parameters=parameters, landings=landings)
    return [*wrong_transpose(WeightSubject([RankLedger(found=found)], Expected(reference=layout)))]


def test_experts_may_lie_otherwise_than_dense_weights() -> None:
    one = Span(0, 1)
    assert not one_of_each((6, 4), (one, Span(0, 4), Span(0, 6)), (-1, 1, 0))
    assert not one_of_each((4, 4), (one, Span(0, 4), Span(0, 4)), (-1, 1, 0))
    assert told(one_of_each((4, 4), (Span(0, 4), Span(0, 4)), (1, 0))) == {("wrong-transpose", "x")}


def test_a_square_shard_may_be_turned_by_mistake_too() -> None:
    square = (Span(0, 4), Span(0, 4))
    assert not one_of_each((4, 8), square, (0, 1))
    assert told(one_of_each((4, 8), square, (1, 0))) == {("wrong-transpose", "x")}
    assert not one_of_each((4, 1), (Span(0, 1), Span(0, 4)), (-1, 0))


def test_a_reference_that_stores_its_weights_transposed() -> None:
    """Conv1D: the checkpoint's output features are its columns, the engine's its rows."""
    plain = Toy()
    layout = plain.expected().reference
    assert layout is not None
    conv = dict.fromkeys((n for n in plain.shapes() if "weight" in n and "norm" not in n and n != "embed.weight"), 1)
    reference = msgspec.structs.replace(layout, features=layout.features | conv)
    for toy in (plain, replace(plain, transposed=True)):
        assert problems(toy, expected=toy.expected(reference=reference)) == []
        found = problems(toy, expected=toy.expected(reference=reference), fault=altered("2.attn.o_proj", torch.t))
        assert told(found) == {("wrong-transpose", "layers.2.attn.o_proj.weight")}


def test_without_a_reference_nothing_is_said_of_axes() -> None:
    toy = Toy(layers=1)
    assert problems(toy, expected=toy.expected(reference=None), fault=altered("attn.o_proj", torch.t)) == []


@pytest.mark.parametrize(("change", "code", "formula"), [
    (lambda t: t + 1, "offset", "w + 1"),
    (lambda t: t - 1, "offset", "w - 1"),
    (lambda t: t + 0.5, "offset", "w + 0.5"),
    (lambda t: t * 2, "scale", "w * 2"),
    (lambda t: t * 3.5, "scale", "w * 3.5"),
    (lambda t: t * 1.4142135, "scale", "w * 1.414214"),
    (lambda t: -t, "changed", "negated"),
    (lambda t: -t.exp(), "changed", "-exp(w)"),
    (torch.nn.functional.softplus, "changed", "softplus(w)"),
])  # fmt: skip
@pytest.mark.parametrize("ranks", RANKS)
def test_a_change_on_the_way(ranks: int, change: Change, code: str, formula: str) -> None:
    found = problems(Toy(ranks=ranks), fault=altered("layers.1.norm", change))
    name = "layers.1.norm.weight"
    assert told(found) == {(code, name)}
    assert found[0].message == f"{name} arrives in {name} as {formula}{' on rank 0' * (ranks > 1)}"
    assert (found[0].rank, found[0].elements) == (0, 8)


def test_a_change_that_is_not_known() -> None:
    found = problems(Toy(ranks=2), fault=altered("layers.1.norm", lambda t: t.double().sin().to(t.dtype)))
    assert told(found) == {("unread", "layers.1.norm.weight"), ("changed", "layers.1.norm.weight")}
    where = "layers.1.norm.weight[:] on rank 0 holds values made from the checkpoint in a way that was not recognised"
    assert next(p.message for p in found if p.code == "changed") == where


def test_changes_in_words() -> None:
    assert described("*3 + -1") == "w * 3 + -1"
    assert described("+0.25") == "w + 0.25"
    assert described("exp(x)") == "exp(w)"
    assert described("x^2") == "w^2"


@pytest.mark.parametrize(("held", "asked", "wrong"), [
    (torch.float32, "float32", False), (torch.bfloat16, "float32", True), (torch.bfloat16, "bfloat16", False),
    (torch.bfloat16, "float16", True), (torch.bfloat16, "", False), (torch.float16, "bfloat16", False),
    (torch.float8_e4m3fn, "bfloat16", True),
])  # fmt: skip
def test_fewer_bits(held: torch.dtype, asked: str, wrong: bool) -> None:
    toy = Toy(dtype=held, layers=1)
    found = problems(toy, expected=toy.expected(dtype=asked))
    assert told(found) == ({("dtype-narrowed", n) for n in toy.shapes()} if wrong else set())
    if wrong:
        text = f"embed.weight is float32 and the engine runs in {asked}, but embed.weight is {str(held)[6:]}"
        assert found[0].message == text


@pytest.mark.parametrize(("stored", "wrong"), [("bfloat16", False), ("float16", True), ("float32", True)])
def test_what_is_stored_in_few_bits_cannot_lose_them(stored: str, wrong: bool) -> None:
    spans = (Span(0, 3),)
    found = WeightMap(
        tensors={"t": TensorInfo(shape=(3,), dtype=stored)},
        parameters=[ParameterInfo(name="p", shape=(3,), dtype="bfloat16")],
        landings=[Landing(tensor="t", parameter="p", source=spans, target=spans, axes=(0,))],
    )
    got = find_problems(WeightSubject([RankLedger(found=found)], Expected(dtype="float32")))
    assert told(got) == ({("dtype-narrowed", "t")} if wrong else set())


def test_bits_of_names() -> None:
    assert [bits(d) for d in ("float64", "float32", "float16", "bfloat16", "int8")] == [53, 24, 11, 8, 64]
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        assert 2.0 ** (1 - bits(name)) == torch.finfo(getattr(torch, name)).eps


@pytest.mark.parametrize("ranks", RANKS)
def test_one_element_that_changed(ranks: int) -> None:
    def later(name: str, tensor: torch.Tensor, rank: int) -> tuple[str, torch.Tensor, int]:
        if name == "layers.2.attn.k_proj.weight":
            tensor = tensor.clone()
            tensor[3, 5] = 77.0
        return name, tensor, rank

    toy = Toy(ranks=ranks)
    found = problems(toy, later=later)
    assert told(found) == {("value-changed", "layers.2.attn.k_proj.weight")}
    held = 3 // toy.parts[1].local * toy.parts[1].replicas
    was = float(toy.checkpoint()["layers.2.attn.k_proj.weight"][3, 5])
    of = toy.parts[1].local * 8
    where = f"layers.2.attn.qkv_proj.weight{f' on rank {held}' * (ranks > 1)}"
    text = (
        f"1 of {of} elements of layers.2.attn.k_proj.weight differ in {where}; first at [3, 5]: 77 instead of {was:.6g}"
    )
    assert (found[0].message, found[0].elements, found[0].rank) == (text, 1, held)


def test_values_that_do_not_come_though_the_trace_says_they_would() -> None:
    found = problems(Toy(), later=dropped("layers.0.norm"))
    assert told(found) == {("value-changed", "layers.0.norm.weight")}
