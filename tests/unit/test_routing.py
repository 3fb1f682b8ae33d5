"""Expert flips: what a measured error explains, what it reaches, and that all else stays judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paritykit.captures.manifest import Manifest, Segment
from paritykit.case import Case
from paritykit.comparison.judge import judge
from paritykit.comparison.metrics import measure
from paritykit.comparison.routing import (
    Flip,
    Rerouted,
    Router,
    Rows,
    boundary,
    chosen_experts,
    find_routers,
    judge_around,
    trace_flips,
)
from paritykit.comparison.tolerance import Tolerance
from paritykit.diagnose.locate import Graph
from paritykit.engines.features import experts_chosen
from paritykit.invariance.bound import reordering
from paritykit.invariance.compare import Scene, View, compare_tokens, compare_views
from paritykit.results import Finding
from tests.made import finding, manifest, write_capture

KEYS: dict[str, int | list[int]] = {
    "l0.attn#key_cache": [1, 4],
    "l0.attn.o": 4,
    "l0.mlp.gate": 4,
    "l0.mlp.experts": 4,
    "l0.mlp": 4,
    "l0": 4,
    "l1.attn.q": 4,
    "l1.attn#key_cache": [1, 4],
    "l1.attn#value_cache": [1, 4],
    "l1.attn.o": 4,
    "#logits": 4,
}
LOOSE = Tolerance(0.05, 0.4, "test")
GATE = Router("l0.mlp.gate", 2, 2, 8, "l0.mlp")


def names(*, chosen: int = 2) -> Manifest:
    made = manifest(KEYS, facts={"routers": {"l0.mlp.gate": chosen}} if chosen else {})
    kinds = {"l0.mlp.gate": "TopKRouter"}
    points = [msgspec.structs.replace(p, kind=kinds.get(p.module, "Linear")) for p in made.points]
    return msgspec.structs.replace(made, points=points)


class Pair(NamedTuple):
    """Both sides by point, at as many positions as there are rows."""

    tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def rows(self, key: str) -> Rows | None:
        found = self.tensors.get(key)
        return None if found is None else Rows(list(range(len(found[0]))), *found)

    def sound(self, key: str, rows: Rows) -> Sequence[bool]:
        return [judge(measure(rows.left, rows.right), LOOSE)[0] == "pass"] * len(rows.positions)

    def same(self, key: str, rows: Rows) -> Sequence[bool]:
        return [e <= LOOSE.whole for e in measure(rows.left, rows.right).row_rel_l2]


class Lenient(Pair):
    """Whatever the error, it is allowed."""

    def sound(self, key: str, rows: Rows) -> Sequence[bool]:
        return [True] * len(rows.positions)


def logits(seed: int, tokens: int = 6, experts: int = 4) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def test_routers_are_found_with_what_they_reach() -> None:
    assert find_routers(names()) == [GATE]
    assert find_routers(names(chosen=0)) == [GATE._replace(chosen=0)]
    assert find_routers(manifest(KEYS)) == []
    short = names()
    short.points = [p for p in short.points if not p.port.endswith("_cache") and p.module != "l0.mlp"]
    (found,) = find_routers(short)
    assert (found.order, found.reach, found.block) == (1, 1, "")


@pytest.mark.parametrize("later", [[], ["model.layers.1.mixer"], ["mtp.0.mixer"]])
def test_behind_the_last_layer_no_attention_follows(later: list[str]) -> None:
    keys = ["model.layers.0.attn#key_cache", "model.layers.0.gate", "model.layers.0", *later, "model.norm", "#logits"]
    made = manifest(dict.fromkeys(keys, 4), facts={"routers": {"model.layers.0.gate": 2}})
    made.points = [msgspec.structs.replace(p, kind="ARouter" if p.module.endswith("gate") else "") for p in made.points]
    (found,) = find_routers(made)
    assert (found.order, found.reach) == (1, 1 if later else len(keys))
    plain = Rerouted([Flip(found.key, 2, ([0], [1]), 0.1, 0.1, found.order, found.reach)])
    assert plain.reached(range(4), order=len(keys) - 1) == ({2} if not later else {2, 3})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9), st.sampled_from([0.0, 1e-4, 1e-2]), st.booleans())
def test_every_other_choice_within_tolerance_is_explained(seed: int, experts: int, noise: float, coarse: bool) -> None:
    """The largest of two logits after an error of e were within 2 e before it: no margin is larger."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(30, experts, generator=generator)
    left = left.bfloat16() if coarse else left
    right = (left.float() + noise * torch.randn(30, experts, generator=generator)).to(left.dtype)
    router = Router("g", max(1, experts // 2), 0, 0)
    flips = trace_flips([router], Pair({"g": (left, right)})).flips
    ours, theirs = (chosen_experts(x.double(), router.chosen) for x in (left, right))
    swapped = (ours != theirs).any(1).nonzero().flatten().tolist()
    assert {f.position for f in flips} >= set(swapped)
    assert all(f.margin <= 2 * f.error for f in flips)
    assert all(f.position in swapped or boundary(left.double()[f.position][None], router.chosen) == 0 or
               boundary(right.double()[f.position][None], router.chosen) == 0 for f in flips)  # fmt: skip
    if noise == 0.0:
        assert flips == []


def test_logits_that_are_off_excuse_nothing() -> None:
    left = logits(1)
    right = left.clone()
    right[3] = -left[3]
    assert traced([GATE], {"l0.mlp.gate": (left, right)}).flips == []


def near_tie(at: int, *, gap: float = 1e-4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two runs whose second and third expert swap at one token."""
    left = torch.tensor([[4.0, 2.0, 1.0, -3.0]]).repeat(6, 1)
    left[at] = torch.tensor([4.0, 2.0 + gap, 2.0, -3.0])
    right = left.clone()
    right[at, 2] += 2 * gap
    return left, right


Sides = dict[str, tuple[torch.Tensor, torch.Tensor]]


def traced(routers: list[Router], sides: Sides) -> Rerouted:
    return trace_flips(routers, Pair(sides))


def test_a_flip_that_does_not_show_excuses_nothing() -> None:
    left, right = near_tie(2)
    same = torch.ones(6, 4)
    for differing, expected in ((2, [2]), (3, [])):
        other = same.clone()
        other[differing] = -1
        found = traced([GATE], {"l0.mlp.gate": (left, right), "l0.mlp": (same, other)})
        assert [f.position for f in found.flips] == expected


@pytest.mark.parametrize("block", [True, False])
def test_equal_logits_may_be_ranked_either_way_where_that_shows(block: bool) -> None:
    tied = torch.tensor([[4.0, 2.0, 2.0, -3.0]]).repeat(2, 1)
    other = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    router = GATE if block else GATE._replace(block="")
    found = traced([router], {"l0.mlp.gate": (tied, tied), "l0.mlp": (torch.ones(2, 2), other)})
    assert [(f.position, f.margin, f.error) for f in found.flips] == ([(1, 0.0, 0.0)] if block else [])


def test_a_flip_reaches_its_own_token_at_once_and_later_ones_from_the_next_attention_on() -> None:
    left, right = near_tie(2)
    second = Router("l1.gate", 2, 20, 30)
    plain = GATE._replace(block="")
    found = traced([second, plain], {"l0.mlp.gate": (left, right), "l1.gate": near_tie(4)})
    assert [(f.router, f.position) for f in found.flips] == [("l0.mlp.gate", 2)]
    assert found.reached(range(6), order=2) == set()
    assert found.reached(range(6), order=3) == found.reached(range(6), order=8) == {2}
    assert found.reached(range(6), order=9) == {2, 3, 4, 5}
    found = traced([plain, second], {"l0.mlp.gate": (left, right), "l1.gate": near_tie(1)})
    assert [(f.router, f.position) for f in found.flips] == [("l0.mlp.gate", 2), ("l1.gate", 1)]
    assert found.reached(range(6), order=21) == {1, 2, 3, 4, 5}
    assert found.describe(order=3).startswith(
        "expert flip at position 2 in l0.mlp.gate: experts 0, 2 instead of 0, 1, margin 0.0001 "
    )


@pytest.mark.parametrize("sides", [{}, {"l0.mlp.gate": (torch.ones(1, 2), torch.ones(1, 2))}], ids=["none", "narrow"])
def test_a_router_that_is_not_shown_or_not_known_is_opaque(sides: Sides) -> None:
    unknown = traced([GATE._replace(chosen=0)], {"l0.mlp.gate": (logits(1), logits(1))})
    for found in (unknown, traced([GATE], sides)):
        assert found.opaque == "l0.mlp.gate"
        assert [found.behind_opaque(n) for n in (2, 3)] == [False, True]


class TopKRouter(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        for name, value in fields.items():
            setattr(self, name, value)


class LinearRouter(nn.Linear):
    top_k = 2


@pytest.mark.parametrize(("module", "count"), [
    (TopKRouter(top_k=3), 3),
    (TopKRouter(top_k=3, num_group=1), 3),
    (TopKRouter(top_k=3, num_group=4), 0),
    (TopKRouter(top_k=3, num_group=4, topk_method="greedy"), 3),
    (TopKRouter(top_k=3, e_score_correction_bias=torch.zeros(2)), 0),
    (TopKRouter(), 0),
    (LinearRouter(2, 2), 0),
    (nn.Linear(2, 2), 0),
])  # fmt: skip
def test_routers_that_choose_by_more_than_their_logits_are_not_known(module: nn.Module, count: int) -> None:
    assert experts_chosen(module) == count


# judging around them


def flip(position: int, *, order: int, reach: int) -> Flip:
    return Flip("g", position, ([0, 1], [0, 2]), 1e-4, 1e-4, order, reach)


FLIPS = Rerouted([flip(2, order=2, reach=8), flip(4, order=20, reach=30)])


def around(failing: set[int], *, order: int, found: Rerouted = FLIPS, **options: Any) -> Finding:
    """Six positions of a point, of which some fail by themselves."""

    def judged(places: list[int]) -> Finding:
        wrong = [p for p in places if p in failing]
        return finding("x", "fail" if wrong else "pass", failing=[(p, p) for p in wrong], metric=options.get("metric"))

    half, after = options.get("half", False), options.get("after", -1)
    return judge_around(found, list(range(6)), order=order, half=half, judged=judged, after=after)


@given(st.sets(st.integers(0, 5)), st.sampled_from([1, 3, 9, 21, 31]))
def test_it_is_inconclusive_exactly_where_all_that_fails_is_reached(failing: set[int], order: int) -> None:
    reached = FLIPS.reached(range(6), order=order)
    found = around(failing, order=order)
    expected = "pass" if not failing else "inconclusive" if failing <= reached else "fail"
    assert found.verdict == expected
    shown = failing if expected == "inconclusive" else failing - reached
    assert {p for first, last in found.failing for p in range(first, last + 1)} == shown
    assert ("expert flip at position 2" in found.message) == (expected == "inconclusive")


def test_what_was_put_right_since_a_flip_is_not_behind_it() -> None:
    assert around({2}, order=21).verdict == around({4}, order=21, after=9).verdict == "inconclusive"
    assert around({2}, order=21, after=9).verdict == "fail"
    assert "position 2" not in around({4}, order=21, after=9).message


def test_a_value_that_is_no_number_is_excused_by_no_flip() -> None:
    assert around({2}, order=3, metric="nonfinite_mismatch").verdict == "fail"
    opaque = Rerouted(opaque="g", opaque_order=2)
    assert around({2}, order=3, metric="nonfinite_mismatch", found=opaque, half=True).verdict == "fail"
    assert [around({2}, order=3, found=opaque, half=h).verdict for h in (True, False)] == ["inconclusive", "fail"]


def test_logits_that_are_no_numbers_are_no_flip() -> None:
    left, right = near_tie(2)
    right[2, 0] = float("nan")
    lenient = Lenient({"l0.mlp.gate": (left, right)})
    assert trace_flips([GATE._replace(block="")], lenient).flips == []
    right[2, 0] = left[2, 0]
    assert [f.position for f in trace_flips([GATE._replace(block="")], lenient).flips] == [2]


def test_an_excuse_holds_for_all_positions_or_not_at_all() -> None:
    assert "flip at position 2" in FLIPS.excuse([2], order=3, half=False)
    assert FLIPS.excuse([2, 3], order=3, half=True) == FLIPS.excuse([], order=3, half=True) == ""
    assert "not known" in Rerouted(opaque="g", opaque_order=2).excuse([1], order=3, half=True)


# two runs of a case


def views(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[View, View]:
    """Two runs: what ``changes`` says of the second one is ``{point: {position: row}}``, and the logits of routers."""
    shapes = {k: (6, w) if isinstance(w, int) else (6, *w) for k, w in KEYS.items()}
    rows = {
        k: torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, (k, shape) in enumerate(shapes.items())
    }
    rows["l0.mlp.gate"] = changes.get("gate", near_tie(2))[0]
    other = {k: t.clone() for k, t in rows.items()}
    other["l0.mlp.gate"] = changes.get("gate", near_tie(2))[1]
    for key, positions in changes.get("differing", {}).items():
        for position in positions:
            other[key][position] += 1
    case, made = Case(id="a", tokens=(1, 2, 3, 4, 5), new_tokens=2), []
    for number, tensors in enumerate((rows, other)):
        steps = [([Segment(0, 0, 6)], {k: t.to(dtype) for k, t in tensors.items()})]
        generated = {"a": [3, 1 + number * changes.get("flipped", 0)]}
        name = str(dtype).removeprefix("torch.")
        made.append(write_capture(folder / f"{number}", steps, cases=[case], generated=generated, dtype=name))
    reference = names(chosen=changes.get("chosen", 2))
    return View(made[0], reference), View(made[1], reference)


def scene(pair: tuple[View, View], *, chosen: int = 2) -> Scene:
    reference = names(chosen=chosen)
    return Scene(
        base=pair[0],
        varied=pair[1],
        cases=("a", "a"),
        graph=Graph(reference),
        allow=lambda dtypes, depth: reordering(dtypes, depth=depth, terms=64),
        check="batching",
        condition="together",
        routers=tuple(find_routers(reference)),
    )


def judged(made: Scene) -> dict[str, Finding]:
    return {f.point: f for f in compare_views(made)}


BEHIND = {"l0.mlp": [2], "l0.mlp.experts": [2], "l0": [2], "l1.attn.q": [2], "l1.attn#key_cache": [2]}
LATER = {"l1.attn.o": [2, 3, 5], "#logits": [2, 4]}


def test_what_a_flip_reaches_is_inconclusive_and_told(tmp_path: Path) -> None:
    found = judged(scene(views(tmp_path, differing=BEHIND | LATER, gate=near_tie(2, gap=1e-7))))
    assert {k for k, f in found.items() if f.verdict == "inconclusive"} == BEHIND.keys() | LATER.keys()
    assert {f.verdict for k, f in found.items() if k not in BEHIND | LATER} == {"pass"}
    assert found["l0.mlp"].message.startswith(
        "together: 1 of 6 positions are behind an expert flip at position 2 in l0.mlp.gate: experts"
    )
    assert "4 of 6 positions" in found["l1.attn.o"].message


@pytest.mark.parametrize(("key", "position"), [
    ("l0.mlp", 3), ("l0.mlp", 1), ("l1.attn#key_cache", 4), ("l1.attn.o", 1), ("l0.attn.o", 2), ("l0.mlp.gate", 0),
])  # fmt: skip
def test_what_it_does_not_reach_fails(tmp_path: Path, key: str, position: int) -> None:
    differing: dict[str, list[int]] = {"l0.mlp": [2]}
    differing = differing | {key: [*differing.get(key, []), position]}
    found = judged(scene(views(tmp_path, differing=differing, gate=near_tie(2, gap=1e-7))))
    assert found[key].verdict == "fail"
    assert found[key].failing == [(position, position)]


def test_rows_behind_a_flip_that_are_right_all_the_same_pass(tmp_path: Path) -> None:
    found = judged(scene(views(tmp_path, differing={"l0.mlp": [2]}, gate=near_tie(2, gap=1e-7))))
    assert {k for k, f in found.items() if f.verdict != "pass"} == {"l0.mlp"}
    assert found["#logits"].positions == (0, 5)


def test_experts_that_change_with_logits_that_do_not_are_a_failure(tmp_path: Path) -> None:
    """Swapped experts, shares that are wrong: nothing in the router says why."""
    found = judged(scene(views(tmp_path, differing={"l0.mlp": [2]}, gate=(logits(3), logits(3)))))
    assert found["l0.mlp"].verdict == "fail"


@pytest.mark.parametrize(("dtype", "verdict"), [(torch.bfloat16, "inconclusive"), (torch.float32, "fail")])
def test_behind_an_opaque_router_half_precision_is_inconclusive(
    tmp_path: Path, dtype: torch.dtype, verdict: str
) -> None:
    made = views(tmp_path, differing={"l0.mlp": [2], "l0.attn.o": [1]}, dtype=dtype, gate=(logits(3), logits(3)))
    found = judged(scene(made, chosen=0))
    assert (found["l0.mlp"].verdict, found["l0.attn.o"].verdict) == (verdict, "fail")
    assert ("whose choice of experts is not known" in found["l0.mlp"].message) == (verdict == "inconclusive")


@pytest.mark.parametrize(("gate", "verdict"), [(near_tie(2, gap=1e-7), "inconclusive"), ((logits(3),) * 2, "fail")])
def test_a_token_chosen_behind_a_flip_is_inconclusive(
    tmp_path: Path, gate: tuple[torch.Tensor, torch.Tensor], verdict: str
) -> None:
    made = scene(views(tmp_path, differing={"l0.mlp": [2], "#logits": [5]}, gate=gate, flipped=1))
    found = compare_tokens(made)
    assert found is not None
    assert found.verdict == verdict
    assert ("behind an expert flip" in found.message) == (verdict == "inconclusive")
