"""From problems to records: one finding for each tensor, rows for people, and rules that allow what is meant."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paritykit.ledger.judge import judge_weights
from paritykit.ledger.subject import Allowed, Expected, ReferenceLayout, WeightSubject
from paritykit.provenance.weightmap import Gap, ParameterInfo, RankLedger, Span, TensorInfo, WeightMap
from paritykit.results import SCHEMA_VERSION, Finding, Results, Run, Side, Summary, WeightRow, read_jsonl, write_jsonl
from paritykit.verdict import check_verdict
from tests.weights import Toy, altered, dropped, judged, subject

TEXT = st.text(max_size=12)
COUNTS = st.integers(0, 10**9)


def finding(found: list[Finding], point: str) -> Finding:
    return next(f for f in found if f.point == point)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_clean_engine(ranks: int) -> None:
    toy = Toy(ranks=ranks)
    got = judged(toy)
    assert [f.point for f in got.findings] == list(toy.shapes())
    assert {f.verdict for f in got.findings} == {"pass"}
    assert (got.coverage.points, got.coverage.compared, got.coverage.skipped) == (len(toy.shapes()),) * 2 + ([],)
    down = finding(got.findings, "layers.0.mlp.down_proj.weight")
    each = 12 // ranks
    assert down.mapping.split("; ") == [
        f"[:, {':' if ranks == 1 else f'{r * each}:{(r + 1) * each}'}] -> layers.0.mlp.down_proj.weight[:, :]"
        + f" on rank {r}" * (ranks > 1)
        for r in range(ranks)
    ]
    assert (down.shape, down.dtypes, down.value, down.allowed) == ([8, 12], ("float32", "float32"), 0.0, 0.0)
    assert down.candidate_point == "layers.0.mlp.down_proj.weight"
    rows = [r for r in got.rows if r.tensor == "layers.0.mlp.down_proj.weight"]
    assert sum(r.elements for r in rows) == 96
    assert {(r.status, r.rank) for r in rows} == {("pass", r) for r in range(ranks)}


def test_findings_of_tensors_and_of_parameters() -> None:
    got = judged(Toy(), fault=dropped("layers.1.attn.k_proj.weight"))
    failed = [f for f in got.findings if f.verdict == "fail"]
    assert [f.point for f in failed] == ["layers.1.attn.k_proj.weight", "layers.1.attn.qkv_proj.weight"]
    lost, hole = failed
    assert (lost.metric, lost.value, lost.origin, lost.candidate_point, lost.dtypes) == (
        "unread",
        32,
        "introduced",
        "",
        None,
    )
    assert (hole.metric, hole.value, hole.candidate_point) == ("unwritten", 32, "layers.1.attn.qkv_proj.weight")
    assert lost.metrics == {"unread": 32}
    assert [f.order for f in got.findings] == [*range(len(got.findings))]
    assert [(r.tensor, r.parameter, r.status, r.elements) for r in got.rows if r.status != "pass"] == [
        ("layers.1.attn.k_proj.weight", "", "unread", 32), ("", "layers.1.attn.qkv_proj.weight", "unwritten", 32),
    ]  # fmt: skip


def test_the_most_telling_problem_is_told_and_the_others_counted() -> None:
    got = judged(Toy(ranks=2), fault=altered("layers.1.mlp.gate", rank_of=lambda r: 0))
    wrong = finding(got.findings, "layers.1.mlp.gate_proj.weight")
    assert wrong.metric == "wrong-slice"
    assert wrong.message == "rank 1 holds the same shard of layers.1.mlp.gate_proj.weight as rank 0 (and 1 more)"
    assert set(wrong.metrics) == {"wrong-slice", "unread"}


def test_rows_show_axes_and_changes() -> None:
    got = judged(Toy(transposed=True), fault=altered("layers.1.norm", lambda t: t + 1))
    rows = {r.tensor: r for r in got.rows}
    gate, norm = rows["layers.0.mlp.gate_proj.weight"], rows["layers.1.norm.weight"]
    assert (gate.source, gate.target, gate.change) == ("[:, :]", "[:, 0:12]", "transposed")
    assert (norm.change, norm.status, norm.dtype, norm.elements) == ("+1", "offset", "float32", 8)
    assert norm.message == "layers.1.norm.weight arrives in layers.1.norm.weight as w + 1"
    assert finding(got.findings, "layers.1.norm.weight").mapping == "[:] -> layers.1.norm.weight[:] as +1"
    turned = finding(got.findings, "layers.0.mlp.gate_proj.weight").mapping
    assert turned == "[:, :] -> layers.0.mlp.gate_up_proj.weight[:, 0:12] transposed"


@pytest.mark.parametrize(("problem", "name", "verdict"), [
    ("offset", r"layers\.\d+\.norm\.weight", "pass"),
    ("offset", r"layers\.1\.norm", "fail"),
    ("scale", r"layers\.\d+\.norm\.weight", "fail"),
])  # fmt: skip
def test_allowed_problems(problem: str, name: str, verdict: str) -> None:
    toy = Toy()
    rule = Allowed(problem=problem, name=name, reason="Gemma stores w - 1")
    got = judged(toy, expected=toy.expected(allowed=[rule]), fault=altered("layers.1.norm", lambda t: t + 1))
    told = finding(got.findings, "layers.1.norm.weight")
    assert told.verdict == verdict
    assert (told.message == "Gemma stores w - 1") == (verdict == "pass")
    assert {f.verdict for f in got.findings if f.point != told.point} == {"pass"}


def test_what_may_be_left_out_is_skipped_and_told() -> None:
    toy = Toy()
    rule = Allowed(problem="unread", name=r".*rotary.*", reason="made from the config")
    fault = dropped("2.attn.q_proj.bias")
    spare = toy.expected().tensors | {"rotary.inv_freq": ((4,), "float32")}
    got = judged(toy, expected=toy.expected(tensors=spare, allowed=[rule]), fault=fault)
    assert finding(got.findings, "rotary.inv_freq").verdict == "skip"
    assert [(u.side, u.point, u.reason) for u in got.coverage.skipped] == [
        ("reference", "rotary.inv_freq", "made from the config")
    ]
    assert (got.coverage.points, got.coverage.compared) == (len(spare) + 1, len(spare))
    assert [r.status for r in got.rows if r.tensor == "rotary.inv_freq"] == ["skip"]


def test_what_the_reference_does_not_use_either() -> None:
    toy = Toy()
    layout = toy.expected().reference or ReferenceLayout()
    without = {n: p for n, p in layout.parameters.items() if n != "layers.0.norm.weight"}
    expected = toy.expected(reference=msgspec.structs.replace(layout, parameters=without))
    got = judged(toy, expected=expected, fault=dropped("layers.0.norm"))
    assert finding(got.findings, "layers.0.norm.weight").message.startswith("layers.0.norm.weight[:] is never written")
    expected = msgspec.structs.replace(expected, tensors=expected.tensors | {"extra": ((3,), "float32")})
    unused = finding(judged(toy, expected=expected).findings, "extra")
    assert (unused.verdict, unused.message) == ("skip", "the reference does not use this tensor either")
    blind = msgspec.structs.replace(expected, reference=None)
    assert finding(judged(toy, expected=blind).findings, "extra").verdict == "fail"


def test_a_head_that_the_config_ties_is_not_used() -> None:
    toy = Toy(tied=True)
    tensors = toy.expected().tensors | {"head.weight": ((10, 8), "float32")}
    got = judged(toy, expected=toy.expected(tensors=tensors))
    head = finding(got.findings, "head.weight")
    assert (head.verdict, head.message) == (
        "skip", "the config ties the output head to the embedding, so this tensor is not used",
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_lost(tied: bool) -> None:
    toy = Toy()
    layout = msgspec.structs.replace(toy.expected().reference or ReferenceLayout(), tied=tied)
    got = judged(toy, expected=toy.expected(reference=layout), fault=dropped("head.weight"))
    assert finding(got.findings, "head.weight").verdict == "fail"
    assert [f.point for f in got.findings if "never written" in f.message or "unwritten" in f.metrics] == [
        "head.weight"
    ]
    assert ("unread" in finding(got.findings, "head.weight").metrics) == (not tied)


def test_a_rank_that_was_not_traced_says_nothing_of_the_weights() -> None:
    whole = subject(Toy(ranks=2))
    ledgers = [whole.ledgers[0], RankLedger(rank=1, found=WeightMap(), error="KeyError: 'w13'")]
    got = judge_weights(WeightSubject(ledgers, Toy().expected()))
    assert [(s.point, s.reason) for s in got.coverage.skipped] == [
        ("rank 1", "the loader was not traced: KeyError: 'w13'")
    ]
    assert (got.findings, got.rows) == ([], [])
    assert check_verdict(got.coverage, got.findings, min_coverage=0.5) == "skip"


def test_scalars_and_buffers() -> None:
    found = WeightMap(
        tensors={"scale": TensorInfo(shape=(), dtype="float32")},
        parameters=[
            ParameterInfo(name="inv_freq", shape=(4,), dtype="float32", buffer=True),
            ParameterInfo(name="gone", shape=(2,), dtype="float32"),
        ],
        gaps=[
            Gap(parameter="inv_freq", target=(Span(0, 4),), kind="unwritten"),
            Gap(parameter="gone", target=(Span(0, 2),), kind="unwritten"),
        ],
    )
    got = judge_weights(WeightSubject([RankLedger(found=found)], Expected(tensors={"scale": ((), "float32")})))
    assert [(f.point, f.metric, f.candidate_point) for f in got.findings] == [
        ("scale", "unread", ""), ("gone", "unwritten", "gone"),
    ]  # fmt: skip
    (skipped,) = got.coverage.skipped
    assert (skipped.side, skipped.point) == ("candidate", "inv_freq")


ROWS = st.builds(WeightRow, tensor=TEXT, parameter=TEXT, rank=COUNTS, source=TEXT, target=TEXT, change=TEXT,
                 elements=COUNTS, dtype=TEXT, status=TEXT, message=TEXT)  # fmt: skip


@given(st.lists(ROWS, max_size=4))
def test_rows_survive_their_file(tmp_path_factory: pytest.TempPathFactory, rows: list[WeightRow]) -> None:
    path: Path = tmp_path_factory.mktemp("rows") / "run.jsonl"
    one = Side(engine="hf", model="m", dtype="float32")
    run = Run(schema=SCHEMA_VERSION, paritykit="0", reference=one, candidate=one, checks=[])
    summary = Summary(verdict="pass", compared=0, failed=0, skipped=0, unmatched=0)
    write_jsonl(Results(run=run, weights=rows, summary=summary), path)
    assert read_jsonl(path).weights == rows
