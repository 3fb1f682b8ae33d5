"""Two captures from disk to a verdict, without an engine: every kind of difference ends where it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paritykit.captures.manifest import Segment
from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.config import load_config
from paritykit.errors import UnknownNameError, UsageError
from paritykit.mapping.user import UserRule
from paritykit.records import merge_results
from paritykit.results import Results
from paritykit.runner import compare_captures
from tests.made import Step, write_capture

CASES = [Case(id="a", tokens=(1, 2, 3), new_tokens=2), Case(id="b", tokens=(4, 5))]
SEGMENTS = [Segment(0, 0, 4), Segment(1, 0, 2)]
GENERATED = {"a": [7, 3], "b": []}
Change = Callable[[dict[str, torch.Tensor]], Any]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = {"embed": 8, "layer.norm": 8, "layer.mlp": 8, "layer": 8, "head": 11, "#logits": 11}
    return {name: torch.randn(6, width, generator=generator) for name, width in names.items()}


class Workshop:
    """Makes the reference once, and candidates that differ from it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self.config = load_config({}, environ={}, start=folder)

    def capture(self, change: Change | None = None, *, segments: list[Segment] = SEGMENTS, **fields: Any) -> Capture:
        found = tensors()
        if change:
            change(found)
        self._number += 1
        steps: list[Step] = [(segments, {k: t[: sum(s.length for s in segments)] for k, t in found.items()})]
        options = {"cases": CASES, "generated": GENERATED} | fields
        return write_capture(self._folder / str(self._number), steps, **options)

    def compare(self, candidate: Capture, *, reference: Capture | None = None, **options: Any) -> Results:
        return compare_captures(reference or self.capture(), candidate, config=self.config, **options)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def failing(results: Results, check: str = "modules") -> dict[tuple[str, str], str]:
    return {(f.case, f.point): f.metric for f in results.findings if f.check == check and f.verdict == "fail"}


def test_a_clean_pair(workshop: Workshop) -> None:
    found = workshop.compare(workshop.capture())
    assert (found.summary.verdict, found.summary.exit_code) == ("pass", 0)
    assert found.summary.checks == {"modules": "pass", "logits": "pass", "tokens": "pass"}
    assert {f.value for f in found.findings} == {0.0}
    assert [c.id for c in found.cases] == ["a", "b"]


def test_one_element_of_one_case(workshop: Workshop) -> None:
    found = workshop.compare(workshop.capture(lambda t: t["layer.mlp"][5, 2].add_(0.5)))
    assert failing(found) == {("b", "layer.mlp"): "position_rel_l2"} or failing(found) == {("b", "layer.mlp"): "rel_l2"}
    divergence = found.summary.first_divergence
    assert divergence is not None
    assert (divergence.check, divergence.case, divergence.point) == ("modules", "b", "layer.mlp")
    assert next(f for f in found.findings if f.verdict == "fail").failing == [(1, 1)]
    assert found.summary.exit_code == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number(workshop: Workshop, value: float) -> None:
    found = workshop.compare(workshop.capture(lambda t: t["layer"][0, 0].fill_(value)))
    assert failing(found) == {("a", "layer"): "nonfinite_mismatch"}


def test_a_rule_that_does_not_fit_is_left_out_with_its_reason(workshop: Workshop) -> None:
    found = workshop.compare(workshop.capture(lambda t: t.update({"layer.norm": torch.zeros(6, 9)})))
    assert failing(found) == {}
    assert found.summary.verdict == "pass"
    (left,) = (u for c in found.coverage for u in c.skipped)
    assert (left.point, left.reason) == ("layer.norm", "8 features against 9 on each of 1 rank(s) of layer.norm")


def test_another_width_is_a_failing_shape_where_what_follows_fails(workshop: Workshop) -> None:
    def widen(found: dict[str, torch.Tensor]) -> None:
        found["layer.norm"] = torch.zeros(6, 9)
        found["layer.mlp"] *= torch.linspace(0.5, 1.5, 8)
        found["layer"] *= torch.linspace(0.5, 1.5, 8)
        found["head"] *= torch.linspace(0.5, 1.5, 11)
        found["#logits"] *= torch.linspace(0.5, 1.5, 11)

    found = workshop.compare(workshop.capture(widen))
    assert failing(found).items() >= {("a", "layer.norm"): "shape", ("b", "layer.norm"): "shape"}.items()
    first = found.summary.first_divergence
    assert first is not None
    assert first.seen_at == "layer.mlp"


