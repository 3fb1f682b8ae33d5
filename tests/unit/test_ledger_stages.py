"""The ledger of a pipeline: quiet on clean stages of one rank and of several, and it sees what goes wrong between."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paritykit.ledger.expect import expect
from paritykit.ledger.judge import judge_weights
from paritykit.ledger.problems import find_problems
from paritykit.ledger.subject import WeightSubject
from paritykit.provenance.weightmap import RankLedger, WeightMap
from tests.weights import Fault, Toy, altered, dropped, judged, ledgers, problems

STAGES = [2, 3]
K = "layers.1.attn.k_proj.weight"


@pytest.mark.parametrize("toy", [Toy(), Toy(tied=True), Toy(transposed=True), Toy(kv_heads=1), Toy(vocab=4)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stages", STAGES)
def test_a_clean_pipeline_is_quiet(toy: Toy, ranks: int, stages: int) -> None:
    found = judged(replace(toy, ranks=ranks, stages=stages))
    assert {f.verdict for f in found.findings} == {"pass"}
    assert found.coverage.compared == len(toy.shapes())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tensor_that_no_stage_loads(ranks: int) -> None:
    toy = Toy(ranks=ranks, stages=3)
    found = problems(toy, fault=dropped(K))
    assert [p.message for p in found if p.name == K] == [f"{K} was handed to the loader and ignored"]
    unwritten = [(p.code, p.rank) for p in found if p.name == "layers.1.attn.qkv_proj.weight"]
    assert unwritten == [("unwritten", ranks + r) for r in range(ranks)]


def test_a_tensor_that_no_stage_is_handed() -> None:
    toy = Toy(stages=2)
    everyone = ledgers(toy)
    without = toy.expected().tensors | {"layers.1.odd": ((3,), "float32")}
    (found,) = find_problems(WeightSubject(everyone, toy.expected(tensors=without)))
    assert (found.code, found.message) == ("unread", "layers.1.odd was not even read by the loader")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stage_that_loads_the_layers_before_its_own(ranks: int) -> None:
    """Off by one at the border: layer 1 is on both stages, under another name on the second; the last is nowhere."""
    toy = Toy(ranks=ranks, stages=2, layers=4)

    def load(stage: int, name: str) -> str:
        number = int(name.split(".")[1]) if name.startswith("layers.") else 0
        return name.replace(f"layers.{number}.", f"layers.{number + 1}.") if stage and number else name

    shifted: Fault = lambda name, tensor, rank: (load(1, name), tensor, rank)  # noqa: E731
    first = ledgers(toy)[:ranks]
    last = ledgers(replace(toy), fault=lambda n, t, r: None if n.startswith("layers.3") else shifted(n, t, r))[ranks:]
    found = find_problems(WeightSubject([*first, *last], toy.expected()))
    codes = {(p.name, p.code) for p in found}
    assert ("layers.1.norm.weight", "written-twice") in codes
    assert ("layers.3.norm.weight", "unread") in codes
    text = next(p.message for p in found if p.name == "layers.1.norm.weight")
    assert text == f"layers.1.norm.weight fills layers.1.norm.weight on rank 0 and layers.2.norm.weight on rank {ranks}"


def test_a_rank_that_holds_anothers_shard_on_the_second_stage() -> None:
    toy = Toy(ranks=2, stages=2, layers=4)
    fault = altered("3.mlp.gate", rank_of=lambda r: 0)
    named = [p for p in problems(toy, fault=fault) if p.name == "layers.3.mlp.gate_proj.weight"]
    assert named[0].message == "rank 3 holds the same shard of layers.3.mlp.gate_proj.weight as rank 2"
    assert named[0].rank == 3
    other = [p.message for p in problems(toy, fault=altered("3.mlp.gate", rank_of=lambda r: 1 - r))]
    assert any("do not follow the ranks" in text for text in other)


def test_a_layer_that_is_laid_out_otherwise_is_found_among_stages_of_other_sizes() -> None:
    toy = Toy(stages=2, layers=5)
    assert problems(toy) == []
    found = problems(toy, fault=altered("layers.4.norm", lambda t: t.flip(0)))
    assert {p.name for p in found} == {"layers.4.norm.weight"}


def test_rules_are_those_of_every_stage() -> None:
    def ledger(rank: int, name: str) -> RankLedger:
        part = {"total": 4, "local": 4, "replicas": 1}
        names: dict[str, tuple[str, str] | None] = {f"{name}.q": (f"{name}.qkv", "q"), f"{name}.gone": None}
        return RankLedger(rank=rank, stage=rank, found=WeightMap(), names=names, fused={f"{name}": [part]})

    expected = expect({}, ledgers=[ledger(0, "a"), ledger(1, "b")])
    assert expected.declared == {"a.q": ("a.qkv", 0), "b.q": ("b.qkv", 0)}
    assert set(expected.fused) == {"a", "b"}


def test_an_error_of_one_stage_is_told() -> None:
    toy = Toy(stages=2)
    first, last = ledgers(toy)
    failed = RankLedger(rank=1, stage=1, found=last.found, error="ValueError: planted")
    judged = judge_weights(WeightSubject([first, failed], toy.expected()))
    assert not judged.findings
    (skipped,) = judged.coverage.skipped
    assert (skipped.point, skipped.reason) == ("rank 1", "the loader was not traced: ValueError: planted")
