"""What never ran is said, in the records and in every report; what ran is not."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from paritykit.case import Case
from paritykit.errors import UsageError
from paritykit.notes import Ran, notes_of
from paritykit.reports import REPORTS
from paritykit.results import Results, Run, Side, Summary
from paritykit.runner import Session

CASES = [Case(id="a", tokens=(1,) * 40, new_tokens=3)]


def side(**args: str) -> Side:
    return Side(engine="vllm", model="m", dtype="float32", args=args)


def notes(config: Mapping[str, Any] | None = None, /, **args: str) -> list[str]:
    return list(notes_of(Ran(side(**args), config or {}, CASES)))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"enable_lora": "True"}, "no adapter was named"),
        ({"enforce_eager": "False"}, "modules were not compared there"),
        ({"speculative_config": "{'method': 'ngram'}"}, "whether any drafted token was verified is not known"),
    ],
)
def test_what_was_asked_for_and_never_ran(args: dict[str, str], words: str) -> None:
    (note,) = notes({}, **args)
    assert words in note


def test_an_ordinary_run_has_none() -> None:
    assert not notes({"sliding_window": None}, enforce_eager="True", enable_lora="False", speculative_config="None")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"sliding_window": 4096}, True),
        ({"sliding_window": 42}, True),
        ({"sliding_window": 41}, False),
        ({"sliding_window": 4096, "use_sliding_window": False}, False),
        ({"sliding_window": 4096, "layer_types": ["full_attention"]}, False),
        ({"sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"]}, True),
    ],
)
def test_a_window_that_no_case_reaches(config: dict[str, Any], said: bool) -> None:
    """A case of 40 tokens that chooses 3 computes 42 positions."""
    assert CASES[0].positions == 42
    assert bool(notes(config)) == said


@pytest.mark.parametrize("name", REPORTS.names())
def test_every_report_shows_notes(name: str) -> None:
    summary = Summary(verdict="pass", compared=1, failed=0, skipped=0, unmatched=0, notes=["no adapter ran"])
    run = Run(paritykit="0", reference=side(), candidate=side(), checks=["logits"])
    found = Results(run=run, cases=[], coverage=[], findings=[], weights=[], summary=summary)
    assert "no adapter ran" in REPORTS.get(name)(found).decode()


def attempt(error: Exception) -> tuple[list[str], object]:
    session = SimpleNamespace(notes=[])

    def fail() -> str:
        raise error

    return session.notes, Session._attempt(session, "the diagnosis", fail, "instead")  # type: ignore[arg-type]


def test_what_fails_beside_a_run_is_a_note() -> None:
    told, found = attempt(ZeroDivisionError("no rows"))
    assert found == "instead"
    (note,) = told
    assert note.startswith("the diagnosis failed, so it says nothing: ZeroDivisionError: no rows (test_notes.py:")


def test_a_wrong_request_is_no_failure_beside_a_run() -> None:
    with pytest.raises(UsageError, match="no such rule"):
        attempt(UsageError("no such rule"))


def test_a_version_of_a_class_of_its_own_is_a_string() -> None:
    """``torch.__version__`` is no plain string, and cannot be encoded as it is."""
    assert type(torch.__version__) is not str
    made = Side(engine="mine", model="m", dtype="float32", versions={"torch": torch.__version__})
    assert msgspec.json.decode(msgspec.json.encode(made), type=Side).versions == {"torch": str(torch.__version__)}
