"""Causes keep their promises: the right one is named first, a clean pair is given none, the odd stays unknown."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from paritykit.checks import CHECKS
from paritykit.cli import cli, execute
from paritykit.diagnose.catalogue import CAUSES, CauseKind, find_cause
from paritykit.diagnose.known import PLAIN
from paritykit.errors import UnknownNameError
from paritykit.reports.causes import markdown
from paritykit.testing.faults import FAULTS, find
from tests.causes import EXPLAINED, Answer, answers
from tests.faulty import Ground, Trial, homes
from tests.nano import one_thread

ROOT = Path(__file__).parents[2]
KINDS = dict(CAUSES.items())
WANTED = 0.8
SOME = {
    "rope-theta": "qwen2",
    "position-drift": "llama_tied",
    "window-missing-in-decode": "mistral",
    "attention-softcap-missing": "gemma2",
    "norm-offset-missing": "gemma3",
    "bias-doubled": "llama",
    "gate-up-interleaved": "qwen2",
    "residual-scaled": "gemma3",
    "head-permuted": "qwen2",
    "experts-not-renormalised": "mixtral",
    "kv-offset-not-advanced": "qwen2",
    "linear-in-half-precision": "llama",
}
"""One of each area, over all models."""


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    found = Ground(tmp_path_factory.mktemp("captures"), room=8)
    yield found
    found.close()


# the table


def test_names_are_those_of_the_design_and_the_faults() -> None:
    assert {f.cause for _, f in FAULTS.items() if f.cause} <= set(KINDS)
    assert {"pooling-type", "pooled-activation", "tuple-output", "unknown"} <= set(KINDS)
    assert set(PLAIN.values()) <= set(KINDS)


def test_every_cause_has_a_code_of_its_own_and_says_what_it_is() -> None:
    codes = [k.code for k in KINDS.values()]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"PK1\d\d", code) for code in codes)
    for kind in KINDS.values():
        assert all(text.endswith(".") for text in (kind.what, kind.tested, kind.look)), kind.name
        assert [callable(kind.source(t)) for t in kind.tests] or kind.name == "unknown"


def test_the_page_lists_all_of_them() -> None:
    page = (ROOT / "docs" / "causes.md").read_text(encoding="utf-8")
    assert markdown() in page, "docs/causes.md is not what `python -m paritykit.reports.causes` prints"


@pytest.mark.parametrize("name", ["PK102", "pk102", "sliding-window"])
def test_a_cause_is_explained_by_code_and_by_name(name: str) -> None:
    assert find_cause(name).name == "sliding-window"
    said = CliRunner().invoke(cli, ["explain", name])
    assert said.exit_code == 0
    assert "PK102 sliding-window" in said.output
    assert "vLLM #14896" in said.output


def test_without_a_name_all_causes_are_listed() -> None:
    said = CliRunner().invoke(cli, ["explain"]).output
    assert said == CliRunner().invoke(cli, ["list", "causes"]).output
    assert all(kind.code in said for kind in KINDS.values())


def test_an_unknown_cause_is_a_usage_error_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["explain", "rope-teta"]) == UnknownNameError.exit_code
    assert "did you mean 'rope-theta'" in capsys.readouterr().err


# what is said


@pytest.mark.parametrize("name", SOME)
def test_the_right_cause_is_named_first(ground: Ground, name: str, tmp_path: Path) -> None:
    fault = find(name)
    assert SOME[name] in homes(fault)
    for answer in answers(ground, fault, SOME[name], tmp_path):
        assert answer.first, answer.told()
        assert answer.causes[0].confidence > 0.9
        assert re.search(r"\d", answer.causes[0].evidence)
        assert answer.causes[0].code == KINDS[fault.cause].code


def test_the_evidence_names_what_was_changed_and_where(ground: Ground, tmp_path: Path) -> None:
    (answer,) = answers(ground, find("rope-theta"), "qwen2", tmp_path)
    evidence = answer.causes[0].evidence
    assert evidence.startswith("with a rotary base of 10000 instead of 5000 at model.layers.1.self_attn ")


@pytest.mark.parametrize("name", ["weight-of-another-layer", "value-corrupt"])
def test_what_the_ledger_sees_is_seen_in_captures_too(ground: Ground, name: str, tmp_path: Path) -> None:
    found = list(answers(ground, find(name), "qwen2", tmp_path))
    assert [a.source for a in found] == ["ledger", "captures"]
    assert all(a.first for a in found), [a.told() for a in found]


def test_a_clean_pair_is_given_no_cause(ground: Ground) -> None:
    made = Trial(ground, find("rope-theta"), "qwen2", 1)
    results = made.explained(made.clean())
    assert results.summary.causes == []
    assert not any(f.causes for f in results.findings)


def test_only_what_was_introduced_is_explained(ground: Ground) -> None:
    made = Trial(ground, find("rope-theta"), "qwen2", 1)
    results = made.explained(made.planted())
    first = results.summary.first_divergence
    assert first is not None
    told = {f.point for f in results.findings if f.causes}
    assert told == {first.seen_at}


@pytest.mark.parametrize("name", ["experts-fed-the-residual", "batch-rows-mixed-up"])
def test_what_no_cause_explains_is_called_unknown(ground: Ground, name: str, tmp_path: Path) -> None:
    fault = find(name)
    (answer,) = answers(ground, fault, next(iter(homes(fault))), tmp_path)
    assert [c.name for c in answer.causes] == ["unknown"]
    assert answer.causes[0].confidence == 0


def test_a_hypothesis_that_breaks_is_dropped_and_the_others_go_on(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(scene: object) -> Iterator[object]:
        yield from ()
        raise KeyError("not in this model")

    odd = CauseKind(code="PK198", name="odd", what="w", tested="t", look="l", tests=("odd.module:broken",))
    monkeypatch.setitem(sys.modules, "odd.module", SimpleNamespace(broken=broken))
    monkeypatch.setitem(CAUSES._values, "odd", odd)
    (answer,) = answers(ground, find("norm-eps"), "qwen2", tmp_path)
    assert answer.first


# how often


@pytest.mark.deep
def test_the_right_cause_is_first_for_most_faults_in_every_model(ground: Ground, tmp_path: Path) -> None:
    """Over every fault that nano can have and every model it fits; run with ``-s`` to see what was missed."""
    found: list[Answer] = []
    for fault in EXPLAINED:
        for name in homes(fault):
            found += answers(ground, fault, name, tmp_path)
        ground.captures = {k: v for k, v in ground.captures.items() if k.startswith("hf")}
    for answer in found:
        if not answer.first:
            print(answer.told())
    first, among = (sum(getattr(a, which) for a in found) / len(found) for which in ("first", "among"))
    models = Counter(a.model for a in found)
    print(
        f"{len(found)} answers on {len(EXPLAINED)} faults in {len(models)} models: {first:.1%} first, {among:.1%} among"
    )
    assert len(EXPLAINED) >= 60
    assert len(models) >= 6
    assert first >= WANTED
    assert set(CHECKS.names()) >= {"modules", "weights", "checkpoint"}
    for model in models:
        own = [a for a in found if a.model == model]
        assert sum(a.first for a in own) / len(own) >= WANTED, model