def test_a_point_that_the_candidate_lacks_is_counted(workshop: Workshop) -> None:
    found = workshop.compare(workshop.capture(lambda t: [t.pop(k) for k in ("layer.mlp", "head")]))
    modules = next(c for c in found.coverage if c.check == "modules")
    assert modules.compared == 3
    assert {u.point for u in (*modules.unmatched, *modules.skipped)} == {"layer.mlp", "head"}


def test_nothing_in_common_is_never_green(workshop: Workshop) -> None:
    def rename(found: dict[str, torch.Tensor]) -> None:
        for key in list(found):
            found["other_" + key.strip("#")] = found.pop(key)

    found = workshop.compare(workshop.capture(rename))
    assert (found.summary.verdict, found.summary.exit_code) == ("inconclusive", 5)
    assert found.summary.message == "nothing was compared"


def test_empty_captures_are_never_green(workshop: Workshop) -> None:
    empty = workshop.capture(dict.clear)
    assert workshop.compare(empty).summary.exit_code == 5
    assert workshop.compare(empty, reference=empty).summary.exit_code == 5


def test_positions_that_the_candidate_did_not_compute(workshop: Workshop) -> None:
    found = workshop.compare(workshop.capture(segments=[Segment(0, 0, 4), Segment(1, 0, 1)]))
    errors = [f for f in found.findings if f.verdict == "error"]
    assert {f.case for f in errors} == {"b"}
    assert {f.message for f in errors} == {"the candidate computed 1 of 2 positions"}
    assert found.summary.exit_code == 3


def test_a_module_that_the_reference_runs_in_one_case_only(workshop: Workshop) -> None:
    """As experts and early exits do: skipped in the other case, and no crash."""
    both, only = tensors(), tensors()
    steps: list[Step] = [
        ([SEGMENTS[0]], {k: t[:4] for k, t in both.items()}),
        ([SEGMENTS[1]], {k: t[4:] for k, t in only.items() if k not in ("layer.mlp", "#logits")}),
    ]
    folder = workshop.capture().path.parent
    reference = write_capture(folder / "partial", steps, cases=CASES, generated=GENERATED)
    found = workshop.compare(workshop.capture(), reference=reference)
    skipped = [(f.check, f.case, f.point, f.message) for f in found.findings if f.verdict == "skip"]
    reason = "the reference did not run it in this case"
    assert skipped == [("modules", "b", "layer.mlp", reason), ("logits", "b", "#logits", reason)]
    assert found.summary.verdict == "pass"


@pytest.mark.parametrize(("fields", "said"), [
    ({"cases": CASES[:1]}, "has no case 'b', which"),
    ({"cases": [CASES[0], Case(id="b", tokens=(4, 6))]}, "case 'b': the captures hold other .* 1 on$"),
    ({"generated": {"a": [6, 3]}}, "from position 3 on; capture the candidate with --follow"),
    ({"cases": [CASES[0].force([6, 3]), CASES[1]]}, "from position 3 on; capture the candidate with --follow"),
])  # fmt: skip
def test_other_tokens_are_refused(workshop: Workshop, fields: dict[str, Any], said: str) -> None:
    options: dict[str, Any] = {"segments": [SEGMENTS[0]]} if len(fields.get("cases", CASES)) == 1 else {}
    with pytest.raises(UsageError, match=said):
        workshop.compare(workshop.capture(**options, **fields))


def test_a_choice_that_is_not_fed_may_differ(workshop: Workshop) -> None:
    """Fed the reference's tokens, the candidate would have chosen others: for the ``tokens`` check to judge."""

    def clear(found: dict[str, torch.Tensor]) -> None:
        found["#logits"][2, 7] = 9.0

    candidate = workshop.capture(clear, generated={"a": [6, 3]}, cases=[CASES[0].force([7, 3]), CASES[1]])
    found = workshop.compare(candidate, reference=workshop.capture(clear))
    assert found.summary.checks == {"modules": "pass", "logits": "pass", "tokens": "fail"}
    (flip,) = (f for f in found.findings if f.verdict == "fail")
    assert "new token 0: 7 in the reference, 6 in the candidate; flip" in flip.message


