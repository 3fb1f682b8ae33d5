"""What is kept of the matrix, what is run again, and what its page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.matrix.command import execute
from benchmarks.matrix.page import render
from benchmarks.matrix.pair import outcome_of
from benchmarks.matrix.row import Row, Task, add_row, left, read_rows
from paritykit.errors import EngineError, UsageError
from paritykit.testing.drawn.catalogue import sample

AGREE = {"modules": "fail", "logits": "pass", "tokens": "pass"}


def row(model_type: str = "cohere", **known: Any) -> Row:
    task = Task(model_type=model_type, dtype=known.pop("dtype", "float32"))
    return Row(**{"task": task, "source": "aaa", "outcome": "pass", "architecture": "X", **known})


def test_rows_are_read_back_and_the_last_of_a_task_counts(tmp_path: Path) -> None:
    book = tmp_path / "deep" / "rows.jsonl"
    add_row(book, row(outcome="could not run"))
    add_row(book, row(outcome="pass"))
    add_row(book, row("bloom"))
    with book.open("ab") as file:
        file.write(b'{"task": {"model')
    assert [(r.task.model_type, r.outcome) for r in read_rows(book)] == [("cohere", "pass"), ("bloom", "pass")]
    book.write_bytes(b"nothing\n")
    with pytest.raises(UsageError, match="line 1"):
        read_rows(book)


def test_what_ran_is_not_run_again_for_the_same_source() -> None:
    tasks = [Task(model_type=n, dtype="float32") for n in ("a", "b", "c")]
    rows = [row("a"), row("b", outcome="could not run")]
    assert [t.model_type for t in left(tasks, rows, "aaa")] == ["b", "c"]
    assert [t.model_type for t in left(tasks, rows, "bbb")] == ["a", "b", "c"]
    assert [t.model_type for t in left(tasks, rows, "")] == ["b", "c"]


def test_a_false_alarm_is_a_failure_of_which_nothing_comes_out() -> None:
    assert row(outcome="fail", checks=AGREE).false_alarm
    assert not row(outcome="fail", checks={**AGREE, "logits": "fail"}).false_alarm
    assert not row(outcome="fail").false_alarm
    assert not row(checks=AGREE).false_alarm


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("vLLM cannot start the model: no such head size", "refused"),
        ("the engine's process died of signal 6; its last words:\n  free(): invalid", "could not run"),
        ("KeyError: 'x'; the engine's last words:\n  KeyError", "error"),
    ],
)
def test_what_an_engine_says_is_told_from_what_breaks(text: str, outcome: str) -> None:
    assert outcome_of(EngineError(text)) == outcome


def test_the_page_says_what_the_rows_say() -> None:
    rows = [
        row("bloom", outcome="fail", failed=2, compared=9, first="h.0", causes=["PK125 residual"], checks=AGREE),
        row("bloom", dtype="bfloat16"),
        row("cohere", outcome="refused", reason="no <kernel> | here"),
        row("dbrx", backend="TransformersForCausalLM", refusal="vLLM cannot start it"),
    ]
    page = render(rows, {"bloom": "Bloom", "cohere": "Cohere"}, planned=6)
    assert "**Not finished:** 2 of 6 pairs" in page
    assert "| `bloom` | X | Bloom | fail 2 of 9, a false alarm | pass | `h.0` | PK125 residual |" in page
    assert "| `cohere` | X | Cohere | refused |  |  | no &lt;kernel> \\| here |" in page
    assert "| `dbrx` | X | TransformersForCausalLM | pass |  |  | own class refuses: vLLM cannot start it |" in page
    assert "| of these with equal logits and tokens | 1 | 0 |" in page
    assert "Not finished" not in render(rows, {}, planned=4)


def test_a_sample_does_not_depend_on_the_order() -> None:
    names = [f"n{i}" for i in range(40)]
    assert sample(names, 5, seed=1) == sample(names[::-1], 5, seed=1)
    assert sample(names, 5, seed=1) != sample(names, 5, seed=2)


def test_a_command_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["--out", str(tmp_path), "--shard", "3/2", "--no-run"]) == 2
    assert "--shard" in capsys.readouterr().err
