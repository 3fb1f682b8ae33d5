"""Truth, twin and candidate from disk to a verdict: the floor judges where there is one, and says what else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paritykit.captures.manifest import Segment
from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.checks.base import Subject
from paritykit.checks.measured import measure_point
from paritykit.comparison.routing import Flip, Rerouted
from paritykit.comparison.twin import read_at_once
from paritykit.config import load_config
from paritykit.errors import UsageError
from paritykit.mapping.build import build_mapping
from paritykit.results import Finding, Results
from paritykit.runner import compare_captures
from tests.made import write_capture

ROWS = 40
CASES = [Case(id="a", tokens=tuple(range(ROWS))), Case(id="one", tokens=(3,))]
WIDTHS = {"embed": 16, "layers.0.gate": 4, "layers.0.mlp": 16, "layers.1.mlp": 16, "layers.2.mlp": 16, "#logits": 31}
KINDS = {"layers.0.gate": "MadeRouter"}
FLOOR = 1e-3
Tensors = dict[str, torch.Tensor]


def drawn(seed: int, *, size: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {k: size * torch.randn(ROWS + 1, w, generator=generator) for k, w in WIDTHS.items()}


def noisy(seed: int) -> Tensors:
    """The truth with noise of the floor's size; the embedding has none."""
    errors = drawn(seed, size=FLOOR)
    return {k: t if k == "embed" else t + errors[k] for k, t in drawn(0).items()}