def test_a_near_tie_is_no_failure(workshop: Workshop) -> None:
    def tie(found: dict[str, torch.Tensor]) -> None:
        found["#logits"][2] = 0
        found["#logits"][2, 6] = found["#logits"][2, 7] = 5.0

    def tilt(found: dict[str, torch.Tensor]) -> None:
        tie(found)
        found["#logits"][2, 6] += 1e-6

    candidate = workshop.capture(tilt, generated={"a": [6, 3]}, cases=[CASES[0].force([7, 3]), CASES[1]])
    found = workshop.compare(candidate, reference=workshop.capture(tie))
    assert found.summary.verdict == "pass"
    assert any("near-tie" in f.message for f in found.findings)


def test_fewer_choices_than_asked_for_are_an_error(workshop: Workshop) -> None:
    candidate = workshop.capture(generated={"a": [7]}, cases=[CASES[0].force([7, 3]), CASES[1]])
    found = workshop.compare(candidate)
    assert found.summary.checks["tokens"] == "error"


def test_a_users_rule_and_a_tolerance(workshop: Workshop) -> None:
    def rename(found: dict[str, torch.Tensor]) -> None:
        found["mine"] = found.pop("layer.mlp") * 1.01

    rules = [UserRule(reference="layer.mlp", candidate="mine", where="map.toml, rule 1")]
    candidate = workshop.capture(rename)
    assert failing(workshop.compare(candidate, rules=rules)) == {
        ("a", "layer.mlp"): "rel_l2",
        ("b", "layer.mlp"): "rel_l2",
    }
    workshop.config = load_config({"tolerance": {"float32": 0.02}}, environ={})
    found = workshop.compare(candidate, rules=rules)
    assert found.summary.verdict == "pass"
    assert {f.allowed_source for f in found.findings if f.check == "modules"} == {"tolerance.float32 (command line)"}


def test_an_unknown_check(workshop: Workshop) -> None:
    with pytest.raises(UnknownNameError, match="unknown check 'module'; did you mean 'modules'"):
        workshop.compare(workshop.capture(), checks=["module"])


def test_merged_runs_are_judged_together(workshop: Workshop) -> None:
    reference, clean = workshop.capture(), workshop.capture()
    wrong = workshop.capture(lambda t: [t[k].mul_(1.1) for k in ("layer", "head")])
    parts = [
        workshop.compare(clean, reference=reference, checks=["modules"]),
        workshop.compare(clean, reference=reference, checks=["logits"]),
    ]
    merged = merge_results(parts)
    assert merged.summary.verdict == "pass"
    assert merged.summary.checks == {"modules": "pass", "logits": "pass"}
    assert merged.run.checks == ["modules", "logits"]
    assert len(merged.findings) == sum(len(p.findings) for p in parts)
    assert [c.id for c in merged.cases] == ["a", "b"]
    merged = merge_results([workshop.compare(wrong, reference=reference, checks=["modules"]), parts[1]])
    assert (merged.summary.verdict, merged.summary.failed) == ("fail", 4)
    assert merged.summary.checks == {"modules": "fail", "logits": "pass"}
    again = merge_results([parts[0], parts[0]])
    assert again.findings == parts[0].findings


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float64", "float16")])
def test_sides_of_different_dtypes(workshop: Workshop, dtypes: tuple[str, str]) -> None:
    def cast(name: str) -> Change:
        return lambda found: found.update({k: t.to(getattr(torch, name)) for k, t in found.items()})

    ours, theirs = (workshop.capture(cast(d), dtype=d) for d in dtypes)
    found = workshop.compare(theirs, reference=ours, checks=["modules", "logits"])
    assert found.summary.verdict == "pass"
    assert 0 < max(f.value or 0 for f in found.findings) < 0.01
    assert all("fallback table" in f.allowed_source for f in found.findings)
