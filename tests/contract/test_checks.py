"""Every check sees each fault it promises to detect, and stays quiet on a clean pair."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import paritykit as pk
from paritykit.audit import audit
from paritykit.checks import CHECKS
from paritykit.checks.base import Check, ModelCheck
from paritykit.runner import audit_results
from paritykit.testing import tiny_model
from tests.contract import toy
from tests.contract.planted import FAULTS

CASED = {n: c for n, c in CHECKS.items() if isinstance(c, Check)}
OF_WEIGHTS = {n: c for n, c in CHECKS.items() if isinstance(c, ModelCheck) and c.needs == "ledger"}


def forward(model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids, position_ids=positions).logits
    return logits


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model("qwen2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def reference(model: Path) -> pk.Capture:
    return pk.capture(pk.engine("hf", str(model), isolated=False), cases=pk.cases("short", "long-40"))


@pytest.fixture(scope="module")
def run(model: Path, reference: pk.Capture) -> Callable[..., pk.ParityRun]:
    def compare(check: str, plant: Callable[[Any], None] | None) -> pk.ParityRun:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        if plant:
            plant(loaded)
        engine = pk.engine("module", model=loaded, forward=forward)
        candidate = pk.capture(engine, cases=list(reference.cases.values()), follow=reference)
        return pk.compare(reference=reference, candidate=candidate, checks=[check])

    return compare


@pytest.mark.parametrize(("check", "fault"), [(n, f) for n, c in CASED.items() for f in c.detects])
def test_check_sees_what_it_promises(run: Callable[..., pk.ParityRun], check: str, fault: str) -> None:
    found = run(check, FAULTS[fault])
    assert found.summary.verdict == "fail", found.summary
    with pytest.raises(pk.ParityFailure, match="first divergence"):
        found.raise_on_failure()


@pytest.mark.parametrize("check", CASED)
def test_check_is_quiet_on_a_clean_pair(run: Callable[..., pk.ParityRun], check: str) -> None:
    found = run(check, None)
    assert found.summary.verdict == "pass", found.summary
    found.raise_on_failure()


def test_every_check_promises_something() -> None:
    assert all(check.detects and check.question.endswith("?") for _, check in CHECKS.items())


@pytest.fixture(scope="module")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_checkpoint(tmp_path_factory.mktemp("toy") / "model")


@pytest.mark.parametrize("fault", [f for c in OF_WEIGHTS.values() for f in c.detects])
def test_check_of_weights_sees_what_it_promises(toy_checkpoint: Path, fault: str) -> None:
    found = toy.run(toy_checkpoint, toy.STREAMS[fault])
    assert found.summary.verdict == "fail", found.summary
    with pytest.raises(pk.ParityFailure, match="first divergence"):
        found.raise_on_failure()


def test_check_of_weights_is_quiet_on_a_clean_pair(toy_checkpoint: Path) -> None:
    found = toy.run(toy_checkpoint)
    assert found.summary.verdict == "pass", found.results.findings
    assert found.summary.compared == len(toy.tensors())
    found.raise_on_failure()


def checkpoint_check(folder: Path) -> pk.ParityRun:
    return pk.ParityRun(audit_results(audit(folder), "model"))


def damaged(folder: Path, fault: str) -> None:
    """One fault on disk, in a copy of a clean checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if fault == "nonfinite":
        tensors["model.norm.weight"][3] = float("nan")
    elif fault == "missing-tensor":
        del tensors["model.layers.0.mlp.up_proj.weight"]
    elif fault == "tie-mismatch":
        del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    if fault == "truncated-file":
        file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("fault", CHECKS.get("checkpoint").detects)
def test_check_of_the_checkpoint_sees_what_it_promises(model: Path, tmp_path: Path, fault: str) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    damaged(folder, fault)
    found = checkpoint_check(folder)
    assert found.summary.verdict == "fail", found.summary
    assert fault in {f.metric for f in found.results.findings if f.verdict == "fail"}


def test_check_of_the_checkpoint_is_quiet_on_a_clean_one(model: Path) -> None:
    found = checkpoint_check(model)
    assert found.summary.verdict == "pass", found.results.findings
    found.raise_on_failure()
