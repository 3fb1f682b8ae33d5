"""Mistakes that no cause of the table knows, in a model of transformers: named in the reference's own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from paritykit.diagnose.edits.ask import Question
from paritykit.engines.hf import HFEngine
from paritykit.plan import make_plan
from paritykit.results import Results
from paritykit.session import Session

ATTENTION = "model.layers.1.self_attn"
Plant = Callable[[Any], object]


class Planted(HFEngine):
    """A model of transformers in which something is changed as soon as it is loaded."""

    plant: Plant = staticmethod(lambda _: None)

    def open(self) -> None:
        super().open()
        self.plant(self._model.get_submodule(ATTENTION))


def without_norm(attention: Any) -> None:
    attention.q_norm = nn.Identity()


def exchanged(attention: Any) -> None:
    attention.q_norm, attention.k_norm = attention.k_norm, attention.q_norm


def compared(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> tuple[Results, list[Question]]:
    """A run of tiny Qwen3 against itself with something planted, and what the reference's process was asked."""
    plan = make_plan("tiny:qwen3", given={"candidate": "hf", "dtype": "float32"}, case_names=("short", "long-40"))
    candidate = Planted(str(plan.checkpoint.path), dtype="float32")
    candidate.plant = plant
    asked: list[Question] = []
    real = Session._edited

    def edited(session: Session, question: Question) -> Any:
        asked.append(question)
        return real(session, question)

    monkeypatch.setattr(Session, "_edited", edited)
    with plan.open() as session:
        session._candidate, session._together = candidate, False
        return session.results(["modules", "logits"]), asked


@pytest.mark.parametrize(
    ("plant", "label", "module"),
    [(without_norm, "q_norm left out", ATTENTION), (exchanged, "q_norm and k_norm exchanged", f"{ATTENTION}.k_norm")],
)
def test_a_step_is_named_with_its_line(plant: Plant, label: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results, asked = compared(plant, monkeypatch)
    summary = results.summary
    assert summary.first_divergence is not None
    assert summary.first_divergence.point == module
    (cause,) = summary.causes
    assert (cause.code, cause.name) == ("PK190", "step-changed")
    assert cause.confidence > 0.9
    assert cause.evidence.startswith(f"with {label} at modeling_qwen3.py:")
    assert f"the reference's {ATTENTION} gives the candidate's numbers" in cause.evidence
    assert "`query_states = self.q_norm(" in cause.evidence
    assert len(asked) == 1
    assert not summary.notes


def test_a_clean_pair_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results, asked = compared(lambda _: None, monkeypatch)
    assert (results.summary.verdict, asked) == ("pass", [])


def test_where_memory_is_short_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paritykit.session.free_memory", lambda: 1 << 10)
    results, asked = compared(without_norm, monkeypatch)
    assert len(asked) == 1
    assert [c.name for c in results.summary.causes] == ["unknown"]
    assert any(n.startswith("the reference's code was not edited") for n in results.summary.notes)
