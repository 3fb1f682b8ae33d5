"""The terminal, Markdown, JUnit and JSONL reports, and the words they share."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as Xml

import msgspec
import pytest
from rich.console import Console

from paritykit.errors import UnknownNameError
from paritykit.reports import REPORTS, markdown, write_report
from paritykit.reports.repro import repro
from paritykit.reports.terminal import failure_text, print_summary, show_point
from paritykit.reports.wording import extent, number, shorten, visible
from paritykit.results import Divergence, Local, Results, read_jsonl
from tests.report import runs

RUNS = {
    "fail": runs.failing_run(),
    "replayed": runs.replayed_run(culprits=5),
    "pass": runs.passing_run(),
    "inconclusive": runs.inconclusive_run(),
    "nothing": runs.nothing_compared(),
}
HOSTILE = "</testcase>]]>&\x00\x1b[31m\u202e|`<b>\n# x"


def summary(results: Results, *, verbose: bool = False) -> str:
    buffer = io.StringIO()
    print_summary(results, console=Console(file=buffer, width=80), verbose=verbose)
    return buffer.getvalue()


def test_every_format_writes_a_file(tmp_path: Path) -> None:
    for name in REPORTS.names():
        write_report(RUNS["fail"], format=name, path=tmp_path / name)
        assert (tmp_path / name).stat().st_size > 500
    assert sorted(REPORTS.names()) == ["html", "jsonl", "junit", "markdown", "terminal"]


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'markdown'"):
        write_report(RUNS["fail"], format="markdwn", path=tmp_path / "x")


def test_jsonl_reads_back_the_same(tmp_path: Path) -> None:
    write_report(RUNS["fail"], format="jsonl", path=tmp_path / "run.jsonl")
    assert read_jsonl(tmp_path / "run.jsonl") == RUNS["fail"]


@pytest.mark.parametrize("name", RUNS)
def test_a_summary_is_short_and_plain(name: str) -> None:
    text = summary(RUNS[name])
    assert len(text.splitlines()) <= 25
    assert "\x1b" not in text
    assert "skipped" in text
    assert "unmatched" in text


def test_the_words_of_each_verdict() -> None:
    assert summary(RUNS["pass"]).startswith("PASS  all 144 comparisons within tolerance")
    assert "0.50 of allowed" in summary(RUNS["pass"])
    assert summary(RUNS["nothing"]).startswith("NOTHING COMPARED  no point of the reference met")
    assert summary(RUNS["inconclusive"]).startswith("INCONCLUSIVE  coverage 70%, below the 90% asked for")
    assert "kv_cache not run" in summary(RUNS["fail"])


def test_a_failure_reads_in_the_agreed_order() -> None:
    lines = failure_text(RUNS["fail"], report="parity.html").splitlines()
    assert lines[0] == "modules / long-40: vllm (bfloat16) differs from hf (float32)"
    labels = [line[2:18].strip() for line in lines[1:]]
    assert labels == [
        "first divergence", "seen at", "rel_l2", "extent", "cause", "after", "counts", "unmatched", "skipped", "repro",
        "report",
    ]  # fmt: skip
    assert "introduced here (its input is within tolerance)" in lines[1]
    assert "allowed 3.5e-03 (3 x noise floor)   noise floor 1.2e-03" in lines[3]
    assert lines[4].endswith("tokens >= 32 only (of 0-39)")
    assert lines[-1].endswith("parity.html#/point/modules/long-40/model.layers.2.self_attn.o_proj%23input")


def told(results: Results, *labels: str) -> list[str]:
    lines = failure_text(results).splitlines()
    return [line[20:] for line in lines if line[2:18].strip() in labels]


def test_a_replayed_failure_names_every_culprit() -> None:
    two, five = runs.replayed_run(), RUNS["replayed"]
    assert "introduced here (wrong on the reference's own values)" in failure_text(two).splitlines()[1]
    assert told(two, "local") == ["rel_l2 0.25   allowed 1.0e-03   on the reference's own values, leaves"]
    where = "rel_l2 0.25   allowed 1.0e-03   on the reference's own values, leaves"
    assert told(two, "also wrong") == [f"model.layers.3.mlp    {where}"]
    first, rest = told(five, "also wrong")
    assert first == f"model.layers.3.input_layernorm    {where}"
    assert rest == "3 more: model.layers.3.self_attn, model.layers.3.mlp, model.norm"


def test_the_same_module_of_several_layers_is_told_once() -> None:
    results = runs.replayed_run()
    names = [f"model.layers.{n}.self_attn" for n in (2, 3, 4, 7)]
    found = [Divergence(check="modules", case="long-40", point=n, seen_at=n) for n in names]
    many = msgspec.structs.replace(results.summary, culprits=found)
    assert told(msgspec.structs.replace(results, summary=many), "also wrong")[0].startswith(
        "model.layers.{3-4,7}.self_attn"
    )


def test_a_replay_without_a_culprit_says_that_differences_add_up() -> None:
    none = runs.replayed_run(culprits=0)
    assert told(none, "culprits") == [
        "none: on the reference's own values every module is within tolerance, so small differences add up"
    ]
    assert told(runs.failing_run(), "culprits", "local", "also wrong") == []


def test_logits_alone_say_nothing_of_modules() -> None:
    none = runs.replayed_run(culprits=0)
    given = [msgspec.structs.replace(f, check="logits") for f in none.findings]
    assert told(msgspec.structs.replace(none, findings=given), "culprits") == [
        "not known: only what the model gives was compared; --check modules tells which module is wrong"
    ]


def test_a_replay_that_failed_says_why() -> None:
    results = runs.failing_run()
    broken = [msgspec.structs.replace(f, local=Local(verdict="error", message="it died")) for f in results.findings]
    results = msgspec.structs.replace(results, findings=broken)
    assert told(results, "local") == ["not measured: it died"]
    assert told(results, "culprits") == []
    assert "introduced here (its input is within tolerance)" in failure_text(results)


def test_show_tells_right_modules_from_wrong_ones(capsys: pytest.CaptureFixture[str]) -> None:
    show_point(runs.replayed_run(), "model.layers.3.mlp", console=Console(width=200))
    wrong = capsys.readouterr().out
    show_point(runs.replayed_run(), "model.layers.3.self_attn", console=Console(width=200))
    right = capsys.readouterr().out
    assert "introduced here (wrong on the reference's own values)" in wrong
    assert "inherited (right on the reference's own values)" in right
    assert "rel_l2 2.0e-04   allowed 1.0e-03" in right


def test_markdown_has_local_errors_beside_the_others() -> None:
    lines = REPORTS.get("markdown")(runs.replayed_run()).decode().splitlines()
    head = next(line for line in lines if line.startswith("| verdict")).split(" | ")
    row = next(line for line in lines if "`model.layers.3.mlp`" in line and line.startswith("| fail")).split(" | ")
    assert len(head) == len(row)
    assert row[head.index("local")] == "0.25"


def test_verbose_adds_every_failure() -> None:
    text = summary(RUNS["fail"], verbose=True)
    assert sum(line.startswith("FAIL  ") for line in text.splitlines()) == 1 + 42


def test_colour_only_where_the_terminal_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def colourful() -> str:
        buffer = io.StringIO()
        print_summary(RUNS["fail"], console=Console(file=buffer, force_terminal=True, color_system="truecolor"))
        return buffer.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;31mFAIL" in colourful()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in colourful()


def test_a_terminal_obeys_no_name() -> None:
    text = summary(runs.renamed(RUNS["fail"], HOSTILE), verbose=True)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\x00" not in text


def test_show_a_point() -> None:
    buffer = io.StringIO()
    show_point(RUNS["fail"], "model.layers.1.self_attn.q_proj", console=Console(file=buffer))
    text = buffer.getvalue()
    for said in (
        "modules / short",
        "modules / long-40",
        "modules / long-200",
        "cosine_gap",
        "3 x noise floor",
        "provenance",
    ):
        assert said in text


def test_show_says_why_a_point_was_left_out() -> None:
    buffer = io.StringIO()
    show_point(RUNS["fail"], "model.rotary_emb", console=Console(file=buffer))
    assert "compared inside attention" in buffer.getvalue()


def test_show_an_unknown_point() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean .*model\.layers\.1\.mlp"):
        show_point(RUNS["fail"], "model.layer.1.mlp", console=Console(file=io.StringIO()))


def test_junit_has_one_testcase_for_each_check_and_case() -> None:
    root = Xml.fromstring(REPORTS.get("junit")(RUNS["fail"]))
    suite = root[0]
    found = {(case.get("classname"), case.get("name")): [child.tag for child in case] for case in suite}
    assert found == {
        ("paritykit.modules", "short"): [],
        ("paritykit.modules", "long-40"): ["failure"],
        ("paritykit.modules", "long-200"): ["failure"],
        ("paritykit.tokens", "short"): [],
        ("paritykit.tokens", "long-40"): ["failure"],
        ("paritykit.tokens", "long-200"): ["failure"],
        ("paritykit.kv_cache", "kv_cache"): ["skipped"],
    }
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("7", "4", "1")


@pytest.mark.parametrize("name", ["inconclusive", "nothing"])
def test_junit_is_never_green_where_the_run_is_not(name: str) -> None:
    suite = Xml.fromstring(REPORTS.get("junit")(RUNS[name]))[0]
    assert suite.get("errors") == "1"


def test_junit_holds_any_name() -> None:
    suite = Xml.fromstring(REPORTS.get("junit")(runs.renamed(RUNS["fail"], HOSTILE)))[0]
    assert suite.get("failures") == "1"


def test_markdown_says_the_verdict_and_escapes() -> None:
    text = REPORTS.get("markdown")(RUNS["fail"]).decode()
    assert text.startswith("## ❌ FAIL: 42 of 144 comparisons")
    assert "| fail | `modules` | `long-40` | `model.layers.2.self_attn.o_proj#input` |" in text
    hostile = REPORTS.get("markdown")(runs.renamed(RUNS["fail"], HOSTILE)).decode()
    outside = hostile.split("```")[::2]
    assert not any("<b>" in part or "\n# x" in part for part in outside)


def test_markdown_stays_below_its_budget() -> None:
    data = REPORTS.get("markdown")(runs.big_run(120_000))
    assert len(data) <= markdown.BUDGET
    assert b"more rows are left out" in data


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.031, "3.1e-02"),
        (0.0, "0"),
        (0.98, "0.98"),
        (31.0, "31"),
        (1204.0, "1,204"),
        (2.5e9, "2.5e+09"),
        (None, "-"),
        (float("nan"), "not finite"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("failing", "text"),
    [
        ([(32, 39)], "tokens >= 32 only (of 0-39)"),
        ([(0, 39)], "all tokens (0-39)"),
        ([(3, 3), (8, 11)], "tokens 3, 8-11 of 0-39"),
        ([], ""),
    ],
)
def test_extents(failing: list[tuple[int, int]], text: str) -> None:
    found = msgspec.structs.replace(RUNS["fail"].findings[0], failing=failing, positions=(0, 39))
    assert extent(found) == text


def test_the_command_is_narrowed_to_the_first_divergence() -> None:
    fail = RUNS["fail"]
    assert repro(fail) == "paritykit run tiny/qwen2-window --candidate vllm --check modules --case long-40"
    own = msgspec.structs.replace(fail.run, command="pytest suites -k 'modules and short'")
    assert repro(msgspec.structs.replace(fail, run=own)) == "pytest suites -k 'modules and short'"
    command = "paritykit run m --cases mine.jsonl --case=a --check weights"
    assert fail.summary.first_divergence is not None
    mine = msgspec.structs.replace(fail.summary.first_divergence, case="mine-7")
    found = msgspec.structs.replace(
        fail,
        run=msgspec.structs.replace(fail.run, command=command),
        summary=msgspec.structs.replace(fail.summary, first_divergence=mine),
    )
    assert repro(found) == "paritykit run m --cases mine.jsonl --check modules --case mine-7"


def test_names_act_on_nothing() -> None:
    assert visible("a\u202eb\x1bc\nd") == "a\\u202eb\\u001bc d"
    assert len(shorten("x" * 5000, 300)) == 299


def test_reports_stay_light() -> None:
    code = (
        "import sys; from paritykit.reports import REPORTS; list(REPORTS.items());"
        "print(sorted({'torch', 'numpy', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def two_meanings() -> Results:
    """A passing run in which one point is named alike and one is judged by a reading."""
    run = RUNS["pass"]
    first, second, *rest = [f for f in run.findings if f.check == "modules"]
    named = msgspec.structs.replace(first, verdict="skip", kind="named_alike", metric="rel_l2", value=0.9, allowed=1e-5)
    read = msgspec.structs.replace(second, reading="its output x sigmoid(gate)")
    kept = [f for f in run.findings if f.check != "modules"]
    return msgspec.structs.replace(run, findings=[named, read, *rest, *kept])


@pytest.mark.parametrize("name", ["html", "junit", "markdown", "terminal"])
def test_every_report_tells_what_is_named_alike(tmp_path: Path, name: str) -> None:
    results = two_meanings()
    write_report(results, format=name, path=tmp_path / name)
    text = (tmp_path / name).read_text()
    for f in results.findings[:2]:
        assert f.point in text
    assert "sigmoid(gate)" in text
    assert "none fits" in text
    assert name == "terminal" or "Named alike, means something else" in text
    clean = tmp_path / "clean"
    write_report(RUNS["pass"], format=name, path=clean)
    assert "like, means something else" not in clean.read_text()
    assert "none fits" not in clean.read_text()


def test_a_point_that_is_named_alike_is_counted_and_is_not_the_worst_one() -> None:
    text = summary(two_meanings())
    assert "named alike 1" in text
    assert len(text.splitlines()) <= 25
    worst = next(line for line in text.splitlines() if "worst point" in line)
    assert two_meanings().findings[0].point not in worst
