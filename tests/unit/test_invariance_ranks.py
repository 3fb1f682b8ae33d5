"""What several ranks have must be the same on each; their weights together must be the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from paritykit.captures.manifest import Manifest, Segment
from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.diagnose.locate import Graph
from paritykit.errors import EngineError, UsageError
from paritykit.invariance.compare import View
from paritykit.invariance.laboratory import Laboratory
from paritykit.invariance.pool import EnginePool
from paritykit.invariance.ranks import first_difference, replica_findings, replicas, weight_findings
from paritykit.invariance.trial import Trial
from paritykit.ledger.judge import Judged
from paritykit.results import Coverage, Unmatched
from tests.made import finding, manifest, write_capture

CASE = Case(id="a", tokens=(1, 2, 3))
WHOLE, SHARDED, KEY = "norm", "mlp.gate", "attn#key_cache"
NAMES = manifest({WHOLE: 4, SHARDED: 8, KEY: [2, 4], "#logits": 6})
GRAPH = Graph(NAMES)


def ranks(count: int) -> list[dict[str, torch.Tensor]]:
    """The points as ``count`` ranks have them: two key heads, however many ranks there are."""
    generator = torch.Generator().manual_seed(0)
    whole = {n: torch.randn(3, *r, generator=generator) for n, r in {WHOLE: (4,), KEY: (2, 4), "#logits": (6,)}.items()}
    gate = torch.randn(3, 8, generator=generator).chunk(count, dim=1)
    return [
        {**whole, SHARDED: gate[n], KEY: whole[KEY][:, n * 2 // count : n * 2 // count + max(1, 2 // count)]}
        for n in range(count)
    ]


def view(folder: Path, found: list[dict[str, torch.Tensor]], *, size: int) -> View:
    steps = [[([Segment(0, 0, 3)], tensors)] for tensors in found]
    capture = write_capture(folder, *steps, cases=[CASE])
    side = msgspec.structs.replace(capture.manifest.side, parallel={"tensor_parallel_size": size})
    told = msgspec.structs.replace(capture.manifest, side=side)
    return View(Capture(capture.path, told), NAMES)


def judged(seen: View) -> Any:
    (found,) = replica_findings(seen, GRAPH, pairs=(("a~", "a"),), check="tensor_parallel", condition="on ranks")
    return found


@pytest.mark.parametrize(("count", "pairs"), [
    (1, []),
    (2, [(WHOLE, 1, 0), ("#logits", 1, 0)]),
    (4, [(WHOLE, n, 0) for n in (1, 2, 3)] + [(KEY, 1, 0), (KEY, 3, 2)] + [("#logits", n, 0) for n in (1, 2, 3)]),
])  # fmt: skip
def test_what_is_on_several_ranks_is_found_from_the_mapping(
    tmp_path: Path, count: int, pairs: list[tuple[str, int, int]]
) -> None:
    seen = view(tmp_path / "c", ranks(count), size=count)
    assert sorted((r.key, r.rank, r.other) for r in replicas(seen)) == sorted(pairs)
    if count > 1:
        found = judged(seen)
        assert (found.verdict, found.value, found.case, found.point) == ("pass", 0.0, "a~", "#replicas")
    else:
        assert replica_findings(seen, GRAPH, pairs=(("a", "a"),), check="c", condition="d") == []


@pytest.mark.parametrize(("key", "rank", "told"), [
    (WHOLE, 1, "norm differs between ranks 0 and 1, from position 2 on"),
    (KEY, 3, "attn#key_cache differs between ranks 2 and 3, from position 2 on"),
    (SHARDED, 1, ""),
])  # fmt: skip
def test_one_bit_on_one_rank_is_told(tmp_path: Path, key: str, rank: int, told: str) -> None:
    found = ranks(4)
    wrong = found[rank][key].clone()
    wrong[2].view(-1)[0] = torch.nextafter(wrong[2].view(-1)[0], torch.tensor(9.0))
    found[rank] = {**found[rank], key: wrong}
    seen = judged(view(tmp_path / "c", found, size=4))
    assert (seen.verdict == "fail") == bool(told)
    if told:
        assert seen.message == f"on ranks: {told}"
        assert (seen.order, seen.origin, seen.value) == (GRAPH.order(key), "introduced", 1.0)


def test_the_first_of_several_is_told_and_the_others_counted(tmp_path: Path) -> None:
    found = ranks(4)
    found[2] = {**found[2], WHOLE: found[2][WHOLE] + 1, "#logits": -found[2]["#logits"]}
    found[1] = {**found[1], WHOLE: found[1][WHOLE] + 1}
    seen = judged(view(tmp_path / "c", found, size=4))
    assert "norm differs between ranks 0 and 1, 0 and 2, from position 0 on; so do 1 more of 3 points" in seen.message
    assert seen.value == 2.0


def test_signs_of_zero_and_of_nothing_count_as_bits(tmp_path: Path) -> None:
    found = ranks(2)
    for tensors in found:
        tensors[WHOLE] = torch.full((3, 4), float("nan"))
    assert judged(view(tmp_path / "same", found, size=2)).verdict == "pass"
    found[0][WHOLE], found[1][WHOLE] = torch.zeros(3, 4), -torch.zeros(3, 4)
    assert judged(view(tmp_path / "other", found, size=2)).verdict == "fail"


def test_a_rank_that_lacks_positions_differs(tmp_path: Path) -> None:
    whole = torch.ones(3, 4)
    steps = [[([Segment(0, 0, n)], {WHOLE: whole[:n]})] for n in (3, 2)]
    seen = View(write_capture(tmp_path / "c", *steps, cases=[CASE]), NAMES)
    told = msgspec.structs.replace(seen.capture.manifest.side, parallel={"tensor_parallel_size": 2})
    seen.capture.manifest.side = told
    (replica,) = replicas(seen)
    assert first_difference(seen.capture, replica, "a") == 0


def test_stages_are_no_replicas(tmp_path: Path) -> None:
    """Two stages of one rank each show the model around their layers, each its own part of it."""
    found = ranks(2)
    found[1] = {WHOLE: found[1][WHOLE] + 1}
    assert list(replicas(view(tmp_path / "c", [found[0] | {SHARDED: torch.ones(3, 8)}, found[1]], size=1))) == []


def weights(*failing: tuple[str, str]) -> Judged:
    found = [finding(n, "fail", metric=m, case="", check="weights", message=f"{m}!") for n, m in failing]
    found += [finding(n, "pass", case="", check="weights") for n in ("x", "y")]
    return Judged(coverage=Coverage(check="weights", points=2, compared=2), findings=found, rows=[])


def test_only_what_is_wrong_on_several_ranks_alone_is_told() -> None:
    told: dict[str, Any] = {"ranks": 2, "check": "tensor_parallel", "condition": "size 2"}
    both, shard = ("q", "changed"), ("k", "wrong-slice")
    (passed,) = weight_findings(weights(both), weights(both), **told)
    assert (passed.verdict, passed.point, passed.check) == ("pass", "#parameters", "tensor_parallel")
    assert passed.message == "size 2: 2 tensors, all their elements on 2 ranks together"
    (wrong,) = weight_findings(weights(both), weights(both, shard), **told)
    assert (wrong.verdict, wrong.point, wrong.message) == ("fail", "k", "size 2: wrong-slice!")
    assert len(weight_findings(weights(("q", "unread")), weights(both), **told)) == 1


class Closed:
    """An engine of which only the ledger is asked for."""

    def __init__(self, capabilities: frozenset[str], ranks: int = 1) -> None:
        self.capabilities, self.ranks = capabilities, ranks

    def describe(self) -> Any:
        return SimpleNamespace(args={}, parallel={"tensor_parallel_size": self.ranks}, engine="closed")

    def open(self) -> None:
        """It is."""

    def close(self) -> None:
        """It stays."""


def desk(tmp_path: Path, capabilities: set[str], judge: Any) -> Laboratory:
    engine, two = Closed(frozenset(capabilities)), Closed(frozenset(capabilities), ranks=2)
    pool = EnginePool(lambda _: two)  # type: ignore[arg-type, return-value]
    return Laboratory(
        own=lambda: engine,  # type: ignore[arg-type, return-value]
        pool=pool,
        reference=lambda: Manifest(side=NAMES.side, cases=[]),
        cases=[CASE],
        folder=tmp_path,
        weights=judge,
    )


def test_an_engine_without_a_ledger_is_skipped_with_the_reason(tmp_path: Path) -> None:
    trial = Trial(name="two", cases=(CASE,), arguments={"tensor_parallel_size": 2})

    def broken(engine: Any) -> Judged:
        raise EngineError("not traced")

    untraced = Judged(
        coverage=Coverage(
            check="weights",
            points=0,
            compared=0,
            skipped=[Unmatched(side="candidate", point="rank 0", reason="no loader")],
        ),
        findings=[],
        rows=[],
    )
    for capabilities, judge, reason in (
        (set[str](), lambda _: weights(), "engine closed does not say where its loader puts weights"),
        ({"ledger"}, None, "engine closed does not say"),
        ({"ledger"}, broken, "not traced"),
        ({"ledger"}, lambda _: untraced, "no loader"),
    ):
        laboratory = desk(tmp_path, capabilities, judge)
        for _ in range(2):
            with pytest.raises(UsageError, match=reason):
                laboratory.weights(trial)
    asked: list[Any] = []

    def ask(engine: Any) -> Judged:
        asked.append(engine)
        return weights()

    laboratory = desk(tmp_path, {"ledger"}, ask)
    assert laboratory.weights(trial) is laboratory.weights(trial)
    assert len(asked) == 1
