"""A traced map does what the loader does, to any tensors; and it can be read backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.provenance.moves import as_source, as_target, box, consumed, gather, scatter
from paritykit.provenance.weightmap import Landing, ParameterInfo, Span, TensorInfo, WeightMap, merge_ranks, show
from tests.weights import random_tensor, trace_pairs

Move = Callable[[torch.Tensor], torch.Tensor]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


class Layout(NamedTuple):
    """Shapes of a checkpoint, and what each rank makes of its tensors, in words and to do."""

    shapes: list[tuple[int, ...]]
    moves: list[list[Move]]
    ranks: int


def pad(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, torch.zeros_like(t[:1])]) if t.dim() else t


def regroup(t: torch.Tensor) -> torch.Tensor:
    rows = t.shape[0] if t.dim() else 1
    return t.reshape(2, rows // 2, *t.shape[1:]).transpose(0, 1).reshape(t.shape) if rows % 2 == 0 else t


MOVES: dict[str, Move] = {
    "transpose": lambda t: t.permute([*reversed(range(t.dim()))]),
    "flip": lambda t: t.flip(0) if t.dim() else t,
    "even": lambda t: t[::2] if t.dim() else t,
    "last": lambda t: t[..., -1:] if t.dim() else t,
    "pad": pad,
    "regroup": regroup,
    "squeeze": lambda t: t.squeeze(),
    "unsqueeze": lambda t: t.unsqueeze(t.dim()),
    "twice": lambda t: torch.cat([t, t]) if t.dim() else t,
    "flatten": lambda t: t.reshape(-1),
    "roll": lambda t: t.roll(1, 0) if t.dim() else t,
}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shapes = draw(st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=3))
    names = [draw(st.lists(st.sampled_from(sorted(MOVES)), max_size=3)) for _ in shapes]
    return Layout(shapes, [[MOVES[n] for n in found] for found in names], draw(st.sampled_from([1, 2])))


def put(layout: Layout, number: int, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A rank's parameter of a tensor: moved, then split over the ranks where it can be."""
    for move in layout.moves[number]:
        tensor = move(tensor)
    if tensor.dim() and tensor.shape[0] % layout.ranks == 0:
        tensor = tensor.chunk(layout.ranks)[rank]
    return tensor


def traced(layout: Layout, dtype: torch.dtype) -> tuple[WeightMap, dict[str, torch.Tensor]]:
    tensors = {f"t{n}": random_tensor(*s, dtype=dtype, seed=n) for n, s in enumerate(layout.shapes)}
    maps = []
    for rank in range(layout.ranks):
        held = {f"p{n}": put(layout, n, tensors[f"t{n}"], rank).clone() for n in range(len(layout.shapes))}

        def load(weights: Iterable[tuple[str, torch.Tensor]], rank: int = rank, held: dict = held) -> None:
            for name, tensor in weights:
                held[f"p{name[1:]}"].copy_(put(layout, int(name[1:]), tensor, rank))

        maps.append(trace_pairs(held, list(tensors.items()), load, rank))
    return merge_ranks(maps), tensors


@given(layouts(), DTYPES)
@settings(deadline=None, max_examples=150)
def test_scatter_is_the_loader_and_gather_its_inverse(layout: Layout, dtype: torch.dtype) -> None:
    found, tensors = traced(layout, dtype)
    held: dict[int, dict[str, torch.Tensor]] = {r: scatter(found, tensors, rank=r) for r in range(layout.ranks)}
    for n in range(len(layout.shapes)):
        name = f"t{n}"
        times = torch.zeros(layout.shapes[n], dtype=torch.int64).reshape(-1)
        numbered = torch.arange(1, times.numel() + 1).reshape(layout.shapes[n])
        for rank in range(layout.ranks):
            assert torch.equal(held[rank][f"p{n}"], put(layout, n, tensors[name], rank).to(torch.float64))
            places = put(layout, n, numbered, rank).reshape(-1)
            times += torch.bincount(places, minlength=times.numel() + 1)[1:]
        whole = times.reshape(layout.shapes[n])
        assert torch.equal(consumed(found, name).to(torch.int64), whole)
        back = gather(found, name, held)
        assert torch.equal(back.isnan(), whole == 0)
        assert torch.equal(back[whole > 0], tensors[name].to(torch.float64)[whole > 0])
    assert {g.kind for g in found.gaps} <= {"constant"}
    assert {g.value for g in found.gaps} <= {0.0}


