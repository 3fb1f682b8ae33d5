"""The scoreboard as it is run: trials on real engines, a book that goes on, a page, and bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from paritykit.errors import EngineError, UsageError
from paritykit.testing.faults import find
from paritykit.testing.scoreboard import several
from paritykit.testing.scoreboard.command import child_options, execute
from paritykit.testing.scoreboard.ground import Ground
from paritykit.testing.scoreboard.loop import VERSIONS, check_versions, read_versions, run_all, versions
from paritykit.testing.scoreboard.outcome import Book, Outcome, read_outcomes
from paritykit.testing.scoreboard.page import read_board
from paritykit.testing.scoreboard.plan import Filter, Trial, make_plan
from paritykit.testing.scoreboard.rates import total
from paritykit.testing.scoreboard.runs import reason_of, run_trial
from tests.nano import one_thread

SEVERAL = [
    "--engine", "nano", "--family", "qwen2", "--dtype", "float32",
    "--fault", "rope-theta", "--fault", "norm-eps", "--full",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    found = Ground(tmp_path_factory.mktemp("captures"))
    yield found
    found.close()


def run(ground: Ground, fault: str, *, model: str = "qwen2", dtype: str = "float32", level: str = "loud") -> Outcome:
    kind = "null" if find(fault).kind == "null" else "fault"
    trial = Trial(kind=kind, engine="nano", model=model, dtype=dtype, fault=fault, level=level)  # type: ignore[arg-type]
    return run_trial(ground, trial)


# one trial each


@pytest.mark.parametrize(("dtype", "level", "low", "high"), [
    ("float32", "ten", 10 / 1.3, 13),
    ("bfloat16", "twice", 2 / 1.3, 2.6),
])  # fmt: skip
def test_a_fault_is_cut_to_what_its_level_asks_for(
    ground: Ground, dtype: str, level: str, low: float, high: float
) -> None:
    found = run(ground, "residual-dropped", dtype=dtype, level=level)
    assert found.ratio is not None
    assert found.full is not None
    assert low <= found.ratio <= high < found.full
    assert 0 < found.strength < 1
    assert found.found_by
    assert (found.wanted, found.exact) == ("model.layers.1", True)


def test_a_fault_that_is_quiet_at_full_strength_is_not_cut(ground: Ground) -> None:
    """In the second layer an epsilon is nothing beside what bfloat16 has done by then."""
    loud = run(ground, "norm-eps", dtype="bfloat16")
    assert loud.ratio is not None
    assert loud.ratio < 2
    assert not loud.quiet
    weak = run(ground, "norm-eps", dtype="bfloat16", level="ten")
    assert weak.quiet
    assert weak.ratio == weak.full == loud.ratio
    assert weak.verdict == ""


def test_a_fault_at_full_strength_is_found_placed_and_explained(ground: Ground) -> None:
    found = run(ground, "rope-theta")
    assert (found.verdict, found.strength, found.group) == ("fail", 1.0, "Rotary embedding and positions")
    assert found.found_by == ["logits", "modules"]
    assert (found.wanted, found.named, found.exact, found.near) == (*["model.layers.1.self_attn"] * 2, True, True)
    assert found.causes[0] == found.cause == "rope-theta"
    assert found.judges["allclose"]


def test_in_loading_the_ledger_speaks_first(ground: Ground) -> None:
    found = run(ground, "bias-not-loaded")
    assert {"weights", "modules"} <= set(found.found_by)
    assert found.causes[0] == "bias-missing"
    assert found.exact


def test_files_are_audited_and_run(ground: Ground) -> None:
    cut = run(ground, "file-truncated")
    assert (cut.found_by, cut.causes[0], cut.exact, cut.judges) == (["checkpoint"], "weight-corrupt", None, {})
    saved = run(ground, "config-norm-eps")
    assert "modules" in saved.found_by
    assert (saved.wanted, saved.exact) == ("model.layers.0.input_layernorm", True)
    assert not [p for p in ground.folder.iterdir() if (p / "config.json").exists()], "damaged copies are removed"


@pytest.mark.parametrize("fault", ["null-forward", "null-loading", "null-files"])
def test_what_is_no_fault_is_not_reported(ground: Ground, fault: str) -> None:
    found = run(ground, fault)
    assert (found.verdict, found.failed, found.error) == ("pass", [], "")
    assert not any(found.judges.values())


@pytest.mark.deep
def test_what_only_another_schedule_shows_is_found(ground: Ground) -> None:
    found = run(ground, "block-freed-early")
    assert set(found.found_by) == {"batching", "kv_cache"}
    assert (found.wanted, found.exact) == ("model.layers.0.self_attn", True)


@pytest.mark.deep
def test_an_fp8_cache_is_allowed_its_rounding_and_not_more(ground: Ground) -> None:
    checks = ("kv_cache",)
    trial = Trial(kind="clean", engine="nano", model="llama", dtype="float32", when="an fp8 KV cache", checks=checks)
    assert run_trial(ground, trial).verdict == "pass"
    found = run(ground, "kv-scale-unread", model="llama")
    assert found.found_by == ["kv_cache"]
    assert found.exact


def test_a_trial_that_cannot_run_is_an_outcome_too(ground: Ground) -> None:
    trial = Trial(kind="clean", engine="vlm", model="qwen2", dtype="float32", when="always")
    found = run_trial(ground, trial)
    assert "unknown engine 'vlm'" in found.error
    assert run(ground, "rope-theta").found_by, "others go on"


def test_captures_of_candidates_are_not_kept(ground: Ground) -> None:
    run(ground, "rope-theta")
    before = set(ground.folder.iterdir())
    run(ground, "rope-theta")
    assert set(ground.folder.iterdir()) == before


# the whole


def test_a_board_is_run_written_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, page = tmp_path / "out", tmp_path / "page.md"
    assert execute(["--out", str(folder), "--page", str(page), *SEVERAL]) == 0, capsys.readouterr().err
    first = read_outcomes(folder)
    assert {o.trial.fault for o in first} == {"rope-theta", "norm-eps"}
    assert {o.trial.level for o in first} >= {"loud", "ten"}
    board = read_board(page.with_suffix(".json"))
    assert board.planned == board.outcomes == len(first)
    assert total(board.cells, "loud", "ten").found == total(board.cells, "loud", "ten").tried > 2
    assert board.versions.keys() >= {"paritykit", "torch", "transformers"}
    book = folder / "shard-1-of-1.jsonl"
    lines = book.read_bytes().splitlines(keepends=True)
    book.write_bytes(b"".join(lines[1:]))
    assert execute(["--out", str(folder), "--page", str(page), "--quiet", *SEVERAL]) == 0
    assert len(book.read_bytes().splitlines()) == len(lines)
    kept = {o.trial.id: o.seconds for o in first[1:]}
    assert kept.items() <= {o.trial.id: o.seconds for o in read_outcomes(folder)}.items(), "the others were run again"


def test_time_is_up_before_the_next_trial_begins(tmp_path: Path) -> None:
    wanted = Filter(engines=("nano",), models=("qwen2",), faults=("norm-eps",))
    trials = [t for t in make_plan(full=True) if wanted.fits(t)]
    assert run_all(trials, tmp_path, name="a", minutes=0) == len(trials)
    assert read_outcomes(tmp_path) == []


@pytest.mark.deep
def test_shards_run_side_by_side(tmp_path: Path) -> None:
    folder, page = tmp_path / "out", tmp_path / "page.md"
    more = [*SEVERAL, "--family", "llama", "--processes", "2"]
    assert execute(["--out", str(folder), "--page", str(page), *more]) == 0
    assert read_board(page.with_suffix(".json")).models == {"nano": ["llama", "qwen2"]}
    assert len(list(folder.glob("shard-*-of-2.jsonl"))) == 2


@pytest.mark.parametrize(("options", "why"), [
    (["--fault", "rope-teta"], "did you mean 'rope-theta'"),
    (["--engine", "sglang"], "unknown engine 'sglang'"),
    (["--family", "gemma9"], "unknown family"),
    (["--shard", "3/2"], "--shard is I/N"),
    (["--shard", "0/2"], "--shard is I/N"),
    (["--shard", "1"], "--shard is I/N"),
    (["--shard", "1/2", "--processes", "2"], "leave out --shard"),
    (["--processes", "0"], "--processes"),
    (["--limit-minutes", "-1"], "--limit-minutes"),
    (["--fault", "window-missing", "--family", "qwen2"], "no trial fits all of that"),
    (["--no-run", "--page", "page.md"], "has no outcomes of a scoreboard"),
])  # fmt: skip
def test_bad_input_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], why: str
) -> None:
    assert execute(["--out", str(tmp_path / "out"), *options]) == 2
    told = capsys.readouterr().err
    assert why in told
    assert "Traceback" not in told
    assert not (tmp_path / "out" / "shard-1-of-1.jsonl").exists()


def test_a_folder_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([]) == 2
    assert "--out" in capsys.readouterr().err


def test_outcomes_of_other_versions_are_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / VERSIONS).write_bytes(msgspec.json.encode({"torch": "0.4"}))
    assert execute(["--out", str(tmp_path), *SEVERAL]) == 2
    assert "outcomes of other versions" in capsys.readouterr().err
    stale = Outcome(trial=next(t for t in make_plan() if t.fault == "norm-eps"), verdict="pass")
    Book(tmp_path / "shard-1-of-9.jsonl").add(stale)
    check_versions(tmp_path, fresh=True)
    assert read_outcomes(tmp_path) == []
    assert read_versions(tmp_path) == versions()
    Book(tmp_path / "shard-1-of-9.jsonl").add(stale)
    check_versions(tmp_path, fresh=True)
    assert read_outcomes(tmp_path) == [stale], "of the same versions they are kept"


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    assert execute(["--out", str(tmp_path / "out"), *SEVERAL]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_shards_are_told_what_was_asked_for(tmp_path: Path) -> None:
    wanted = Filter(engines=("nano",), faults=("rope-theta", "norm-eps"))
    found = child_options(tmp_path, wanted, full=True, minutes=2.5)
    assert found == [
        *("--out", str(tmp_path), "--quiet", "--engine", "nano", "--fault", "rope-theta", "--fault", "norm-eps"),
        *("--full", "--limit-minutes", "2.5"),
    ]


def test_a_shard_that_ends_badly_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)a shard ended with 2.*unknown fault 'rope-teta'"):
        several.run_in_processes(1, ["--out", str(tmp_path), "--fault", "rope-teta"], tmp_path, pause=0.1)


def test_the_reason_of_a_trial_that_could_not_run_names_no_folder() -> None:
    error = EngineError('AttributeError: no such thing; the engine\'s last words:\n  File "/home/me/a.py", line 3')
    assert reason_of(error) == "EngineError: AttributeError: no such thing"
    assert reason_of(EngineError("")) == "EngineError: "
