"""Points that only some ranks have: stages of a pipeline, each of one rank or of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from paritykit.captures.manifest import Manifest, Point, Segment, leading_points, module_ranks, split_key
from paritykit.comparison.align import pairs
from paritykit.diagnose.locate import Graph
from paritykit.errors import UnknownNameError
from paritykit.mapping.build import Mapping, build_mapping
from paritykit.mapping.rules import Block
from paritykit.mapping.user import UserRule
from paritykit.provenance.weightmap import Landing, Span
from tests.made import manifest, write_capture

OURS = {"embed": 4, "a.q": 4, "a.k": 2, "a.o": 4, "b.q": 4, "b.k": 2, "b.o": 4, "norm": 4}
PART = [{"total": 4, "local": 2, "replicas": 1}, {"total": 2, "local": 2, "replicas": 2}]
FACTS: dict[str, Any] = {
    "modules": ["embed", "a.qk", "a.o", "b.qk", "b.o", "norm"],
    "fused": {"a.qk": PART, "b.qk": PART},
    "names": {f"{layer}.{n}.weight": (f"{layer}.qk.weight", "qk".index(n).__str__()) for layer in "ab" for n in "qk"},
}
OURS_FACTS = {"parameters": {f"{m}.weight": f"{m}.weight" for m in OURS}}


def staged(*stages: dict[str, int], ranks: int = 1, facts: dict[str, Any] | None = None) -> Manifest:
    """A manifest whose stage ``n`` recorded the points in ``stages[n]``, on each of its ranks."""
    made = manifest({}, facts=facts)
    points = []
    for rank in range(len(stages) * ranks):
        for key, width in stages[rank // ranks].items():
            module, port, call = split_key(key)
            points.append(Point(module=module, port=port, call=call, rank=rank, dtype="float32", row=[width]))
    return msgspec.structs.replace(made, points=points)


FIRST, LAST = {"embed": 4, "a.qk": 4, "a.o": 4}, {"b.qk": 4, "b.o": 4, "norm": 4}


def built(*stages: dict[str, int], ranks: int, user: list[UserRule] | None = None, **facts: Any) -> Mapping:
    candidate = staged(*stages, ranks=ranks, facts={**FACTS, **facts})
    return build_mapping(manifest(OURS, facts=OURS_FACTS), candidate, user=user)


def blocks(mapping: Mapping) -> dict[str, tuple[Block, ...]]:
    return {r.reference: r.blocks for r in mapping.rules}


def test_the_ranks_of_a_point_and_the_first_of_them() -> None:
    made = staged(FIRST, LAST, ranks=2)
    assert list(leading_points(made.points)) == [*FIRST, *LAST]
    ranks = dict.fromkeys(FIRST, 0) | dict.fromkeys(LAST, 2)
    assert {k: p.rank for k, p in leading_points(made.points).items()} == ranks
    assert module_ranks(made.points) == {key: [rank, rank + 1] for key, rank in ranks.items()}
    backwards = leading_points(reversed(made.points))
    assert {k: p.rank for k, p in backwards.items()} == ranks


def test_fused_parts_are_those_of_the_ranks_of_their_stage() -> None:
    mapping = built(FIRST, LAST, ranks=2)
    assert mapping.unmatched == []
    assert blocks(mapping) == {
        "embed": (), "a.o": (), "b.o": (), "norm": (),
        "a.q": (Block(0, 0, 2), Block(1, 0, 2)), "a.k": (Block(0, 2, 2),),
        "b.q": (Block(2, 0, 2), Block(3, 0, 2)), "b.k": (Block(2, 2, 2),),
    }  # fmt: skip


def test_shards_by_size_alone_are_those_of_the_ranks_of_their_stage() -> None:
    mapping = built({**FIRST, "embed": 2}, {**LAST, "norm": 2, "b.o": 3}, ranks=2)
    found = blocks(mapping)
    assert found["embed"] == (Block(0, 0, 2), Block(1, 0, 2))
    assert found["norm"] == (Block(2, 0, 2), Block(3, 0, 2))
    (misfit,) = mapping.misfits
    assert misfit.message == "4 features against 3 on each of 2 rank(s) of b.o"


def test_weights_say_the_rank_and_agree_with_what_is_declared() -> None:
    landings = [
        Landing(tensor=f"{layer}.{n}.weight", parameter=f"{layer}.qk.weight", rank=rank, axes=(0, 1),
                source=(Span(first, 2), Span(0, 8)), target=(Span(start, 2), Span(0, 8)))
        for stage, layer in enumerate("ab")
        for rank in (2 * stage, 2 * stage + 1)
        for n, first, start in (("q", 2 * (rank % 2), 0), ("k", 0, 2))
    ]  # fmt: skip
    landings += [
        Landing(tensor="norm.weight", parameter="norm.weight", rank=rank, axes=(0,),
                source=(Span(0, 4),), target=(Span(0, 4),))
        for rank in (2, 3)
    ]  # fmt: skip
    features = {t.tensor: 0 for t in landings}
    candidate = staged(FIRST, LAST, ranks=2, facts={**FACTS, "landings": msgspec.to_builtins(landings)})
    mapping = build_mapping(manifest(OURS, facts={**OURS_FACTS, "features": features}), candidate)
    assert mapping.disagreements == []
    assert blocks(mapping)["b.q"] == (Block(2, 0, 2), Block(3, 0, 2))
    assert blocks(mapping)["norm"] == ()
    swapped = [msgspec.structs.replace(x, rank=x.rank ^ 1) if x.tensor == "b.q.weight" else x for x in landings]
    candidate = staged(FIRST, LAST, ranks=2, facts={**FACTS, "landings": msgspec.to_builtins(swapped)})
    mapping = build_mapping(manifest(OURS, facts={**OURS_FACTS, "features": features}), candidate)
    assert [d.reference for d in mapping.disagreements] == ["b.q"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rule_of_the_users_means_the_ranks_of_the_stage(ranks: int) -> None:
    rule = UserRule(reference="norm", candidate="b.qk", columns=(0, 4))
    assert blocks(built(FIRST, LAST, ranks=ranks, user=[rule]))["norm"] == (Block(ranks, 0, 4),)


def test_rows_are_read_from_the_stage_that_has_them(tmp_path: Path) -> None:
    step, wide = [Segment(0, 0, 2)], torch.arange(8.0).reshape(2, 4)
    first = [(step, {"embed": wide})]
    last = [(step, {"norm": wide[:, half] + 10}) for half in (slice(0, 2), slice(2, 4))]
    capture = write_capture(tmp_path / "theirs", first, first, [last[0]], [last[1]])
    reference = write_capture(tmp_path / "ours", [(step, {"embed": wide, "norm": wide + 10})])
    mapping = build_mapping(reference.manifest, capture.manifest)
    assert len(mapping.rules) == 2
    for rule in mapping.rules:
        for _, left, right in pairs(rule, reference, capture, "a"):
            assert torch.equal(left, right), rule
    assert capture.point("norm").rank == 2
    assert torch.equal(capture.rows("norm", "a"), wide[:, :2] + 10)
    assert torch.equal(capture.rows("norm", "a", rank=3), wide[:, 2:] + 10)
    with pytest.raises(UnknownNameError, match="unknown rank of norm '0'"):
        capture.point("norm", rank=0)


def test_a_pipeline_as_the_reference_is_seen_whole_and_in_order() -> None:
    reference = staged({"embed": 4, "a.o": 4}, {"b.o": 4, "norm": 4})
    graph = Graph(reference)
    assert [graph.order(k) for k in ("embed", "a.o", "b.o", "norm")] == [0, 1, 2, 3]
    mapping = build_mapping(reference, manifest({"embed": 4, "a.o": 4, "b.o": 4, "norm": 4}))
    assert [r.reference for r in mapping.rules] == ["embed", "a.o", "b.o", "norm"]