class Bench:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def capture(self, tensors: Tensors, *, dtype: str = "float32", facts: dict[str, Any] | None = None) -> Capture:
        self._count += 1
        steps = [([Segment(0, 0, ROWS), Segment(1, 0, 1)], tensors)]
        folder = self._folder / str(self._count)
        return write_capture(folder, steps, cases=CASES, dtype=dtype, kinds=KINDS, facts=facts)

    def compare(self, candidate: Tensors, *, twin: Tensors | None = None, **settings: Any) -> Results:
        facts = settings.pop("facts", None)
        config = load_config(settings, environ={}, start=self._folder)
        return compare_captures(
            self.capture(drawn(0), dtype="float64", facts=facts),
            self.capture(candidate),
            twin=self.capture(noisy(1) if twin is None else twin),
            checks=["modules", "logits"],
            config=config,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def found(results: Results, point: str, case: str = "a") -> Finding:
    return next(f for f in results.findings if (f.point, f.case) == (point, case))


def test_a_candidate_as_noisy_as_the_twin_passes(bench: Bench) -> None:
    results = bench.compare(noisy(2))
    assert results.summary.verdict == "pass"
    mlp = found(results, "layers.1.mlp")
    assert mlp.noise_floor == pytest.approx(FLOOR, rel=0.1)
    assert mlp.allowed_source.startswith("2 x noise floor")
    assert mlp.allowed == pytest.approx(2 * FLOOR, rel=0.4)
    assert mlp.metrics["floor_ratio"] == pytest.approx(1, rel=0.1)
    assert len(mlp.floor_profile) == len(mlp.profile) == ROWS
    assert 0 < mlp.needs["factor"] < 2
    embed = found(results, "embed")
    assert (embed.metric, embed.allowed, embed.noise_floor) == ("max_ulp", 2.0, 0.0)


def test_ten_times_the_floor_fails_where_the_table_would_pass(bench: Bench) -> None:
    wrong = noisy(2)
    wrong["layers.1.mlp"] += drawn(3, size=10 * FLOOR)["layers.1.mlp"]
    for tolerance, verdict in (({}, "fail"), ({"float32": 0.5}, "pass")):
        results = bench.compare(wrong, tolerance=tolerance)
        assert found(results, "layers.1.mlp").verdict == verdict
        assert {f.point for f in results.findings if f.verdict == "fail"} <= {"layers.1.mlp"}
    mlp = found(bench.compare(wrong), "layers.1.mlp")
    assert mlp.failing == [(0, ROWS - 1)]
    assert mlp.needs["factor"] == pytest.approx(10, rel=0.3)


POLICIES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "factor": (
        [{"point": "layers.1.*", "factor": 20.0, "reason": "half"}],
        "20 x noise floor; policy 1 of given: half",
    ),
    "tolerance": ([{"point": "*mlp", "tolerance": 0.5}], "policy 1 of given"),
    "the last": (
        [{"tolerance": 0.5}, {"check": "modules", "dtype": "float32", "factor": 20}],
        "20 x noise floor; policy 2 of given",
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_a_number_with_its_source(bench: Bench, name: str) -> None:
    wrong = noisy(2)
    wrong["layers.1.mlp"] += drawn(3, size=10 * FLOOR)["layers.1.mlp"]
    entries, source = POLICIES[name]
    mlp = found(bench.compare(wrong, policy=entries), "layers.1.mlp")
    assert mlp.verdict == "pass"
    start, _, note = source.rpartition("; ")
    assert mlp.allowed_source.startswith(start)
    assert mlp.allowed_source.replace("command line", "given").endswith(note)


@pytest.mark.parametrize("entry", [{"point": "layers.0.*"}, {"dtype": "bfloat16"}, {"check": "logits"}], ids=str)
def test_a_policy_of_something_else_changes_nothing(bench: Bench, entry: dict[str, Any]) -> None:
    wrong = noisy(2)
    wrong["layers.1.mlp"] += drawn(3, size=10 * FLOOR)["layers.1.mlp"]
    assert found(bench.compare(wrong, policy=[{**entry, "factor": 100.0}]), "layers.1.mlp").verdict == "fail"


def test_what_would_pass_passes_as_a_policy(bench: Bench) -> None:
    wrong = noisy(2)
    wrong["layers.1.mlp"][7] *= 1.05
    needs = found(bench.compare(wrong), "layers.1.mlp").needs
    assert found(bench.compare(wrong), "layers.1.mlp").verdict == "fail"
    assert found(bench.compare(wrong, policy=[{"factor": needs["factor"] * 1.01}]), "layers.1.mlp").verdict == "pass"
    assert found(bench.compare(wrong, policy=[{"factor": needs["factor"] * 0.99}]), "layers.1.mlp").verdict == "fail"


def test_a_twin_in_another_dtype_measures_nothing(bench: Bench) -> None:
    config = load_config({}, environ={}, start=Path("/"))
    results = compare_captures(
        bench.capture(drawn(0)),
        bench.capture(noisy(2), dtype="float16"),
        twin=bench.capture(noisy(1), dtype="bfloat16"),
        checks=["modules"],
        config=config,
    )
    assert (
        "the reference's twin ran in bfloat16, the candidate in float16"
        in found(results, "layers.1.mlp").allowed_source
    )


def test_a_point_that_the_twin_lacks_falls_back(bench: Bench) -> None:
    without = {k: t for k, t in noisy(1).items() if k != "layers.1.mlp"}
    results = bench.compare(drawn(0), twin=without)
    assert "fallback table" in found(results, "layers.1.mlp").allowed_source
    assert "noise floor" in found(results, "layers.0.mlp").allowed_source


def test_a_twin_that_was_fed_other_tokens_is_refused(bench: Bench) -> None:
    other = [Case(id="a", tokens=tuple(range(1, ROWS + 1))), CASES[1]]
    steps = [([Segment(0, 0, ROWS), Segment(1, 0, 1)], noisy(1))]
    twin = write_capture(bench._folder / "other", steps, cases=other)
    with pytest.raises(UsageError, match="other tokens from position 0"):
        compare_captures(bench.capture(drawn(0)), bench.capture(noisy(2)), twin=twin)


def test_a_twin_that_is_lucky_with_one_token_borrows_from_its_other_cases(bench: Bench) -> None:
    lucky = noisy(1)
    for key in ("layers.0.mlp", "layers.1.mlp"):
        lucky[key][ROWS] = drawn(0)[key][ROWS]
    results = bench.compare(noisy(2), twin=lucky)
    one = found(results, "layers.1.mlp", "one")
    assert one.verdict == "pass"
    assert "of its neighbours" in one.allowed_source
    wrong = noisy(2)
    wrong["layers.1.mlp"][ROWS] *= 1.5
    assert found(bench.compare(wrong, twin=lucky), "layers.1.mlp", "one").verdict == "fail"


DECODED = Case(id="a", tokens=(7,), new_tokens=6, forced=(1, 2, 3, 4, 5, 6))


@pytest.mark.parametrize(("shown", "verdict"), [(5, "fail"), (6, "pass")])
def test_what_a_twin_also_reads_at_once_may_raise_its_floor(tmp_path: Path, shown: int, verdict: str) -> None:
    """Decoded with a sixth of the noise; ``shown`` positions of the same text as one prompt, with all of it."""
    truth, floor = drawn(0)["embed"][:6], FLOOR * drawn(1)["embed"][:6]
    both = [DECODED, *read_at_once([DECODED])]
    spans = [Segment(0, 0, 6)], [Segment(1, 0, shown)]
    made = {}
    for name, cases, rows in (
        ("truth", both[:1], [truth]),
        ("twin", both, [truth + floor / 6, (truth + floor)[:shown]]),
        ("candidate", both[:1], [truth + FLOOR * drawn(2)["embed"][:6]]),
        ("wrong", both[:1], [truth + 6 * FLOOR * drawn(2)["embed"][:6]]),
    ):
        steps = [(spans[n], {"mlp": tensor}) for n, tensor in enumerate(rows)]
        made[name] = write_capture(
            tmp_path / name, steps, cases=cases, dtype="float64" if name == "truth" else "float32"
        )
    for name, expected in (("candidate", verdict), ("wrong", "fail")):
        results = compare_captures(made["truth"], made[name], twin=made["twin"], checks=["modules"])
        mlp = found(results, "mlp")
        assert mlp.verdict == expected
        assert mlp.noise_floor == pytest.approx(FLOOR if shown == 6 else FLOOR / 6, rel=0.3)


def test_a_broken_twin_is_named_and_no_candidate_blamed(bench: Bench) -> None:
    broken = noisy(1)
    broken["layers.1.mlp"] = drawn(7)["layers.1.mlp"]
    for candidate in (noisy(2), {**noisy(2), "layers.1.mlp": drawn(9)["layers.1.mlp"]}):
        mlp = found(bench.compare(candidate, twin=broken), "layers.1.mlp")
        assert mlp.verdict == "inconclusive"
        assert "the reference itself" in mlp.message


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_where_the_twin_overflows_too_the_candidate_is_not_blamed(bench: Bench, value: float) -> None:
    twin, candidate = noisy(1), noisy(2)
    twin["layers.1.mlp"][4, 5] = candidate["layers.1.mlp"][4, 5] = value
    mlp = found(bench.compare(candidate, twin=twin), "layers.1.mlp")
    assert mlp.verdict == "inconclusive"
    assert "the reference itself" in mlp.message
    candidate["layers.1.mlp"][4, 6] = value
    assert found(bench.compare(candidate, twin=twin), "layers.1.mlp").verdict == "fail"


# routing


def flipped(margin: float) -> tuple[Tensors, Tensors]:
    """Truth and candidate where the router's second and third expert are ``margin`` apart at position 20."""
    truth, candidate = drawn(0), noisy(2)
    row = torch.tensor([3.0, 1.0, 1.0 - margin, -1.0])
    truth["layers.0.gate"][20] = row
    candidate["layers.0.gate"][20] = torch.tensor([3.0, 1.0 - margin, 1.0, -1.0])
    return truth, candidate


def routed(
    bench: Bench, margin: float, change: Callable[[Tensors], Any], *, facts: dict[str, Any] | None = None
) -> Finding:
    truth, candidate = flipped(margin)
    change(candidate)
    twin = noisy(1)
    twin["layers.0.gate"][20] = truth["layers.0.gate"][20] + 1e-3
    results = compare_captures(
        bench.capture(truth, dtype="float64", facts={"routers": {"layers.0.gate": 2}} if facts is None else facts),
        bench.capture(candidate),
        twin=bench.capture(twin),
        checks=["modules"],
        config=load_config({}, environ={}, start=Path("/")),
    )
    return found(results, "layers.1.mlp")


def behind(candidate: Tensors) -> None:
    candidate["layers.1.mlp"][20:ROWS] *= 1.5


def before(candidate: Tensors) -> None:
    candidate["layers.1.mlp"][19:ROWS] *= 1.5


def test_what_a_legitimate_flip_reaches_is_no_failure(bench: Bench) -> None:
    mlp = routed(bench, 2e-3, behind)
    assert mlp.verdict == "inconclusive"
    assert "expert flip at position 20 in layers.0.gate: experts 0, 2 instead of 0, 1" in mlp.message


def test_what_no_flip_explains_fails(bench: Bench) -> None:
    assert routed(bench, 2e-3, before).verdict == "fail", "it begins before the flip"
    assert routed(bench, 0.5, behind).verdict == "fail", "the margin is far beyond the router's noise"
    assert routed(bench, 2e-3, behind, facts={}).verdict == "fail", "in float32 nothing is excused unseen"
    assert routed(bench, 2e-3, lambda c: None).verdict == "pass"


@pytest.mark.parametrize(("position", "verdict"), [(5, "inconclusive"), (2, "fail")])
def test_a_choice_is_excused_where_a_flip_reaches_its_position(tmp_path: Path, position: int, verdict: str) -> None:
    """The router is in the last layer, so that a flip reaches its own position only."""
    case, sides = Case(id="a", tokens=(1, 2, 3, 4, 5), new_tokens=2, forced=(6, 7)), []
    for number, tokens in enumerate(([6, 7], [6, 8])):
        tensors = {k: drawn(0)[k][:6].clone() for k in ("layers.0.gate", "#logits")}
        tensors["layers.0.gate"][position] = torch.tensor([3.0, 1.0, 1.0 - (-1) ** number * 1e-6, -1.0])
        tensors["#logits"][5, tokens[1]] += 10
        sides.append(
            write_capture(
                tmp_path / f"{number}",
                [([Segment(0, 0, 6)], tensors)],
                cases=[case],
                generated={"a": tokens},
                kinds=KINDS,
                facts={"routers": {"layers.0.gate": 2}},
            )
        )
    results = compare_captures(*sides, checks=["tokens"], config=load_config({}, environ={}))
    forced = found(results, "#tokens")
    assert forced.verdict == verdict
    assert ("behind an expert flip at position 5" in forced.message) == (verdict == "inconclusive")


@pytest.mark.parametrize(("depth", "verdict"), [(None, "inconclusive"), (3, "inconclusive"), (1, "fail")])
def test_of_a_replay_only_flips_since_the_last_replaced_point_count(
    bench: Bench, depth: int | None, verdict: str
) -> None:
    wrong = drawn(0)
    wrong["layers.1.mlp"][20] *= 1.5
    reference, candidate = bench.capture(drawn(0)), bench.capture(wrong)
    mapping = build_mapping(reference.manifest, candidate.manifest)
    subject = Subject(reference=reference, candidate=candidate, mapping=mapping)
    rule = next(r for r in mapping.rules if r.reference == "layers.1.mlp")
    subject.flips["a"] = Rerouted([Flip("layers.0.gate", 20, ([0, 1], [0, 2]), 1e-4, 1e-4, order=1, reach=9)])
    assert subject.graph.order("layers.1.mlp") == 3
    assert measure_point(subject, rule, "a", check="modules", depth=depth).verdict == verdict
