"""Records survive their file; a file that is not a whole run is refused with its reason."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paritykit.errors import UsageError
from paritykit.results import (
    SCHEMA_VERSION,
    VERDICTS,
    CaseInfo,
    Cause,
    Coverage,
    Divergence,
    Finding,
    Results,
    Run,
    Side,
    Summary,
    Unmatched,
    encode_record,
    read_jsonl,
    write_jsonl,
    write_whole,
)

TEXT = st.text(max_size=12)
COUNTS = st.integers(0, 10**9)
NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
TOKENS = st.lists(st.integers(0, 2**40), max_size=5)
VERDICT = st.sampled_from(VERDICTS)
ORIGIN = st.sampled_from([None, "introduced", "inherited"])
SIDES = st.builds(Side, engine=TEXT, model=TEXT, dtype=TEXT, parallel=st.dictionaries(TEXT, COUNTS, max_size=2))
CAUSES = st.lists(st.builds(Cause, code=TEXT, name=TEXT, confidence=st.floats(0, 1), evidence=TEXT), max_size=2)
LEFT_OUT = st.lists(
    st.builds(Unmatched, side=st.sampled_from(["reference", "candidate"]), point=TEXT, reason=TEXT), max_size=2
)
RUNS = st.builds(Run, schema=st.just(SCHEMA_VERSION), paritykit=TEXT, reference=SIDES, candidate=SIDES,
                 checks=st.lists(TEXT, max_size=2), command=TEXT)  # fmt: skip
CASES = st.builds(CaseInfo, id=TEXT, tokens=TOKENS, new_tokens=COUNTS, batch=COUNTS, reference_tokens=TOKENS)
COVERAGES = st.builds(Coverage, check=TEXT, points=COUNTS, compared=COUNTS, skipped=LEFT_OUT, unmatched=LEFT_OUT)
FINDINGS = st.builds(Finding, check=TEXT, case=TEXT, point=TEXT, verdict=VERDICT, value=NUMBERS, allowed=NUMBERS,
                     origin=ORIGIN, causes=CAUSES, metrics=st.dictionaries(TEXT, NUMBERS, max_size=3),
                     positions=st.none() | st.tuples(COUNTS, COUNTS), profile=st.lists(NUMBERS, max_size=3),
                     failing=st.lists(st.tuples(COUNTS, COUNTS), max_size=2))  # fmt: skip
DIVERGENCES = st.none() | st.builds(Divergence, check=TEXT, case=TEXT, point=TEXT, origin=ORIGIN)
SUMMARIES = st.builds(Summary, verdict=VERDICT, compared=COUNTS, failed=COUNTS, skipped=COUNTS, unmatched=COUNTS,
                      first_divergence=DIVERGENCES, causes=CAUSES, seconds=NUMBERS)  # fmt: skip
RESULTS = st.builds(Results, run=RUNS, cases=st.lists(CASES, max_size=2), coverage=st.lists(COVERAGES, max_size=2),
                    findings=st.lists(FINDINGS, max_size=3), summary=SUMMARIES)  # fmt: skip


def a_run() -> Results:
    side = Side(engine="hf", model="tiny", dtype="float32")
    run = Run(paritykit="0.1.0", reference=side, candidate=side, checks=["modules"])
    finding = Finding(check="modules", case="short", point="model.norm", verdict="pass")
    return Results(run=run, findings=[finding], summary=summary("pass"))


def summary(verdict: Any, *, compared: int = 1) -> Summary:
    return Summary(verdict=verdict, compared=compared, failed=0, skipped=0, unmatched=0)


@given(results=RESULTS)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, results: Results) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    write_jsonl(results, path)
    assert read_jsonl(path) == results
    lines = path.read_bytes().splitlines()
    assert len(lines) == len(list(results.records()))
    assert all(line.startswith(b'{"type":') for line in lines)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not_become_null(number: float, tmp_path: Path) -> None:
    results = a_run()
    finding = msgspec.structs.replace(results.findings[0], value=number, metrics={"max_abs": number}, profile=[number])
    results.findings = [finding]
    write_jsonl(results, tmp_path / "run.jsonl")
    back = read_jsonl(tmp_path / "run.jsonl").findings[0]
    assert (back.value, back.metrics, back.profile) == (None, {"max_abs": None}, [None])
    json.loads(encode_record(finding), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_a_later_field_is_read_past(tmp_path: Path) -> None:
    lines = [json.loads(encode_record(r)) | {"added_later": 1} for r in a_run().records()]
    (tmp_path / "run.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_jsonl(tmp_path / "run.jsonl") == a_run()


@pytest.mark.parametrize(("verdict", "compared", "code"), [
    ("pass", 3, 0), ("fail", 3, 1), ("error", 3, 3), ("error", 0, 3), ("inconclusive", 3, 4), ("skip", 3, 4),
    ("inconclusive", 0, 5), ("skip", 0, 5), ("pass", 0, 5),
])  # fmt: skip
def test_exit_codes(verdict: str, compared: int, code: int) -> None:
    assert summary(verdict, compared=compared).exit_code == code


def damaged() -> dict[str, tuple[list[bytes], str]]:
    """Files that are not a whole run, and what is said about each."""
    run, finding, last = [encode_record(record) for record in a_run().records()]
    newer = run.replace(b'"schema":1', b'"schema":2')
    return {
        "empty": ([], "expected one 'run' record, found 0"),
        "no run": ([finding, last], "expected one 'run' record, found 0"),
        "two runs": ([run, run, last], "expected one 'run' record, found 2"),
        "unfinished": ([run, finding], "the run did not finish"),
        "summary not last": ([run, last, finding], "the run did not finish"),
        "two summaries": ([run, last, last], "the run did not finish"),
        "cut": ([run, finding[:-9], last], "line 2: not a ParityKit record"),
        "not text": ([run, b"\xff\xfe", last], "line 2: not a ParityKit record"),
        "unknown kind": ([run, b'{"type":"poem"}', last], "line 2: not a ParityKit record"),
        "unknown verdict": ([run, finding.replace(b'"pass"', b'"fine"'), last], "line 2: not a ParityKit record"),
        "newer": ([newer, finding, last], "schema 2, but this ParityKit reads schema 1"),
        "newer, with a new kind": ([newer, b'{"type":"poem"}', last], "schema 2, but this ParityKit reads schema 1"),
    }


@pytest.mark.parametrize("name", damaged())
def test_what_is_no_whole_run_is_refused(name: str, tmp_path: Path) -> None:
    lines, said = damaged()[name]
    (tmp_path / "run.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UsageError, match=said):
        read_jsonl(tmp_path / "run.jsonl")


@given(cut=st.integers(0, 10**6))
def test_no_prefix_of_a_run_reads_as_a_run(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    whole = b"\n".join(encode_record(record) for record in a_run().records())
    path = tmp_path_factory.getbasetemp() / "prefix.jsonl"
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(UsageError):
        read_jsonl(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        read_jsonl(tmp_path / "run.jsonl")


def test_writing_makes_folders_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "report.html"
    write_whole(target, b"one")
    write_whole(target, b"two")
    assert target.read_bytes() == b"two"
    assert os.listdir(target.parent) == ["report.html"]


@pytest.mark.parametrize("name", ["file/report.html", "file/deeper/report.html", "folder", "x" * 250, "", "."])
def test_where_nothing_can_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    target = f"{tmp_path}/{name}"
    with pytest.raises(UsageError, match="cannot write"):
        write_whole(target, b"data")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_bytes(b"old")
    (tmp_path / f".report.html.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"cannot write .*No space left"):
        write_whole(target, b"x" * 100_000)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.html"]
