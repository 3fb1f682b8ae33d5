"""Engines on models that nobody chose: whatever a family's config says, nano is at parity, and so is vLLM."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import paritykit as pk
from paritykit.captures.recorder import Selection
from paritykit.config import load_config
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.invariance.laboratory import Laboratory
from paritykit.invariance.trial import Trial
from paritykit.reports.failure import failure_text
from paritykit.results import Results
from paritykit.runner import compare_captures
from paritykit.strategies import conditions, models, workloads
from paritykit.testing import TinyModel, tiny_model
from tests.integration.conftest import Bench
from tests.nano import one_thread

IN_CI = ("qwen2", "gemma2", "qwen3_moe")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe")
SMALL = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
NARROW = (8, 24, 32, 80)
"""Sizes of heads for nano, which has any."""


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def compare(model: TinyModel, workload: pk.CaseSet, folder: Path, **arguments: Any) -> Results:
    """nano under these arguments against Hugging Face, both in float32; nothing is left in ``folder``."""
    try:
        path = str(model.build(folder / "model"))
        cases = workload.resolve(vocab_size=model.config["vocab_size"], max_positions=512)
        reference = capture(HFEngine(path, dtype="float32"), cases, folder / "hf")
        fed = [c.force(reference.continuation(c.id)) for c in cases]
        candidate = capture(NanoEngine(path, provenance=False, **arguments), fed, folder / "nano")
        checks = ["modules", "logits", *(["tokens"] if any(c.new_tokens for c in cases) else [])]
        return compare_captures(reference, candidate, checks=checks, config=load_config({}, environ={}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def capture(engine: Any, cases: list[pk.Case], out: Path) -> pk.Capture:
    engine.open()
    try:
        return engine.run(cases, points=Selection(), out=out)
    finally:
        engine.close()


def assert_parity(results: Results) -> None:
    assert results.summary.verdict == "pass", failure_text(results)
    assert results.summary.unmatched == 0, [c.unmatched for c in results.coverage]
    assert {f.check for f in results.findings} >= {"modules", "logits"}


@pytest.mark.parametrize(
    ("family", "count"), [*((f, 3) for f in IN_CI), *(pytest.param(f, 60, marks=pytest.mark.deep) for f in FAMILIES)]
)
def test_nano_is_at_parity_on_any_model(family: str, count: int, tmp_path: Path) -> None:
    drawn = st.tuples(models(family, head_dims=NARROW), workloads(window=8, longest=60), conditions("nano"))

    @settings(SMALL, max_examples=count)
    @given(drawn.filter(lambda one: len(one[0].fields) > 3))
    def law(one: tuple[TinyModel, pk.CaseSet, dict[str, Any]]) -> None:
        model, workload, arguments = one
        assert_parity(compare(model, workload, tmp_path / "run", **arguments))

    law()


def test_a_mistake_shrinks_to_the_field_it_takes(tmp_path: Path) -> None:
    """An engine that forgets the bias of its output projection is wrong on models that have one, and on no others."""

    @settings(SMALL, max_examples=30)
    @given(models("llama", keep=("rope", "widths", "layers")), st.just(pk.cases("len-3")))
    def law(model: TinyModel, workload: pk.CaseSet) -> None:
        forgetful = f"{__name__}:forget_output_bias"
        results = compare(model, workload, tmp_path / "run", after_load=forgetful)
        assert results.summary.verdict == "pass", results.summary

    with pytest.raises(AssertionError) as caught:
        law()
    assert "TinyModel(name='tiny:llama,attention_bias=true')" in "".join(caught.value.__notes__)


def forget_output_bias(worker: Any) -> None:
    for layer in worker.model.model.layers:
        if layer.self_attn.o_proj.bias is not None:
            layer.self_attn.o_proj.bias.data.zero_()


def test_what_is_fed_stays_fed_in_every_way_of_running(tmp_path: Path) -> None:
    path = str(tiny_model("qwen2"))
    cases = pk.cases("len-9+4f@b", "len-9+4").resolve(vocab_size=499)
    reference = capture(HFEngine(path), cases[:1], tmp_path / "hf").manifest
    engine = NanoEngine(path, provenance=False)
    engine.open()
    laboratory = Laboratory(own=lambda: engine, pool=None, reference=lambda: reference, cases=cases, folder=tmp_path)
    free = Trial(name="free", cases=tuple(cases), points=())
    after = laboratory.continuation(free)
    assert after["len-9+4f@b"] == list(cases[0].forced)
    assert after["len-9+4f@b"] != laboratory.view(free).capture.generated("len-9+4f@b")
    assert after["len-9+4"] == laboratory.view(free).capture.generated("len-9+4")
    engine.close()


@pytest.mark.deep
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mixtral"])
def test_vllm_is_at_parity_on_any_model(family: str, bench: Bench, tmp_path: Path) -> None:
    @settings(SMALL, max_examples=5)
    @given(models(family, ropes=("default", "linear", "llama3", "yarn")).filter(lambda model: len(model.fields) > 3))
    def law(model: TinyModel) -> None:
        folder = tmp_path / hashlib.sha256(str(model).encode()).hexdigest()[:12]
        path = folder if folder.exists() else model.build(folder)
        assert_parity(bench.compare(path))

    law()
