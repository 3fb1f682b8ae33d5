"""Trials, twins, bounds and the pool: without any engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import paritykit as pk
from paritykit import strategies
from paritykit.captures.manifest import Segment
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.checks import CHECKS, INVARIANCES
from paritykit.checks.base import Answer, InvarianceCheck
from paritykit.comparison.align import overlaps
from paritykit.comparison.judge import judge
from paritykit.comparison.metrics import measure
from paritykit.diagnose.locate import Graph
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.errors import EngineError, UnknownNameError
from paritykit.invariance.bound import EXACT, reordering
from paritykit.invariance.compare import Scene, View, compare_tokens, compare_views
from paritykit.invariance.judge import add_findings, judge_property
from paritykit.invariance.laboratory import Laboratory
from paritykit.invariance.pool import EnginePool
from paritykit.invariance.properties import PROPERTIES, shared_lengths
from paritykit.invariance.trial import Skipped, Trial, Twins
from paritykit.results import Coverage
from paritykit.testing import tiny_model
from tests.made import finding, manifest, write_capture

EVERYTHING = frozenset(
    {
        "cache_digest",
        "chunked_prefill",
        "decode",
        "logits",
        "pipeline_parallel",
        "poison",
        "prefix_caching",
        "teacher_forcing",
        "tensor_parallel",
    }
)


class Desk:
    """A bench whose engine chooses token 1 whatever it is asked."""

    def __init__(self, cases: list[Case], capabilities: frozenset[str] = EVERYTHING) -> None:
        self.cases, self.capabilities = cases, capabilities
        self.args = {"block_size": "4", "max_num_batched_tokens": "64"}
        self.parallel = {"tensor_parallel_size": 1}
        self.engine = "nano"

    def variations(self, kind: str) -> list[dict[str, Any]]:
        return {"kv_cache": [{"block_size": 3}]}.get(kind, [])

    def pick(self, options: Any, *, few: int = 1) -> list[Any]:
        return list(options)

    def continuation(self, trial: Trial) -> dict[str, list[int]]:
        return {c.id: [*c.forced, *[1] * c.new_tokens][: c.new_tokens] for c in trial.cases}


@given(strategies.workloads(block_size=4, longest=40))
@pytest.mark.parametrize("name", INVARIANCES)
def test_every_pair_of_runs_computes_the_same_text(name: str, workload: pk.CaseSet) -> None:
    """What stands for each other was fed the same tokens, position by position; ids are unique in a run."""
    desk = Desk(workload.resolve(vocab_size=100))
    for twins in PROPERTIES[name](desk):
        assert isinstance(twins, Twins)
        texts = []
        for trial in (twins.base, twins.varied):
            ids = [c.id for c in trial.cases]
            assert len(ids) == len(set(ids))
            assert all(0 <= t < 100 for c in trial.cases for t in (*c.tokens, *c.forced))
            texts.append({c.id: text_of(c) for c in trial.cases})
        assert twins.pairs
        for ours, theirs in twins.pairs:
            assert texts[0][ours] == texts[1][theirs]


def text_of(case: Case) -> tuple[int, ...]:
    fed = (*case.tokens, *case.forced)
    return (*fed, *[1] * (case.positions - len(fed)))[: case.positions]


@pytest.mark.parametrize("name", INVARIANCES)
def test_what_an_engine_cannot_do_is_skipped_with_a_reason(name: str) -> None:
    desk = Desk(pk.cases("len-9+2").resolve(vocab_size=100), frozenset())
    found = list(PROPERTIES[name](desk))
    skipped = [t for t in found if isinstance(t, Skipped)]
    if name in ("batching", "repeat", "observer"):
        assert not skipped
    else:
        assert all(s.reason.startswith("engine nano ") for s in skipped)
        assert skipped


@pytest.mark.parametrize("promised", [True, False])
def test_bits_are_asked_for_where_they_are_promised(promised: bool) -> None:
    desk = Desk(pk.cases("len-9+2", "len-1").resolve(vocab_size=100))
    desk.capabilities |= {"batch_invariant"} if promised else set()
    assert {t.exact for t in PROPERTIES["batching"](desk) if isinstance(t, Twins)} == {promised}


@given(st.integers(1, 300), st.integers(1, 64))
def test_prefixes_end_before_at_and_after_blocks(length: int, block: int) -> None:
    found = shared_lengths(length, block)
    assert len(found) == len(set(found))
    assert all(1 <= n <= length for n in found)
    assert length in found
    last = length // block * block
    assert {n for n in (last - 1, last) if n > 0} <= set(found)


@given(st.sampled_from(["float32", "bfloat16", "float16", "float64"]), st.integers(0, 500), st.integers(1, 5000))
def test_bounds_grow_with_depth_and_terms(dtype: str, depth: int, terms: int) -> None:
    one = reordering((dtype, dtype), depth=depth, terms=terms)
    assert 0 < one.whole < one.position
    assert reordering((dtype, dtype), depth=depth + 1, terms=terms).whole > one.whole
    assert reordering((dtype, dtype), depth=depth, terms=terms + 1).whole > one.whole
    assert f"sqrt({depth + 1} points)" in one.source
    assert f"sqrt({terms} terms)" in one.source


@pytest.mark.parametrize("terms", [16, 256, 4096])
def test_the_bound_holds_for_sums_in_another_order_and_is_not_slack(terms: int) -> None:
    """One after the other against pairwise and reversed: within three deviations, and not within a tenth of one."""
    generator = np.random.default_rng(terms)
    rows = generator.standard_normal((400, terms)).astype(np.float32)
    forward, backward = (np.add.accumulate(r, axis=1, dtype=np.float32)[:, -1] for r in (rows, rows[:, ::-1]))
    difference = float(np.linalg.norm(forward - backward) / np.linalg.norm(forward))
    allowed = reordering(("float32", "float32"), depth=0, terms=terms).whole
    assert allowed / 30 < difference < allowed


def test_bit_for_bit_means_no_difference_at_all() -> None:
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert judge(measure(rows, rows.clone()), EXACT)[0] == "pass"
    other = rows.clone()
    other[2, 3] = torch.nextafter(other[2, 3], torch.tensor(9.0))
    assert judge(measure(rows, other), EXACT)[0] == "fail"


STRETCHES = st.lists(st.integers(0, 30), max_size=8, unique=True).map(
    lambda edges: list(zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False))
)


@given(STRETCHES, STRETCHES)
def test_overlaps_are_the_common_positions(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    found = [p for a, b in overlaps(left, right) for p in range(a, b)]
    ours, theirs = ({p for a, b in side for p in range(a, b)} for side in (left, right))
    assert found == sorted(ours & theirs)


def view(folder: Path, rows: dict[str, torch.Tensor], *, start: int = 0, generated: list[int] | None = None) -> View:
    length = len(next(iter(rows.values())))
    case = Case(id="a", tokens=tuple(range(length + start)), new_tokens=len(generated or []))
    steps = [([Segment(0, start, length)], rows)]
    capture = write_capture(folder, steps, cases=[case], generated={"a": generated or []})
    return View(capture, NAMES)


NAMES = manifest({"model.a": 4, "model.b": 4, "#logits": 4})
GRAPH = Graph(NAMES)


def compared(base: View, varied: View, *, partial: bool = False) -> dict[str, Any]:
    return {f.point: f for f in compare_views(scene(base, varied, partial=partial))}


def scene(base: View, varied: View, *, partial: bool = False) -> Scene:
    return Scene(
        base=base,
        varied=varied,
        cases=("a", "a"),
        graph=GRAPH,
        allow=lambda dtypes, depth: reordering(dtypes, depth=depth, terms=4),
        check="batching",
        condition="in one batch",
        partial=partial,
    )


def rows_of(seed: int, length: int = 6) -> torch.Tensor:
    return torch.randn(length, 4, generator=torch.Generator().manual_seed(seed))


def test_only_what_differs_fails(tmp_path: Path) -> None:
    a, b = rows_of(1), rows_of(2)
    base = view(tmp_path / "base", {"model.a": a, "model.b": b})
    wrong = b.clone()
    wrong[4] += 0.5
    found = compared(base, view(tmp_path / "varied", {"model.a": a, "model.b": wrong}))
    assert {k: f.verdict for k, f in found.items()} == {"model.a": "pass", "model.b": "fail"}
    assert found["model.b"].failing == [(4, 4)]
    assert (found["model.b"].condition, found["model.b"].message) == ("in one batch", "in one batch")


def test_missing_positions_are_an_error_unless_they_may_be_missing(tmp_path: Path) -> None:
    a = rows_of(1)
    base = view(tmp_path / "base", {"model.a": a})
    late = view(tmp_path / "late", {"model.a": a[2:]}, start=2)
    assert compared(base, late)["model.a"].verdict == "error"
    assert "4 of 6 positions" in compared(base, late)["model.a"].message
    allowed = compared(base, late, partial=True)["model.a"]
    assert (allowed.verdict, allowed.positions) == ("pass", (2, 5))


@pytest.mark.parametrize(("gap", "verdict"), [(1e-7, "pass"), (0.5, "fail")])
def test_another_choice_is_a_near_tie_only_where_the_error_explains_it(
    tmp_path: Path, gap: float, verdict: str
) -> None:
    ours = torch.tensor([[2.0, 2.0 - gap, 0.0, 0.0]])
    theirs = ours + torch.tensor([[-1e-7, 1e-7, 0.0, 0.0]])
    base = view(tmp_path / "base", {"#logits": ours}, generated=[0])
    varied = view(tmp_path / "varied", {"#logits": theirs}, generated=[1])
    found = compare_tokens(scene(base, varied))
    assert found is not None
    assert found.verdict == verdict
    assert "new token 0: 0 in one run, 1 in the other" in found.message


def test_the_worst_of_a_point_is_kept_and_names_every_condition() -> None:
    answer = Answer(coverage=Coverage(check="batching", points=0, compared=0), findings=[])
    small = finding("p", "pass", value=1e-7, allowed=1e-5, message="alone")
    first = finding("p", "fail", value=1e-2, allowed=1e-5, message="first")
    worse = finding("p", "fail", value=1e-1, allowed=1e-5, message="second")
    for order in ([small, first, worse], [worse, first, small]):
        kept = add_findings(answer, order)
        assert [f.value for f in kept.findings] == [1e-1]
        assert kept.findings[0].message == "second; also first"
        assert (kept.coverage.points, kept.coverage.compared) == (1, 1)


class Lamp:
    def __init__(self, arguments: dict[str, Any], log: list[str]) -> None:
        self.arguments, self._log = arguments, log

    def open(self) -> None:
        self._log.append(f"open {self.arguments}")
        if "broken" in self.arguments:
            raise EngineError("does not start")

    def close(self) -> None:
        self._log.append(f"close {self.arguments}")


def test_engines_are_shared_replaced_and_closed() -> None:
    log: list[str] = []
    pool = EnginePool(lambda arguments: Lamp(arguments, log))  # type: ignore[arg-type, return-value]
    assert pool.get({"a": 1, "b": 2}) is pool.get({"b": 2, "a": 1})
    pool.get({"a": 3})
    with pytest.raises(EngineError):
        pool.get({"broken": 1})
    pool.get({"a": 1, "b": 2})
    pool.close()
    pool.close()
    assert [line.partition(" ")[0] for line in log] == [
        "open",
        "close",
        "open",
        "close",
        "open",
        "close",
        "open",
        "close",
    ]
    assert pool.starts == {"a=1, b=2": 2, "a=3": 1}


class Stubborn(NanoEngine):
    """Overrides what it is asked, as engines do, and says how it runs."""

    def __init__(self, model: str, **arguments: Any) -> None:
        super().__init__(model, **{**arguments, **({"block_size": 16} if "block_size" in arguments else {})})


@pytest.mark.parametrize("kind", [NanoEngine, Stubborn])
def test_a_condition_that_the_engine_overrides_was_not_tried(tmp_path: Path, kind: type[NanoEngine]) -> None:
    model = str(tiny_model("qwen2"))
    engine, reference = NanoEngine(model), HFEngine(model)
    cases = pk.cases("len-9+2").resolve(vocab_size=499)
    for opened in (engine, reference):
        opened.open()
    capture = reference.run(cases, points=Selection(), out=tmp_path / "reference")
    pool = EnginePool(lambda arguments: kind(model, **arguments))
    laboratory = Laboratory(
        own=lambda: engine, pool=pool, reference=lambda: capture.manifest, cases=cases, folder=tmp_path
    )
    answer = judge_property(laboratory, "kv_cache", only={"block_size": 3})
    reasons = {u.point: u.reason for u in answer.coverage.skipped}
    if kind is Stubborn:
        assert reasons["block_size 3"] == "engine nano runs this model with block_size=16, not 3"
        assert not answer.findings
    else:
        assert "block_size 3" not in reasons
        assert {f.verdict for f in answer.findings} == {"pass"}


@given(strategies.workloads(block_size=16, window=8, chunk=7))
def test_workloads_are_cases_that_the_command_line_takes(workload: pk.CaseSet) -> None:
    cases = workload.resolve(vocab_size=499, max_positions=512)
    assert 1 <= len(cases) <= 4
    assert [c.id for c in cases] == list(workload)
    assert pk.cases(*workload.ids()).resolve(vocab_size=499) == cases


@given(st.integers(1, 60), st.integers(1, 60), st.integers(10, 600))
def test_cases_of_one_text_begin_alike(one: int, other: int, vocabulary: int) -> None:
    assume(one != other)
    names = [strategies.case_name(n, 0, "b") for n in (one, other)]
    first, second = pk.cases(*names).resolve(vocab_size=vocabulary)
    shorter = min(one, other)
    assert first.tokens[:shorter] == second.tokens[:shorter]
    assert len(first.tokens) == one
    longest = max(first.tokens, second.tokens, key=len)
    if len(longest) > 10:
        assert {vocabulary - 1, vocabulary // 2} <= set(longest)


@pytest.mark.parametrize("name", ["len-0", "len-", "len-5+", "len-5@", "len--5", "len-5+x", "LEN-5"])
def test_sized_cases_that_are_none(name: str) -> None:
    with pytest.raises(UnknownNameError):
        pk.cases(name)


def test_workloads_shrink_to_one_short_request() -> None:
    from hypothesis import find

    assert find(strategies.workloads(), lambda _: True).ids() == ["len-1"]
    assert find(strategies.workloads(), lambda w: any("+" in n for n in w.ids())).ids() == ["len-1+1"]


def test_checks_ask_a_question_and_name_known_causes() -> None:
    for name in INVARIANCES:
        check = CHECKS.get(name)
        assert isinstance(check, InvarianceCheck)
        assert check.name == name
        assert check.question.endswith("?")
        assert check.detects
    assert set(PROPERTIES) == set(INVARIANCES)
    assert math.isfinite(reordering(("float32", "bfloat16"), depth=1, terms=1).whole)
