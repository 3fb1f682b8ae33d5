"""What a run is fed: rules turned round for every layout, rows found by case and position, nothing written in place."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.captures.feed import FedPoint, Feed, Fill, fully_fed
from paritykit.captures.feeder import Feeder, check_feed, make_feeder
from paritykit.captures.manifest import Manifest, Segment
from paritykit.captures.manifest import Part as Written
from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.errors import CaptureFormatError, UnknownNameError, UsageError
from paritykit.mapping.feeding import can_feed, make_feed
from paritykit.mapping.rules import Block, Part, Rule, fused_blocks
from paritykit.mapping.transform import apply_rule
from tests.made import manifest, points, side, write_capture
from tests.unit.test_mapping_transform import loaded, merged, qkv

LENGTH = 7
CASES = [Case(id="a", tokens=(1, 2, 3, 4), new_tokens=4), Case(id="b", tokens=(9, 8), new_tokens=1)]


@given(qkv() | merged())
@settings(deadline=None, max_examples=100)
def test_every_rank_is_fed_what_it_would_hold(layout: tuple[list[Part], int]) -> None:
    """The parts of a fused tensor, those that several ranks hold included."""
    parts, ranks = layout
    wholes, held = loaded(parts, ranks)
    theirs = Manifest(side=side(), cases=[], points=points({"fused": sum(p.local for p in parts)}, ranks=ranks))
    ours = manifest({f"part{n}": p.total for n, p in enumerate(parts)})
    rules = [
        Rule(reference=f"part{n}", candidate="fused", blocks=fused_blocks(parts, ranks=range(ranks), wanted=n))
        for n in range(len(parts))
    ]
    feed = make_feed(rules, reference=ours, folder=Path("ref"), candidate=theirs)
    assert {(p.point, p.rank) for p in feed.points} == {("fused", rank) for rank in range(ranks)}
    for fed in feed.points:
        made = torch.full_like(held[fed.rank], math.nan)
        for fill in fed.fills:
            source = wholes[int(fill.source.removeprefix("part"))]
            made[:, fill.start : fill.start + fill.length] = source[:, fill.first : fill.first + fill.length]
        assert torch.equal(made, held[fed.rank])


def test_shards_and_whole_tensors_on_the_ranks_of_a_stage() -> None:
    theirs = manifest({"x": 4, "y": 8})
    theirs.points = [msgspec.structs.replace(p, rank=rank) for rank in (2, 3) for p in theirs.points]
    rules = [
        Rule(reference="x", candidate="x", blocks=(Block(2, 0, 4), Block(3, 0, 4))),
        Rule(reference="y", candidate="y"),
    ]
    feed = make_feed(rules, reference=manifest({"x": 8, "y": 8}), folder=Path("ref"), candidate=theirs)
    assert set(feed.points) == {
        FedPoint("x", 2, (Fill("x", 0, 0, 4),)),
        FedPoint("x", 3, (Fill("x", 4, 0, 4),)),
        FedPoint("y", 2, (Fill("y", 0, 0, 8),)),
        FedPoint("y", 3, (Fill("y", 0, 0, 8),)),
    }


def test_what_stands_twice_is_fed_once() -> None:
    """One input of three projections, where the candidate has one for all."""
    ours, theirs = manifest({"q#input": 4, "k#input": 4, "q": 3}), manifest({"qkv#input": 4, "qkv": 5})
    rules = [Rule(reference=f"{n}#input", candidate="qkv#input") for n in "qk"]
    rules.append(Rule(reference="q", candidate="qkv", blocks=(Block(0, 1, 3),)))
    feed = make_feed(rules, reference=ours, folder=Path("ref"), candidate=theirs)
    assert [p.fills for p in feed.points] == [(Fill("q#input", 0, 0, 4),), (Fill("q", 0, 1, 3),)]


@pytest.mark.parametrize(
    ("rule", "can"),
    [
        (Rule(reference="a", candidate="b"), True),
        (Rule(reference="a#input", candidate="b#input"), True),
        (Rule(reference="a#key_cache", candidate="b#key_cache"), False),
        (Rule(reference="#logits", candidate="#logits"), False),
        (Rule(reference="a", candidate="b", plus="c"), False),
        (Rule(reference="a", candidate="b", transpose=True), False),
    ],
)
def test_which_rules_can_be_turned_round(rule: Rule, can: bool) -> None:
    assert can_feed(rule) is can


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """Rows that say where they are from, ``case * 100 + position``; recorded in a prefill and single steps."""

    def rows(case: int, start: int, count: int) -> torch.Tensor:
        return (case * 100 + torch.arange(start, start + count, dtype=torch.float32))[:, None] + torch.arange(6) / 8

    steps = [([Segment(0, 0, 4)], {"x": rows(0, 0, 4)}), ([Segment(1, 0, 2)], {"x": rows(1, 0, 2)})]
    steps += [([Segment(0, n, 1)], {"x": rows(0, n, 1)}) for n in (4, 5, 6)]
    return write_capture(tmp_path_factory.mktemp("ref") / "x", steps, cases=CASES)


def feeder(reference: Capture, *fills: Fill) -> Feeder:
    feed = Feed(str(reference.path), (FedPoint("y", 0, fills),))
    found = make_feeder(feed, CASES)
    assert found is not None
    return found


@st.composite
def stretches(draw: st.DrawFn) -> list[Segment]:
    """Any stretches of both cases, in any order."""
    found = []
    for case, length in draw(st.permutations([(0, LENGTH), (1, 2)])):
        start = draw(st.integers(0, length - 1))
        found.append(Segment(case, start, draw(st.integers(1, length - start))))
    return found[: draw(st.integers(1, 2))] * draw(st.integers(1, 3))  # draws hold one case several times


@given(stretches(), st.sampled_from(["[t,f]", "[1,t,f]", "[t,2,f/2]", "[t+pad,f]"]), st.booleans())
@settings(deadline=None)
def test_rows_are_those_of_the_same_case_and_position(
    reference: Capture, segments: list[Segment], shape: str, half: bool
) -> None:
    found = feeder(reference, Fill("x", 2, 1, 3), Fill("x", 0, 4, 1))
    found.begin(segments)
    count = sum(s.length for s in segments)
    own = torch.full((count + (2 if "pad" in shape else 0), 6), -1.0, dtype=torch.bfloat16 if half else torch.float32)
    given_ = {"[1,t,f]": own[None], "[t,2,f/2]": own.view(count, 2, 3) if "pad" not in shape else own}.get(shape, own)
    before = given_.clone()
    made = found.value("y", given_, lambda t, key: (t[0] if shape == "[1,t,f]" else t)[:count])
    assert made is not None
    assert torch.equal(given_, before)
    assert (made.shape, made.dtype) == (given_.shape, given_.dtype)
    places = [s.case * 100 + s.start + n for s in segments for n in range(s.length)]
    wanted = torch.full((count, 6), -1.0)
    wanted[:, 1:4] = torch.tensor(places)[:, None] + torch.tensor([2, 3, 4]) / 8
    wanted[:, 4] = torch.tensor(places).float()
    rows = made.reshape(-1, 6)
    assert torch.equal(rows[:count], wanted.to(rows.dtype))
    assert (rows[count:] == -1).all()
    assert found.fed == ["y"]


def test_rows_that_the_other_capture_lacks_stay_and_are_told(reference: Capture) -> None:
    found = feeder(reference, Fill("x", 0, 0, 6))
    found.begin([Segment(1, 0, 4)])
    made = found.value("y", torch.full((4, 6), -1.0), lambda t, key: t)
    assert made is not None
    assert made[:, 0].tolist() == [100, 101, -1, -1]
    assert found.fed == []


def test_what_is_not_fed_is_left_alone(reference: Capture) -> None:
    found = feeder(reference, Fill("x", 0, 0, 6))
    found.begin([Segment(1, 0, 2)])
    assert found.value("other", torch.zeros(2, 6), lambda t, key: t) is None
    assert found.value("y", torch.zeros(2, 6), lambda t, key: None) is None
    assert found.fed == []
    assert found.value("y", torch.zeros(2, 6), lambda t, key: t) is not None
    assert found.fed == []  # it was missed once


def test_rows_that_lie_scattered_in_a_tensor_are_not_fed(reference: Capture) -> None:
    found, kept = feeder(reference, Fill("x", 0, 0, 6)), torch.zeros(2, 6)
    found.begin([Segment(1, 0, 2)])
    assert found.value("y", kept, lambda t, key: t * 1) is None
    assert found.fed == []
    assert not kept.any()


def test_what_could_not_be_put_back_is_not_fed(reference: Capture) -> None:
    found = feeder(reference, Fill("x", 0, 0, 6))
    found.begin([Segment(1, 0, 2)])
    found.value("y", torch.zeros(2, 6), lambda t, key: t)
    assert found.fed == ["y"]
    found.refuse("y")
    assert found.fed == []


@pytest.mark.parametrize(
    ("tensor", "rows", "said"),
    [
        (torch.zeros(2, 5), lambda t, key: t, "not those it is to be fed"),
        (torch.zeros(3, 6), lambda t, key: t, "not those it is to be fed"),
    ],
)
def test_other_shapes_are_refused_before_anything_is_written(
    reference: Capture, tensor: torch.Tensor, rows: object, said: str
) -> None:
    found = feeder(reference, Fill("x", 0, 0, 6))
    found.begin([Segment(1, 0, 2)])
    with pytest.raises(ValueError, match=said):
        found.value("y", tensor, rows)  # type: ignore[arg-type]
    assert not tensor.any()


def fed_by(reference: Capture, *fills: Fill, folder: str = "") -> Feed:
    return Feed(folder or str(reference.path), (FedPoint("y", 0, fills),))


def test_a_feed_is_seen_through_before_an_engine_is_touched(reference: Capture, tmp_path: Path) -> None:
    check_feed(fed_by(reference, Fill("x", 0, 0, 6)), CASES)
    with pytest.raises(UnknownNameError, match="did you mean"):
        check_feed(fed_by(reference, Fill("xx", 0, 0, 6)), CASES)
    with pytest.raises(UsageError, match="y cannot be fed columns 4:7 of x, which has 6"):
        check_feed(fed_by(reference, Fill("x", 4, 0, 3)), CASES)
    with pytest.raises(UsageError, match="cannot be fed columns"):
        check_feed(fed_by(reference, Fill("x", 0, 0, 0)), CASES)
    with pytest.raises(UsageError, match="cannot feed case 'c'"):
        check_feed(fed_by(reference, Fill("x", 0, 0, 6)), [Case(id="c", tokens=(1,))])
    with pytest.raises(UsageError, match="cannot feed case 'a'"):
        check_feed(fed_by(reference, Fill("x", 0, 0, 6)), [Case(id="a", tokens=(1, 2, 3, 5))])
    with pytest.raises(CaptureFormatError, match="no such folder"):
        check_feed(fed_by(reference, Fill("x", 0, 0, 6), folder=str(tmp_path / "none")), CASES)
    assert make_feeder(None, CASES) is None


def test_a_point_is_fed_where_all_its_ranks_say_so() -> None:
    fills = (Fill("x", 0, 0, 6),)
    feed = Feed(
        "ref", (FedPoint("y", 0, fills), FedPoint("y", 1, fills), FedPoint("z", 1, fills), FedPoint("w", 2, fills))
    )
    assert fully_fed(feed, [Written(fed=["y"]), Written(fed=["y", "z", "w"])]) == ["y", "z"]
    assert fully_fed(feed, [Written(), Written(fed=["y", "z"])]) == ["z"]


def test_a_fed_point_reads_back_through_its_rule(reference: Capture) -> None:
    """The inverse: what was filled in by a rule is what the rule takes out."""
    rule = Rule(reference="x", candidate="y", blocks=(Block(0, 3, 4), Block(0, 0, 2)))
    feed = make_feed([rule], reference=reference.manifest, folder=reference.path, candidate=manifest({"y": 9}))
    found = make_feeder(feed, CASES)
    assert found is not None
    found.begin([Segment(0, 1, 3)])
    made = found.value("y", torch.zeros(3, 9), lambda t, key: t)
    assert made is not None
    assert torch.equal(apply_rule(rule, lambda key, rank: made), reference.rows("x", "a")[1:4])