@given(layouts())
@settings(deadline=None, max_examples=30)
def test_a_map_survives_json(layout: Layout) -> None:
    found, _ = traced(layout, torch.float32)
    assert msgspec.json.decode(msgspec.json.encode(found), type=WeightMap) == found


@given(
    st.permutations([0, 1, 2]), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.lists(st.booleans(), min_size=3)
)
def test_as_target_undoes_as_source(order: list[int], counts: list[int], down: list[bool]) -> None:
    source = tuple(Span(n - 1, n, -1) if d else Span(0, n) for n, d in zip(counts, down, strict=False))
    axes = tuple(a if counts[a] > 1 else -1 for a in order)
    target = tuple(Span(0, counts[a]) for a in order)
    landing = Landing(tensor="t", parameter="p", source=source, target=target, axes=axes)
    taken = box(random_tensor(*counts), source)
    assert torch.equal(as_source(as_target(taken, landing), landing), taken)
    assert torch.equal(as_target(taken, landing), taken.permute(*order))
    assert landing.transposed == ([a for a in order if counts[a] > 1] != [a for a in range(3) if counts[a] > 1])


def test_a_box_runs_as_its_spans_do() -> None:
    whole = torch.arange(24).reshape(4, 6)
    assert box(whole, (Span(3, 2, -2), Span(1, 3, 2))).tolist() == [[19, 21, 23], [7, 9, 11]]
    assert box(torch.tensor(5), ()).item() == 5


def test_scatter_leaves_out_other_ranks_and_names_of_the_same_memory() -> None:
    found = WeightMap(
        tensors={"t": TensorInfo(shape=(2,), dtype="float32")},
        parameters=[
            ParameterInfo(name="a", shape=(3,), dtype="float32"),
            ParameterInfo(name="b", shape=(3,), dtype="float32", same_as="a"),
            ParameterInfo(name="a", shape=(3,), dtype="float32", rank=1),
        ],
        landings=[
            Landing(tensor="t", parameter="a", source=(Span(0, 2),), target=(Span(1, 2),), axes=(0,), change="+1")
        ],
    )
    (made,) = scatter(found, {"t": torch.tensor([4.0, 5.0])}).values()
    assert made.tolist()[1:] == [5, 6]
    assert made[0].isnan()
    assert gather(found, "t", {0: {"a": made}}).isnan().all()


def test_landings_of_a_parameter_are_in_order_of_its_places() -> None:
    spans = [(Span(4, 2),), (Span(3, 4, -1),), (Span(6, 2),)]
    landings = [Landing(tensor="t", parameter="p", source=s, target=s, axes=(0,)) for s in spans]
    assert [x.target for x in WeightMap(landings=landings).of_parameter("p")] == [spans[1], spans[0], spans[2]]


def test_places_in_words() -> None:
    found = WeightMap(parameters=[ParameterInfo(name="a", shape=(3,), dtype="float32", rank=1)])
    assert found.shape("a", rank=1) == (3,)
    with pytest.raises(KeyError):
        found.shape("a")
    assert show((Span(3, 4, -1), Span(0, 8)), (4, 9)) == "[3::-1, 0:8]"
    assert (Span(3, 4, -1).low, Span(3, 4, -1).last, list(Span(5, 3, -2).places())) == (0, 0, [5, 3, 1])
