"""What never ran is said, in the records and in every report; what ran is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import torch

from paritykit.case import Case, cases
from paritykit.errors import UsageError
from paritykit.notes import Ran, attempt, notes_of
from paritykit.reports import REPORTS
from paritykit.results import Results, Run, Side, Summary

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


def test_a_named_case_that_was_cut_is_told() -> None:
    cut = cases("long-200", "short").resolve(vocab_size=99, max_positions=64)
    (note,) = notes_of(Ran(side(), {}, cut))
    assert note == "cases were cut to what the model's positions take: long-200 to 56 tokens"
    assert not list(notes_of(Ran(side(), {}, cases("long-200").resolve(vocab_size=99, max_positions=512))))


def test_experts_that_no_token_chose_are_told() -> None:
    idle = {"layers.0.router": (3, 8), "layers.1.router": (0, 8)}
    (note,) = notes_of(Ran(side(), {}, CASES, idle))
    assert note.startswith("3 of 16 experts were chosen by no token")
    assert not list(notes_of(Ran(side(), {}, CASES, {"layers.0.router": (0, 8)})))


@pytest.mark.parametrize("name", REPORTS.names())
def test_every_report_shows_notes(name: str) -> None:
    summary = Summary(verdict="pass", compared=1, failed=0, skipped=0, unmatched=0, notes=["no adapter ran"])
    run = Run(paritykit="0", reference=side(), candidate=side(), checks=["logits"])
    found = Results(run=run, cases=[], coverage=[], findings=[], weights=[], summary=summary)
    assert "no adapter ran" in REPORTS.get(name)(found).decode()


def tried(error: Exception) -> tuple[list[str], str]:
    said: list[str] = []

    def fail() -> str:
        raise error

    return said, attempt("the diagnosis", fail, "instead", notes=said)


def test_what_fails_beside_a_run_is_a_note() -> None:
    told, found = tried(ZeroDivisionError("no rows"))
    assert found == "instead"
    (note,) = told
    assert note.startswith("the diagnosis failed, so it says nothing: ZeroDivisionError: no rows (test_notes.py:")


def test_a_wrong_request_is_no_failure_beside_a_run() -> None:
    with pytest.raises(UsageError, match="no such rule"):
        tried(UsageError("no such rule"))


def test_a_version_of_a_class_of_its_own_is_a_string() -> None:
    """``torch.__version__`` is no plain string, and cannot be encoded as it is."""
    assert type(torch.__version__) is not str
    made = Side(engine="mine", model="m", dtype="float32", versions={"torch": torch.__version__})
    assert msgspec.json.decode(msgspec.json.encode(made), type=Side).versions == {"torch": str(torch.__version__)}
